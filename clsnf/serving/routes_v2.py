"""The Open Inference Protocol (KServe v2) over HTTP: health, metadata, inference.

For clients such as ``tritonclient[http]``. A model takes either ``images``, pixels of N pictures of
one size, or ``files``, N encoded pictures of any size. ``map`` is on the network's canvas, as
:meth:`clsnf.Detector.predict` gives it.
"""

from __future__ import annotations

import asyncio
from functools import partial

from fastapi import APIRouter, Request, Response

from clsnf import __version__
from clsnf.serving.catalogue import ModelEntry
from clsnf.serving.errors import ServiceUnavailable
from clsnf.serving.middleware import INFER, INFER_VERSION
from clsnf.serving.open_inference import (
    INPUT_SHAPES,
    named_images,
    output_arrays,
    output_shapes,
    served_entry,
)
from clsnf.serving.openapi import INFER_BODY, problems
from clsnf.serving.request_body import read_before, read_body
from clsnf.serving.schemas import (
    ModelMetadata,
    ModelReady,
    RepositoryModel,
    ServerLive,
    ServerMetadata,
    ServerReady,
    TensorMetadata,
)
from clsnf.serving.service import InspectionService
from clsnf.serving.settings import MiB
from clsnf.serving.store import ModelStore
from clsnf.serving.tensors import (
    INPUTS,
    OUTPUTS,
    InferRequest,
    InferResponse,
    read_request,
    write_response,
)

_LENGTH = "Inference-Header-Content-Length"


def routes_v2(service: InspectionService) -> APIRouter:
    """The routes below ``/v2``."""
    routes = APIRouter(prefix="/v2", tags=["open inference protocol"])
    _add_server(routes, service)
    _add_metadata(routes, service.store)
    _add_inference(routes, service)
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
        if not service.ready:
            raise ServiceUnavailable("The server is closing.")
        return ServerReady(ready=True)

    @routes.post("/repository/index")
    async def repository() -> list[RepositoryModel]:
        """All models; those that are not loaded are on their first use."""
        return [
            RepositoryModel(name=category, version=entry.version, state="READY", reason="")
            for category, entry in sorted(service.store.catalogue.entries.items())
        ]


# ---- models ----


def _add_metadata(routes: APIRouter, store: ModelStore) -> None:
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

    @routes.get("/models/{category}/ready", responses=problems(404))
    async def model_ready(category: str) -> ModelReady:
        """The model can be asked; it is loaded on its first use."""
        return ModelReady(name=category, ready=bool(served_entry(store, category)))

    @routes.get("/models/{category}/versions/{version}/ready", responses=problems(404))
    async def model_version_ready(category: str, version: str) -> ModelReady:
        """The same, of the version that is served."""
        return ModelReady(name=category, ready=bool(served_entry(store, category, version)))


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
    responses = problems(400, 404, 408, 413, 415, 422, 429, 503, 504)

    @routes.post(
        "/models/{category}/infer", name=INFER, responses=responses, openapi_extra=INFER_BODY
    )
    async def infer(request: Request, category: str) -> Response:
        """Inspect images: JSON, or JSON followed by binary tensors."""
        return await _infer(service, request, category, None)

    @routes.post(
        "/models/{category}/versions/{version}/infer",
        name=INFER_VERSION,
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
    served_entry(service.store, category, version)
    with service.admit():
        body = await read_before(deadline, read_body(request, settings.max_megabytes * MiB))
        async with service.answer_before(deadline):
            asked: InferRequest = await service.run_in_reader(
                partial(read_request, body, request.headers.get(_LENGTH))
            )
            images = named_images(asked.images, settings.max_megapixels)
            inspections = await service.inspect(category, images, admitted=1)
            response = InferResponse(
                category, inspections[0].answer.version, asked.id, output_arrays(inspections)
            )
            content, length = await service.run_in_reader(
                partial(write_response, response, asked.outputs)
            )
    if length is None:
        return Response(content, media_type="application/json")
    return Response(content, media_type="application/octet-stream", headers={_LENGTH: str(length)})
