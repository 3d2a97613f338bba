"""The Open Inference Protocol (KServe v2) over gRPC: health, metadata, inference.

For clients such as ``tritonclient[grpc]``. Inputs, outputs and limits are those of HTTP
(:mod:`clsnf.serving.routes_v2`), and a refusal has the same line.

ModelInfer is a call with one message each way. Here it is handled as one that streams its request,
which looks the same on the wire: so the token and a place in the queue come before the message is
received.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc

from clsnf import __version__
from clsnf.core.errors import SettingsError
from clsnf.serving.errors import BadRequest, NotFound, RequestError
from clsnf.serving.grpc_messages import SERVICE, message_class, parsed, read_call, write_call
from clsnf.serving.metrics import UNKNOWN_CATEGORY
from clsnf.serving.open_inference import (
    INPUT_SHAPES,
    named_images,
    output_arrays,
    output_shapes,
    served_entry,
)
from clsnf.serving.request_body import read_before
from clsnf.serving.service import InspectionService
from clsnf.serving.settings import MiB
from clsnf.serving.tensors import INPUTS, OUTPUTS, InferResponse

Authorize = Callable[[str | None], None]
"""Checks the token that a call gives (None where it gives none). Raises Unauthorized, Forbidden."""

log = logging.getLogger("clsnf.serving")

_BUG = "This is a bug in clsnf; the server's log has the details."
_GIVEN_UP = 499  # the status in the metrics of a call that its client ended
_MAX_CALLS = 1000  # at a time, with those of health
_SMALL = 64 * 1024  # bytes of any message but ModelInfer's
_FRAME = 64 * 1024  # bytes around the tensors of a request
_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    415: grpc.StatusCode.INVALID_ARGUMENT,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}


@dataclass(frozen=True)
class Tls:
    """Files in PEM: the certificate, with those that vouch for it, and its key."""

    certificate: Path
    key: Path


@dataclass(frozen=True)
class GrpcServer:
    """A server that answers.

    Attributes:
        port: its TCP port.
    """

    port: int
    _server: grpc.aio.Server

    async def stop(self, grace_s: float) -> None:
        """Take no more calls, and end those that take longer than this."""
        await self._server.stop(grace_s)


async def start_grpc(
    service: InspectionService,
    host: str,
    port: int,
    tls: Tls | None = None,
    authorize: Authorize | None = None,
) -> GrpcServer:
    """Serve a service over gRPC, in the running event loop, which must be the service's own.

    Args:
        service: answers.
        host: name or address to listen on.
        port: to listen on, beside other processes that do (SO_REUSEPORT); 0 for any.
        tls: None for plain text.
        authorize: checks the token of a call of ModelInfer; None to answer everybody.

    Raises:
        SettingsError: the port can't be opened, or the files of `tls` can't be read.
    """
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", service.settings.max_megabytes * MiB + _FRAME),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 1),
            # Peers that are gone, or say nothing.
            ("grpc.keepalive_time_ms", 60_000),
            ("grpc.keepalive_timeout_ms", 20_000),
            ("grpc.max_connection_idle_ms", 300_000),
        ],
        maximum_concurrent_rpcs=_MAX_CALLS,
    )
    server.add_generic_rpc_handlers((_handlers(service, authorize),))
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        if tls is None:
            bound = server.add_insecure_port(address)
        else:
            pair = tls.key.read_bytes(), tls.certificate.read_bytes()
            bound = server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
    except OSError as error:
        raise SettingsError(
            f"{error.filename} can't be read ({error.strerror}): give the TLS certificate and its "
            "key as PEM files."
        ) from error
    except RuntimeError as error:
        raise SettingsError(
            f"The gRPC address {address} can't be opened ({' '.join(str(error).split())[:200]}): "
            "is another server there, and is the address one of this machine?"
        ) from error
    await server.start()
    return GrpcServer(bound, server)


def _handlers(service: InspectionService, authorize: Authorize | None) -> grpc.GenericRpcHandler:
    small = _SmallCalls(service)
    methods: dict[str, Callable[[Any], Any]] = {
        "ServerLive": small.server_live,
        "ServerReady": small.server_ready,
        "ServerMetadata": small.server_metadata,
        "ModelReady": small.model_ready,
        "ModelMetadata": small.model_metadata,
        "RepositoryIndex": small.repository_index,
    }
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(_answering(name, method))
        for name, method in methods.items()
    }
    infer = _Inference(service, authorize)
    handlers["ModelInfer"] = grpc.stream_unary_rpc_method_handler(infer.call)
    return grpc.method_handlers_generic_handler(SERVICE, handlers)


async def _refuse(context: grpc.aio.ServicerContext[Any, Any], error: Exception) -> None:
    """End a call with what is wrong with it."""
    if not isinstance(error, RequestError):
        log.error("a gRPC call failed", exc_info=error)
        await context.abort(grpc.StatusCode.INTERNAL, _BUG)
        return
    trailing = tuple((name.lower(), value) for name, value in error.headers.items())
    await context.abort(_CODES[error.status], str(error), trailing)


# ---- health and metadata ----


def _answering(
    name: str, method: Callable[[Any], Any]
) -> Callable[[bytes, grpc.aio.ServicerContext[Any, Any]], Awaitable[bytes]]:
    """The handler of a call that takes and gives a small message."""

    async def answer(data: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
        try:
            if len(data) > _SMALL:
                raise BadRequest(f"A {name}Request has at most {_SMALL // 1024} KiB.")
            answered: bytes = method(parsed(f"{name}Request", data)).SerializeToString()
            return answered
        except Exception as error:
            await _refuse(context, error)
            raise

    return answer


class _SmallCalls:
    """Each takes the method's request and gives its response."""

    def __init__(self, service: InspectionService) -> None:
        self._service = service

    def server_live(self, request: Any) -> Any:
        return message_class("ServerLiveResponse")(live=True)

    def server_ready(self, request: Any) -> Any:
        return message_class("ServerReadyResponse")(ready=self._service.ready)

    def server_metadata(self, request: Any) -> Any:
        return message_class("ServerMetadataResponse")(
            name="clsnf", version=__version__, extensions=["model_repository"]
        )

    def model_ready(self, request: Any) -> Any:
        try:
            served_entry(self._service.store, request.name, request.version or None)
        except NotFound:
            return message_class("ModelReadyResponse")(ready=False)
        return message_class("ModelReadyResponse")(ready=True)

    def model_metadata(self, request: Any) -> Any:
        entry = served_entry(self._service.store, request.name, request.version or None)
        answer = message_class("ModelMetadataResponse")(
            name=entry.category, versions=[entry.version], platform="clsnf"
        )
        for name, datatype in INPUTS.items():
            answer.inputs.add(name=name, datatype=datatype, shape=INPUT_SHAPES[name])
        for name, shape in output_shapes(entry).items():
            answer.outputs.add(name=name, datatype=OUTPUTS[name], shape=shape)
        return answer

    def repository_index(self, request: Any) -> Any:
        answer = message_class("RepositoryIndexResponse")()
        for category, entry in sorted(self._service.store.catalogue.entries.items()):
            answer.models.add(name=category, version=entry.version, state="READY")
        return answer


# ---- inference ----


class _Inference:
    """ModelInfer."""

    def __init__(self, service: InspectionService, authorize: Authorize | None) -> None:
        self._service, self._authorize = service, authorize

    async def call(
        self, messages: AsyncIterator[bytes], context: grpc.aio.ServicerContext[Any, Any]
    ) -> bytes:
        """Answer a call, and count it."""
        started, outcome = time.perf_counter(), _Outcome()
        try:
            answer = await self._infer(messages, context, outcome)
            outcome.status = 200
            return answer
        except Exception as error:
            outcome.status = error.status if isinstance(error, RequestError) else 500
            await _refuse(context, error)
            raise
        finally:
            self._record(outcome, time.perf_counter() - started)

    async def _infer(
        self,
        messages: AsyncIterator[bytes],
        context: grpc.aio.ServicerContext[Any, Any],
        outcome: _Outcome,
    ) -> bytes:
        service = self._service
        deadline = asyncio.get_running_loop().time() + service.settings.deadline_s
        if self._authorize is not None:
            self._authorize(_bearer(context))
        with service.admit():
            data = await read_before(deadline, _only(messages))
            async with service.answer_before(deadline):
                call = await service.run_in_reader(partial(read_call, data))
                outcome.category = call.category
                served_entry(service.store, call.category, call.version)
                images = named_images(call.request.images, service.settings.max_megapixels)
                inspections = await service.inspect(call.category, images, admitted=1)
                response = InferResponse(
                    call.category,
                    inspections[0].answer.version,
                    call.request.id,
                    output_arrays(inspections),
                )
                return await service.run_in_reader(
                    partial(write_call, response, list(call.request.outputs))
                )

    def _record(self, outcome: _Outcome, seconds: float) -> None:
        known = outcome.category in self._service.store.catalogue.entries
        category = outcome.category if known else UNKNOWN_CATEGORY
        record = self._service.metrics.record
        record("clsnf_requests_total", 1, category, "grpc", str(outcome.status))
        record("clsnf_request_seconds", seconds, category, "grpc")


@dataclass
class _Outcome:
    """What the metrics say of a call."""

    category: str = UNKNOWN_CATEGORY
    status: int = _GIVEN_UP


async def _only(messages: AsyncIterator[bytes]) -> bytes:
    """The call's message."""
    async for message in messages:
        return message
    raise BadRequest("The call has no message, or one that is too large.")


def _bearer(context: grpc.aio.ServicerContext[Any, Any]) -> str | None:
    """The token in the metadata ``authorization: Bearer TOKEN``."""
    for name, value in context.invocation_metadata() or ():
        if name == "authorization":
            scheme, _, token = str(value).partition(" ")
            if scheme.lower() == "bearer":
                return token.strip()
    return None
