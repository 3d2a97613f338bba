"""The Open Inference Protocol (KServe v2) over HTTP: health, metadata, inference, for clients such
as ``tritonclient[http]``.

A model takes either ``images``, pixels of N pictures of one size, or ``files``, N encoded pictures
of any size. ``map`` is on the network's canvas, as :meth:`clsnf.Detector.predict` gives it.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from clsnf import __version__
from clsnf.serving import schemas
from clsnf.serving.answers import Answer
from clsnf.serving.catalogue import Entry
from clsnf.serving.errors import Unavailable, Unknown
from clsnf.serving.preprocess import check_sides
from clsnf.serving.request_body import body_before, read_body
from clsnf.serving.service import InspectionService
from clsnf.serving.settings import MiB
from clsnf.serving.tensors import INPUTS, OUTPUTS, Question, read_question, write_answer

_LENGTH = "Inference-Header-Content-Length"
_ERRORS = schemas.problems(400, 404, 408, 413, 415, 422, 429, 503, 504)


def open_inference_routes(service: InspectionService) -> APIRouter:
    """The routes below ``/v2``."""
    routes = APIRouter(prefix="/v2", tags=["open inference protocol"])
    limit = service.settings.max_megabytes * MiB

    def entry_of(category: str, version: str | None = None) -> Entry:
        entry = service.store.entry(category)
        if version is not None and version != entry.version:
            raise Unknown(
                f"{category!r} has no version {version[:50]!r}: it serves {entry.version}.",
                {"versions": [entry.version]},
            )
        return entry

    @routes.get("")
    async def server() -> dict[str, Any]:
        """The server's name and extensions."""
        return {
            "name": "clsnf",
            "version": __version__,
            "extensions": ["binary_tensor_data", "model_repository"],
        }

    @routes.get("/health/live")
    async def live() -> dict[str, bool]:
        """The process answers."""
        return {"live": True}

    @routes.get("/health/ready", responses=schemas.problems(503))
    async def ready() -> dict[str, bool]:
        """Models can be asked."""
        if not service.ready:
            raise Unavailable("The server is closing.")
        return {"ready": True}

    @routes.post("/repository/index")
    async def repository() -> list[dict[str, str]]:
        """All models; those that are not loaded are on their first use."""
        entries = service.store.catalogue.entries
        return [
            {"name": c, "version": e.version, "state": "READY", "reason": ""}
            for c, e in sorted(entries.items())
        ]

    async def answer(request: Request, category: str, version: str | None) -> Response:
        deadline = asyncio.get_running_loop().time() + service.settings.deadline_s
        entry_of(category, version)
        with service.room():
            body = await body_before(deadline, read_body(request, limit))
            async with service.before(deadline):
                question: Question = await service.aside(
                    partial(read_question, body, request.headers.get(_LENGTH))
                )
                images: list[tuple[str, bytes | np.ndarray]] = []
                for index, image in enumerate(question.images):
                    if isinstance(image, np.ndarray):
                        check_sides(
                            (image.shape[0], image.shape[1]),
                            f"image {index}",
                            service.settings.max_megapixels,
                        )
                    images.append((f"image {index}", image))
                answers = await service.inspect(category, images, admitted=1)
                head = {"model_name": category, "model_version": answers[0].fields["version"]}
                if question.id is not None:
                    head["id"] = question.id
                content, length = await service.aside(
                    partial(write_answer, head, _tensors(answers), question.outputs)
                )
        if length is None:
            return Response(content, media_type="application/json")
        return Response(
            content, media_type="application/octet-stream", headers={_LENGTH: str(length)}
        )

    @routes.get("/models/{category}", responses=schemas.problems(404))
    async def metadata(category: str) -> Response:
        """A model's inputs and outputs."""
        return JSONResponse(_metadata(entry_of(category)))

    @routes.get("/models/{category}/versions/{version}", responses=schemas.problems(404))
    async def metadata_version(category: str, version: str) -> Response:
        """The same, of the version that is served."""
        return JSONResponse(_metadata(entry_of(category, version)))

    @routes.get("/models/{category}/ready", responses=schemas.problems(404))
    async def model_ready(category: str) -> dict[str, Any]:
        """The model can be asked; it is loaded on its first use."""
        return {"name": category, "ready": bool(entry_of(category))}

    @routes.get("/models/{category}/versions/{version}/ready", responses=schemas.problems(404))
    async def model_version_ready(category: str, version: str) -> dict[str, Any]:
        """The same, of the version that is served."""
        return {"name": category, "ready": bool(entry_of(category, version))}

    @routes.post("/models/{category}/infer", responses=_ERRORS, openapi_extra=schemas.INFER_BODY)
    async def infer(request: Request, category: str) -> Response:
        """Inspect images: JSON, or JSON followed by binary tensors."""
        return await answer(request, category, None)

    @routes.post(
        "/models/{category}/versions/{version}/infer",
        responses=_ERRORS,
        openapi_extra=schemas.INFER_BODY,
    )
    async def infer_version(request: Request, category: str, version: str) -> Response:
        """The same, of the version that is served."""
        return await answer(request, category, version)

    return routes


def _metadata(entry: Entry) -> dict[str, Any]:
    height, width = entry.image_size
    shapes = {"map": [-1, height, width]}
    outputs = [
        {"name": name, "datatype": kind, "shape": shapes.get(name, [-1])}
        for name, kind in OUTPUTS.items()
    ]
    return {
        "name": entry.category,
        "versions": [entry.version],
        "platform": "clsnf",
        "inputs": INPUTS,
        "outputs": outputs,
    }


def _tensors(answers: list[Answer]) -> dict[str, np.ndarray]:
    """Outputs for N images: (N,) each, the map (N, H, W)."""
    fields = [a.fields for a in answers]
    return {
        "score": np.array([f["score"] for f in fields]),
        "threshold": np.array([f["threshold"] for f in fields]),
        "verdict": np.array([f["verdict"] == "defect" for f in fields]),
        "p_value": np.array([f["p_value"] for f in fields]),
        "map": np.stack([a.seen.canvas_map for a in answers]),
    }
