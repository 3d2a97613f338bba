"""The Open Inference Protocol (KServe v2) over HTTP: health, metadata, inference.

For clients such as ``tritonclient[http]``. A model takes either ``images``, pixels of N pictures of
one size, or ``files``, N encoded pictures of any size. ``map`` is on the network's canvas, as
:meth:`clsnf.Detector.predict` gives it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack

from fastapi import APIRouter, Depends, Request, Response, params

from clsnf import __version__
from clsnf.serving.catalogue import ModelEntry
from clsnf.serving.front_door import only
from clsnf.serving.middleware import INFER, INFER_VERSION
from clsnf.serving.open_inference import INPUT_SHAPES, output_shapes, response_of, served_entry
from clsnf.serving.openapi import INFER_ANSWER, INFER_BODY, problems
from clsnf.serving.reading import RequestBody
from clsnf.serving.reading_worker import Buffer
from clsnf.serving.request_body import client_of, encoded_body, read_body, while_connected
from clsnf.serving.responses import PartsResponse
from clsnf.serving.schemas import (
    ModelMetadata,
    ModelReady,
    RepositoryModel,
    ServerLive,
    ServerMetadata,
    ServerReady,
    TensorMetadata,
)
from clsnf.serving.service import InspectionService, MapWish
from clsnf.serving.settings import MiB
from clsnf.serving.tensors import (
    INPUTS,
    OUTPUTS,
    InferBody,
    InferResponse,
    write_response,
)

_LENGTH = "Inference-Header-Content-Length"


def routes_v2(service: InspectionService, asking: Sequence[params.Depends]) -> APIRouter:
    """The routes below ``/v2``; `asking` decides who may ask about models."""
    routes = APIRouter(prefix="/v2", tags=["open inference protocol"])
    _add_server(routes, service)
    models = APIRouter(dependencies=asking, responses=problems(401))
    _add_metadata(models, service)
    _add_inference(models, service)
    routes.include_router(models)
    return routes


# ---- the server ----


def _add_server(routes: APIRouter, service: InspectionService) -> None:
    @routes.get("")
    async def server() -> ServerMetadata:
        """The server's name and extensions."""
        return ServerMetadata(
            name="clsnf",
            version=__version__,
            extensions=["binary_tensor_data", "model_repository"],
        )

    @routes.get("/health/live")
    async def live() -> ServerLive:
        """The process answers."""
        return ServerLive(live=True)

    @routes.get("/health/ready", responses=problems(503))
    async def ready() -> ServerReady:
        """Models can be asked."""
        service.check_ready()
        return ServerReady(ready=True)


# ---- models ----


def _add_metadata(routes: APIRouter, service: InspectionService) -> None:
    store = service.store

    async def ready(category: str, version: str | None) -> ModelReady:
        served_entry(store, category, version)
        deadline = asyncio.get_running_loop().time() + service.settings.deadline_s
        async with service.answer_before(deadline):
            await service.check_answers(category)
        return ModelReady(name=category, ready=True)

    @routes.post("/repository/index")
    async def repository() -> list[RepositoryModel]:
        """All models; those that are not loaded are on their first use."""
        entries = service.store.catalogue.entries
        causes = {r.category: r.cause for r in service.store.refused if r.category is not None}
        served = [
            RepositoryModel(
                name=name, version=entry.version, state="READY", reason=causes.get(name, "")
            )
            for name, entry in sorted(entries.items())
        ]
        return served + [
            RepositoryModel(name=name, version="", state="UNAVAILABLE", reason=cause)
            for name, cause in causes.items()
            if name not in entries
        ]

    @routes.get("/models/{category}", responses=problems(404), response_model_exclude_unset=True)
    async def metadata(category: str) -> ModelMetadata:
        """A model's inputs and outputs."""
        return _metadata(served_entry(store, category))

    @routes.get(
        "/models/{category}/versions/{version}",
        responses=problems(404),
        response_model_exclude_unset=True,
    )
    async def metadata_version(category: str, version: str) -> ModelMetadata:
        """The same, of the version that is served."""
        return _metadata(served_entry(store, category, version))

    @routes.get("/models/{category}/ready", responses=problems(404, 503, 504))
    async def model_ready(category: str) -> ModelReady:
        """The model is loaded and has answered a picture within 10 s, or does so now."""
        return await ready(category, None)

    @routes.get("/models/{category}/versions/{version}/ready", responses=problems(404, 503, 504))
    async def model_version_ready(category: str, version: str) -> ModelReady:
        """The same, of the version that is served."""
        return await ready(category, version)


def _metadata(entry: ModelEntry) -> ModelMetadata:
    shapes = output_shapes(entry)
    return ModelMetadata(
        name=entry.category,
        versions=[entry.version],
        platform="clsnf",
        inputs=[
            TensorMetadata(
                name=name,
                datatype=datatype,
                shape=INPUT_SHAPES[name],
                parameters={"optional": True},
            )
            for name, datatype in INPUTS.items()
        ],
        outputs=[
            TensorMetadata(name=name, datatype=datatype, shape=shapes[name])
            for name, datatype in OUTPUTS.items()
        ],
    )


# ---- inference ----


def _add_inference(routes: APIRouter, service: InspectionService) -> None:
    responses = INFER_ANSWER | problems(400, 404, 408, 413, 415, 422, 429, 503, 504)
    types = [Depends(only("application/json", "application/octet-stream"))]

    @routes.post(
        "/models/{category}/infer",
        name=INFER,
        response_class=Response,
        dependencies=types,
        responses=responses,
        openapi_extra=INFER_BODY,
    )
    async def infer(request: Request, category: str) -> Response:
        """Inspect images: JSON, or JSON followed by binary tensors."""
        return await _infer(service, request, category, None)

    @routes.post(
        "/models/{category}/versions/{version}/infer",
        name=INFER_VERSION,
        response_class=Response,
        dependencies=types,
        responses=responses,
        openapi_extra=INFER_BODY,
    )
    async def infer_version(request: Request, category: str, version: str) -> Response:
        """The same, of the version that is served."""
        return await _infer(service, request, category, version)


async def _infer(
    service: InspectionService, request: Request, category: str, version: str | None
) -> Response:
    settings = service.settings
    deadline = asyncio.get_running_loop().time() + settings.deadline_s
    limit = settings.max_megabytes * MiB
    served_entry(service.store, category, version)
    form = InferBody.of(request.headers.get(_LENGTH), settings.images_per_request)
    source = encoded_body(request, form, limit)
    async with AsyncExitStack() as held:
        holding = held.enter_context(service.bodies.hold(client_of(request)))
        data = await read_body(request, limit, holding, deadline)
        async with service.answer_before(deadline), while_connected(request):
            inspections, head = await service.inspect_body(
                category, RequestBody(source, data), MapWish(), held
            )
            assert head is not None
            response = response_of(category, inspections, head.id)
            text, raw = await _written(service, response, head.outputs)
        headers = {_LENGTH: str(len(text))} if raw else {}
        kind = "application/octet-stream" if raw else "application/json"
        return PartsResponse([text, *raw], kind, headers, held)


async def _written(
    service: InspectionService, response: InferResponse, outputs: dict[str, bool]
) -> tuple[Buffer, Sequence[Buffer]]:
    """:func:`write_response`; in a reader where the JSON holds a map."""
    if outputs.get("map") is False:
        return await service.reader.write(response, outputs)
    return write_response(response, outputs)
