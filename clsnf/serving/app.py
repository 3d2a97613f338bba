"""The FastAPI application around an :class:`InspectionService`: v1, health, metrics, the page.

Runs under Ray Serve or any ASGI server.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Query, Request, Response, params
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi_offline import FastAPIOffline
from pydantic import Field, ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from clsnf import __version__
from clsnf.serving.answers import Inspection, ModelState, model_line, model_page
from clsnf.serving.catalogue import ModelEntry
from clsnf.serving.detect_anomalies import DetectAnomaliesAnswer, detect_anomalies_answer
from clsnf.serving.errors import RequestError, UnprocessableContent, UnsupportedMediaType
from clsnf.serving.front_door import FrontDoor, methods_of, only
from clsnf.serving.hosts import listed_origins
from clsnf.serving.metrics import CONTENT_TYPE
from clsnf.serving.middleware import DETECT, INSPECT, RequestMetrics
from clsnf.serving.openapi import IMAGE_BODY, ONE_IMAGE_BODY, THRESHOLD_BODY, describe, problems
from clsnf.serving.pages import DOCS_STATIC, add_pages
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
    RefusedModel,
)
from clsnf.serving.service import InspectionService, MapWish
from clsnf.serving.settings import MiB
from clsnf.serving.store import refusals_line
from clsnf.serving.tokens import Tokens

log = logging.getLogger("clsnf.serving")

_ABOUT = (
    "Finds defects in pictures of products. "
    "Each category has a model of its own, trained on good pictures alone.\n\n"
    "A score in [0, 1] is compared with the category's threshold; "
    "the p-value says where it stands among the held-out good pictures.\n"
)
_BEARER = HTTPBearer(auto_error=False, description="A token of the server.")
_Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)]
_THRESHOLD_BYTES = 4096  # of a body that sets a threshold


def build_app(
    service: InspectionService, tokens: Tokens, before_close: Callable[[], Awaitable[None]]
) -> FastAPI:
    """The application; it starts and closes the service with its own life.

    Args:
        service: answers.
        tokens: what requests must give.
        before_close: awaited before the service closes, to end its connections.
    """
    settings = service.settings

    async def may_ask(credentials: _Credentials) -> None:
        tokens.check_ask(credentials.credentials if credentials else None)

    async def may_change(credentials: _Credentials) -> None:
        tokens.check_change(credentials.credentials if credentials else None)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await before_close()
        await service.close()

    app: FastAPI = FastAPIOffline(
        title="clsnf",
        version=__version__,
        description=_ABOUT,
        lifespan=life,
        docs_url=None,
        redoc_url=None,
        static_url=DOCS_STATIC,
        generate_unique_id_function=lambda route: route.name,
    )
    app.openapi = partial(describe, app)  # type: ignore[method-assign]
    app.add_middleware(RequestMetrics, service=service)
    app.add_middleware(FrontDoor, routes=app.router.routes, settings=settings)
    origins = listed_origins(settings.allowed_origins)
    if origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"]
        )
    _add_problems(app)
    asking = [Depends(may_ask)] if tokens.needed_to_ask else []
    _add_models(app, service, asking, [Depends(may_change)])
    _add_inspection(app, service, asking)
    _add_detect_anomalies(app, service, asking)
    _add_health(app, service)
    app.include_router(routes_v2(service, asking))
    add_pages(app)
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
        headers = dict(error.headers or {})
        if error.status_code == 405:  # Starlette names the methods of the path's first route alone
            headers["Allow"] = ", ".join(methods_of(app.router.routes, request.scope))
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


def _add_models(
    app: FastAPI,
    service: InspectionService,
    asking: Sequence[params.Depends],
    changing: Sequence[params.Depends],
) -> None:
    def state_of(entry: ModelEntry) -> ModelState:
        key, thresholds = (entry.category, entry.version), service.thresholds
        return ModelState(
            thresholds.settings.get(entry.category),
            any((m.entry.category, m.entry.version) == key for m in service.store.loaded),
            next((r.cause for r in service.store.refused if r.category == entry.category), None),
            thresholds.cause(entry.category),
        )

    def page_of(category: str) -> Response:
        entry = service.store.entry(category)
        return json_answer(model_page(entry, state_of(entry)))

    @app.get(
        "/v1/models",
        dependencies=asking,
        response_model=ModelList,
        responses=problems(401),
        tags=["models"],
    )
    async def models() -> Response:
        """All models, with the threshold in force, and what of the folder does not serve."""
        catalogue, refused = service.store.catalogue, service.store.refused
        return json_answer(
            ModelList(
                models=[
                    model_line(entry, state_of(entry))
                    for _, entry in sorted(catalogue.entries.items())
                ],
                folder=str(catalogue.folder),
                refused=refusals_line(refused),
                refusals=[
                    RefusedModel(category=r.category, cause=r.cause, serves=r.serves)
                    for r in refused
                ],
                left_out=catalogue.left_out,
            )
        )

    @app.get(
        "/v1/models/{category}",
        dependencies=asking,
        response_model=ModelPage,
        responses=problems(401, 404),
        tags=["models"],
    )
    async def model(category: str) -> Response:
        """All about a model: training, test metrics, threshold, validation scores."""
        return page_of(category)

    @app.put(
        "/v1/models/{category}/threshold",
        dependencies=[*changing, Depends(only("application/json"))],
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
        dependencies=changing,
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
    deadline = asyncio.get_running_loop().time() + service.settings.deadline_s
    with service.bodies.hold(client_of(request)) as holding:
        body = await read_body(request, _THRESHOLD_BYTES, holding, deadline)
    try:
        return NewThreshold.model_validate_json(bytes(body))
    except ValidationError as error:
        raise UnprocessableContent(_reasons(error.errors())) from error


# ---- inspection ----


def _add_inspection(
    app: FastAPI, service: InspectionService, asking: Sequence[params.Depends]
) -> None:
    limit, max_images = service.settings.max_megabytes * MiB, service.settings.images_per_request

    @app.post(
        "/v1/models/{category}/inspect",
        name=INSPECT,
        dependencies=asking,
        response_model=ImageAnswer | Answers,
        responses={
            200: {"content": {"image/png": {"schema": {"type": "string", "format": "binary"}}}},
            **problems(400, 401, 404, 406, 408, 413, 415, 422, 429, 503, 504),
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
                    "image; mask: a PNG, white within the outline and black elsewhere"
                ),
            ),
        ] = "none",
        size: Annotated[
            Annotated[int, Field(ge=1, le=32_000)] | Literal["native", "canvas"],
            Query(
                description=(
                    "of the map: its longest side in pixels, at most the image's own; native: as "
                    "large as the image; canvas: as large as the network sees it"
                ),
            ),
        ] = "native",
        threshold: Annotated[
            float | None,
            Query(
                ge=0,
                le=1,
                description=(
                    "judges this request in place of the threshold in force; the request does not "
                    "count among the verdicts"
                ),
            ),
        ] = None,
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
        choice: MapChoice = "overlay" if alone else map_choice
        wish = MapWish(choice, size, threshold, in_base64=not alone, alone=alone)
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


def _add_detect_anomalies(
    app: FastAPI, service: InspectionService, asking: Sequence[params.Depends]
) -> None:
    limit = service.settings.max_megabytes * MiB

    @app.post(
        "/v1/models/{category}/detect-anomalies",
        name=DETECT,
        dependencies=asking,
        response_model=DetectAnomaliesAnswer,
        responses=problems(400, 401, 404, 408, 413, 415, 422, 429, 503, 504),
        openapi_extra=ONE_IMAGE_BODY,
        tags=["inspection"],
    )
    async def detect_anomalies(request: Request, category: str) -> Response:
        """Inspect one image, with the answer of Lookout for Vision's DetectAnomalies."""
        deadline = asyncio.get_running_loop().time() + service.settings.deadline_s
        entry = service.store.entry(category)
        if media_type(request) == MULTIPART:
            raise UnsupportedMediaType("A form is not read here: send the image as the body.")
        source = encoded_body(request, image_form(request, None, 1), limit)
        async with AsyncExitStack() as held:
            holding = held.enter_context(service.bodies.hold(client_of(request)))
            data = await read_body(request, limit, holding, deadline)
            async with service.answer_before(deadline), while_connected(request):
                (inspection,), _ = await service.inspect_body(
                    category, RequestBody(source, data), MapWish("mask"), held
                )
                # The mask of a large image is work that the event loop must not wait for.
                answer = await asyncio.to_thread(detect_anomalies_answer, inspection, entry)
            return json_answer(answer)


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
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def metrics() -> Response:
        """Counters and histograms of this replica, for Prometheus."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)
