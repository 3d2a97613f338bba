"""The FastAPI application around an :class:`InspectionService`: v1, health, metrics, the page. Runs
under Ray Serve or any ASGI server.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import resources
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi.staticfiles import StaticFiles
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException

from clsnf import __version__
from clsnf.serving import schemas
from clsnf.serving.answers import model_line, model_page
from clsnf.serving.errors import NotAcceptable, RequestError, Unavailable
from clsnf.serving.metrics import CONTENT_TYPE
from clsnf.serving.middleware import Measured
from clsnf.serving.request_body import MULTIPART, body_before, image_files, media_type, read_body
from clsnf.serving.routes_v2 import open_inference_routes
from clsnf.serving.service import InspectionService
from clsnf.serving.settings import MiB
from clsnf.serving.tokens import check_token, read_token

log = logging.getLogger("clsnf.serving")

_ABOUT = """Finds defects in pictures of products. Each category has a model of its own, trained on good pictures alone.

A score in [0, 1] is compared with the category's threshold; the p-value says where it stands among the held-out good pictures.
"""
_BEARER = HTTPBearer(auto_error=False, description="The token that the server was started with.")
# Nothing on the page comes from elsewhere; the documentation's own page starts itself by a line of
# script.
_POLICY = "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'"
_DOCS_POLICY = f"{_POLICY}; script-src 'self' 'unsafe-inline'"


def build_app(service: InspectionService) -> FastAPI:
    """The application; it starts and closes the service with its own life.

    Raises:
        SettingsError: the token can't be read.
    """
    token = read_token(service.settings.token_file)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.close()

    app: FastAPI = FastAPIOffline(
        title="clsnf",
        version=__version__,
        description=_ABOUT,
        lifespan=life,
        redoc_url=None,
        static_url="/docs-static",
    )
    app.add_middleware(Measured, service=service)
    _add_problems(app)
    _add_models(app, service, token)
    _add_inspection(app, service)
    _add_health(app, service)
    app.include_router(open_inference_routes(service))
    _add_page(app)
    return app


# ---- problems ----


def _add_problems(app: FastAPI) -> None:
    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        return JSONResponse(error.content, error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def wrong(request: Request, error: RequestValidationError) -> Response:
        found = [
            f"{'.'.join(str(part) for part in e['loc'][1:]) or e['loc'][0]}: {e['msg']}"
            for e in error.errors()
        ]
        return JSONResponse({"error": "; ".join(found)[:1000]}, 422)

    @app.exception_handler(HTTPException)
    async def known(request: Request, error: HTTPException) -> Response:
        return JSONResponse({"error": str(error.detail)}, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return JSONResponse(
            {"error": "This is a bug in clsnf; the server's log has the details."}, 500
        )


# ---- models ----


def _add_models(app: FastAPI, service: InspectionService, token: str | None) -> None:
    def allowed(
        credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)],
    ) -> None:
        check_token(token, credentials.credentials if credentials else None)

    def loaded_versions() -> set[tuple[str, str]]:
        return {(m.entry.category, m.entry.version) for m in service.store.loaded}

    def page_of(category: str) -> dict[str, Any]:
        entry = service.store.entry(category)
        setting = service.thresholds.settings.get(category)
        return model_page(entry, setting, (entry.category, entry.version) in loaded_versions())

    @app.get("/v1/models", response_model=schemas.ModelList, tags=["models"])
    async def models() -> Response:
        """All models, with the threshold in force."""
        catalogue, loaded, settings = (
            service.store.catalogue,
            loaded_versions(),
            service.thresholds.settings,
        )
        lines = [
            model_line(entry, settings.get(category), (category, entry.version) in loaded)
            for category, entry in sorted(catalogue.entries.items())
        ]
        return JSONResponse(
            {"models": lines, "folder": str(catalogue.folder), "refused": service.store.refused}
        )

    @app.get(
        "/v1/models/{category}",
        response_model=schemas.ModelPage,
        responses=schemas.problems(404),
        tags=["models"],
    )
    async def model(category: str) -> Response:
        """What a model was trained on, its figures, its threshold, the scores of its validation
        normals.
        """
        return JSONResponse(page_of(category))

    @app.put(
        "/v1/models/{category}/threshold",
        dependencies=[Depends(allowed)],
        response_model=schemas.ModelPage,
        responses=schemas.problems(400, 401, 403, 404, 422, 503),
        tags=["models"],
    )
    async def set_threshold(category: str, new: schemas.NewThreshold) -> Response:
        """Set a category's threshold, on all replicas and for good: a false-reject rate, or a value
        for this version of the model.
        """
        entry = service.store.entry(category)
        await asyncio.to_thread(service.thresholds.set, entry, **new.model_dump(exclude_unset=True))
        return JSONResponse(page_of(category))

    @app.delete(
        "/v1/models/{category}/threshold",
        dependencies=[Depends(allowed)],
        response_model=schemas.ModelPage,
        responses=schemas.problems(401, 403, 404, 503),
        tags=["models"],
    )
    async def reset_threshold(category: str) -> Response:
        """Go back to the model's own threshold."""
        entry = service.store.entry(category)
        await asyncio.to_thread(service.thresholds.set, entry)
        return JSONResponse(page_of(category))


# ---- inspection ----


def _add_inspection(app: FastAPI, service: InspectionService) -> None:
    limit, most = service.settings.max_megabytes * MiB, service.settings.images_per_request

    @app.post(
        "/v1/models/{category}/inspect",
        response_model=schemas.ImageAnswer | schemas.Answers,
        responses={
            200: {"content": {"image/png": {"schema": {"type": "string", "format": "binary"}}}},
            **schemas.problems(400, 404, 406, 408, 413, 415, 422, 429, 503, 504),
        },
        openapi_extra=schemas.IMAGE_BODY,
        tags=["inspection"],
    )
    async def inspect(
        request: Request,
        category: str,
        kind: Annotated[
            Literal["none", "png", "npy", "overlay"],
            Query(
                alias="map",
                description=(
                    "png: the heat map; npy: its values; overlay: heat map and outline over the "
                    "image"
                ),
            ),
        ] = "none",
    ) -> Response:
        """Inspect images.

        An image as the body gets one answer; the images of a multipart body are looked at as one
        batch and get a list of answers. With `Accept: image/png` the overlay alone is answered,
        with the figures in headers `Clsnf-Score` and so on.
        """
        deadline = asyncio.get_running_loop().time() + service.settings.deadline_s
        service.store.entry(category)
        with service.room():
            body = await body_before(deadline, read_body(request, limit))
            files = await image_files(request, body, most)
            alone = _wants_picture(request.headers.get("accept", ""))
            if alone and len(files) > 1:
                raise NotAcceptable(
                    f"There are {len(files)} images: with Accept: image/png send one at a time."
                )
            async with service.before(deadline):
                answers = await service.inspect(
                    category, files, "overlay" if alone else kind, admitted=1
                )
        if alone:
            shown = ("score", "threshold", "verdict", "p_value", "version")
            headers = {
                f"Clsnf-{name.replace('_', '-').title()}": str(answers[0].fields[name])
                for name in shown
            }
            return Response(answers[0].picture, media_type="image/png", headers=headers)
        if media_type(request) == MULTIPART:
            return JSONResponse({"answers": [a.json(kind) for a in answers]})
        return JSONResponse(answers[0].json(kind))


def _wants_picture(accept: str) -> bool:
    """Whether a PNG is preferred to JSON."""
    weights: dict[str, float] = {}
    for part in accept.split(","):
        kind, _, parameters = part.strip().partition(";")
        weight = parameters.replace(" ", "").partition("q=")[2].partition(";")[0]
        try:
            weights[kind.strip().lower()] = float(weight) if weight else 1.0
        except ValueError:
            weights[kind.strip().lower()] = 0.0
    json = max(weights.get(kind, 0.0) for kind in ("application/json", "application/*", "*/*"))
    return weights.get("image/png", 0.0) > json


# ---- health ----


def _add_health(app: FastAPI, service: InspectionService) -> None:
    @app.get("/healthz", tags=["health"])
    async def healthz() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @app.get("/readyz", responses=schemas.problems(503), tags=["health"])
    async def readyz() -> dict[str, Any]:
        """Models can be asked."""
        if not service.ready:
            raise Unavailable("The server is closing.")
        return {
            "status": "ready",
            "models": len(service.store.catalogue.entries),
            "loaded": len(service.store.loaded),
        }

    @app.get(
        "/metrics",
        tags=["health"],
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}}},
    )
    async def metrics() -> Response:
        """Counters and histograms of this replica, for Prometheus."""
        return Response(service.meters.text(), media_type=CONTENT_TYPE)


# ---- page ----


def _add_page(app: FastAPI) -> None:
    folder = resources.files("clsnf.serving") / "page"
    index = (folder / "index.html").read_text(encoding="utf-8")
    app.mount("/page", StaticFiles(directory=str(folder)), name="page")

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        headers = {
            "Content-Security-Policy": _POLICY,
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "no-cache",
        }
        return Response(index, media_type="text/html", headers=headers)
