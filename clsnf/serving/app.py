"""The FastAPI application around an :class:`InspectionService`: v1, health, metrics, the page.

Runs under Ray Serve or any ASGI server.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from importlib import resources
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi.staticfiles import StaticFiles
from fastapi_offline import FastAPIOffline
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from clsnf import __version__
from clsnf.serving.answers import Inspection, model_line, model_page
from clsnf.serving.errors import RequestError, UnprocessableContent, UnsupportedMediaType
from clsnf.serving.metrics import CONTENT_TYPE
from clsnf.serving.middleware import INSPECT, RequestMetrics
from clsnf.serving.openapi import IMAGE_BODY, THRESHOLD_BODY, problems
from clsnf.serving.reading import RequestBody
from clsnf.serving.reading_worker import Buffer
from clsnf.serving.request_body import (
    FRAME_SHAPE,
    MULTIPART,
    client_of,
    encoded_body,
    image_form,
    media_type,
    read_body,
    while_connected,
)
from clsnf.serving.responses import PartsResponse, json_answer
from clsnf.serving.routes_v2 import routes_v2
from clsnf.serving.schemas import (
    Answers,
    Health,
    ImageAnswer,
    MapChoice,
    ModelList,
    ModelPage,
    NewThreshold,
    Problem,
    Readiness,
)
from clsnf.serving.service import InspectionService, MapWish
from clsnf.serving.settings import MiB
from clsnf.serving.tokens import check_token, read_token

log = logging.getLogger("clsnf.serving")

_ABOUT = (
    "Finds defects in pictures of products. "
    "Each category has a model of its own, trained on good pictures alone.\n\n"
    "A score in [0, 1] is compared with the category's threshold; "
    "the p-value says where it stands among the held-out good pictures.\n"
)
_BEARER = HTTPBearer(auto_error=False, description="The token that the server was started with.")
_THRESHOLD_BYTES = 4096  # of a body that sets a threshold
# The page loads nothing from another host.
_POLICY = "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'"


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
    app.add_middleware(RequestMetrics, service=service)
    _add_problems(app)
    _add_models(app, service, token)
    _add_inspection(app, service)
    _add_health(app, service)
    app.include_router(routes_v2(service))
    _add_page(app)
    return app


# ---- problems ----


def _add_problems(app: FastAPI) -> None:
    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        return json_answer(Problem(error=str(error), **error.details), error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        # The first part of a place says whether it is in the path, the query or the body.
        errors = [{**found, "loc": found["loc"][1:] or found["loc"]} for found in error.errors()]
        return json_answer(Problem(error=_reasons(errors)), 422)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        headers = None if error.headers is None else dict(error.headers)
        return json_answer(Problem(error=str(error.detail)), error.status_code, headers)

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return json_answer(
            Problem(error="This is a bug in clsnf; the server's log has the details."), 500
        )


def _reasons(errors: Sequence[Mapping[str, Any]]) -> str:
    """Errors of pydantic in one line."""
    found = [
        ": ".join(filter(None, (".".join(map(str, error["loc"])), error["msg"])))
        for error in errors
    ]
    return "; ".join(found)[:1000]


# ---- models ----


def _add_models(app: FastAPI, service: InspectionService, token: str | None) -> None:
    def authorize(
        credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)],
    ) -> None:
        check_token(token, credentials.credentials if credentials else None)

    def loaded_versions() -> set[tuple[str, str]]:
        return {(m.entry.category, m.entry.version) for m in service.store.loaded}

    def page_of(category: str) -> Response:
        entry = service.store.entry(category)
        setting = service.thresholds.settings.get(category)
        loaded = (entry.category, entry.version) in loaded_versions()
        return json_answer(model_page(entry, setting, loaded))

    @app.get("/v1/models", response_model=ModelList, tags=["models"])
    async def models() -> Response:
        """All models, with the threshold in force."""
        catalogue, settings = service.store.catalogue, service.thresholds.settings
        loaded = loaded_versions()
        lines = [
            model_line(entry, settings.get(category), (category, entry.version) in loaded)
            for category, entry in sorted(catalogue.entries.items())
        ]
        folder = str(catalogue.folder)
        return json_answer(ModelList(models=lines, folder=folder, refused=service.store.refused))

    @app.get(
        "/v1/models/{category}",
        response_model=ModelPage,
        responses=problems(404),
        tags=["models"],
    )
    async def model(category: str) -> Response:
        """All about a model: training, test metrics, threshold, validation scores."""
        return page_of(category)

    @app.put(
        "/v1/models/{category}/threshold",
        dependencies=[Depends(authorize)],
        response_model=ModelPage,
        responses=problems(400, 401, 403, 404, 408, 413, 415, 422, 429, 503),
        openapi_extra=THRESHOLD_BODY,
        tags=["models"],
    )
    async def set_threshold(request: Request, category: str) -> Response:
        """Set a category's threshold, on all replicas, until it is set again or deleted.

        Give a false-reject rate, or a value for this version of the model.
        """
        entry = service.store.entry(category)
        new = await _new_threshold(request, service)
        await asyncio.to_thread(service.thresholds.set, entry, **new.model_dump(exclude_unset=True))
        return page_of(category)

    @app.delete(
        "/v1/models/{category}/threshold",
        dependencies=[Depends(authorize)],
        response_model=ModelPage,
        responses=problems(401, 403, 404, 503),
        tags=["models"],
    )
    async def reset_threshold(category: str) -> Response:
        """Go back to the model's own threshold."""
        entry = service.store.entry(category)
        await asyncio.to_thread(service.thresholds.set, entry)
        return page_of(category)


async def _new_threshold(request: Request, service: InspectionService) -> NewThreshold:
    """The threshold in a request's body, which is read only now, after the token."""
    if media_type(request) != "application/json":
        raise UnsupportedMediaType("A threshold comes as JSON: Content-Type: application/json.")
    deadline = asyncio.get_running_loop().time() + service.settings.deadline_s
    with service.bodies.hold(client_of(request)) as holding:
        body = await read_body(request, _THRESHOLD_BYTES, holding, deadline)
    try:
        return NewThreshold.model_validate_json(bytes(body))
    except ValidationError as error:
        raise UnprocessableContent(_reasons(error.errors())) from error


# ---- inspection ----


def _add_inspection(app: FastAPI, service: InspectionService) -> None:
    limit, max_images = service.settings.max_megabytes * MiB, service.settings.images_per_request

    @app.post(
        "/v1/models/{category}/inspect",
        name=INSPECT,
        response_model=ImageAnswer | Answers,
        responses={
            200: {"content": {"image/png": {"schema": {"type": "string", "format": "binary"}}}},
            **problems(400, 404, 406, 408, 413, 415, 422, 429, 503, 504),
        },
        openapi_extra=IMAGE_BODY,
        tags=["inspection"],
    )
    async def inspect(
        request: Request,
        category: str,
        map_choice: Annotated[
            MapChoice,
            Query(
                alias="map",
                description=(
                    "png: the heat map; npy: its values; overlay: heat map and outline over the "
                    "image"
                ),
            ),
        ] = "none",
        shape: Annotated[
            str | None,
            Query(
                pattern=FRAME_SHAPE,
                description=(
                    "of a raw frame: HEIGHTxWIDTHx3 (RGB) or HEIGHTxWIDTHx1 (grey), uint8, row by "
                    "row"
                ),
            ),
        ] = None,
    ) -> Response:
        """Inspect images.

        An image as the body gets one answer. The images of a multipart body are one batch and get
        a list of answers. With `Accept: image/png` the answer is the overlay alone, with the score
        and the rest in headers such as `Clsnf-Score`.
        """
        deadline = asyncio.get_running_loop().time() + service.settings.deadline_s
        service.store.entry(category)
        source = encoded_body(request, image_form(request, shape, max_images), limit)
        alone = _prefers_png(request.headers.get("accept", ""))
        wish = MapWish("overlay", alone=True) if alone else MapWish(map_choice, in_base64=True)
        async with AsyncExitStack() as held:
            holding = held.enter_context(service.bodies.hold(client_of(request)))
            data = await read_body(request, limit, holding, deadline)
            async with service.answer_before(deadline), while_connected(request):
                inspections, _ = await service.inspect_body(
                    category, RequestBody(source, data), wish, held
                )
            if alone:
                return _overlay_response(inspections[0], held)
            return _answers_response(
                inspections, wish.choice, media_type(request) == MULTIPART, held
            )


def _overlay_response(inspection: Inspection, held: AsyncExitStack) -> Response:
    """The overlay as a PNG, with the answer in headers."""
    answer = inspection.answer
    headers = {
        "Clsnf-Score": str(answer.score),
        "Clsnf-Threshold": str(answer.threshold),
        "Clsnf-Verdict": answer.verdict,
        "Clsnf-P-Value": str(answer.p_value),
        "Clsnf-Version": answer.version,
    }
    assert inspection.map_file is not None
    return PartsResponse([inspection.map_file], "image/png", headers, held)


def _answers_response(
    inspections: Sequence[Inspection], choice: MapChoice, listed: bool, held: AsyncExitStack
) -> Response:
    """The answers as JSON, with maps that are in base64 already."""
    parts: list[Buffer] = []
    for inspection in inspections:
        text = inspection.answer.model_dump_json(exclude_unset=True).encode()
        parts.append(b"," if parts else b"")
        if inspection.map_file is None:
            parts.append(text)
        else:  # the map is the last key
            parts.append(text[:-1] + f',"map":{{"format":"{choice}","base64":"'.encode())
            parts += [inspection.map_file, b'"}}']
    if listed:
        parts = [b'{"answers":[', *parts, b"]}"]
    return PartsResponse(parts, "application/json", {}, held)


def _prefers_png(accept: str) -> bool:
    """Whether an Accept header prefers PNG to JSON."""
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
    async def healthz() -> Health:
        """The process answers."""
        return Health(status="ok")

    @app.get("/readyz", responses=problems(503), tags=["health"])
    async def readyz() -> Readiness:
        """Models can be asked."""
        service.check_ready()
        store = service.store
        return Readiness(
            status="ready", models=len(store.catalogue.entries), loaded=len(store.loaded)
        )

    @app.get(
        "/metrics",
        tags=["health"],
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}}},
    )
    async def metrics() -> Response:
        """Counters and histograms of this replica, for Prometheus."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)


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
