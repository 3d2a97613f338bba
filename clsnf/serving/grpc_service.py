"""The Open Inference Protocol (KServe v2) over gRPC: health, metadata, inference.

For clients such as ``tritonclient[grpc]``. Inputs, outputs and limits are those of HTTP
(:mod:`clsnf.serving.routes_v2`), and a refusal has the same line.

ModelInfer is a call with one message each way. Here it is handled as one that streams its request,
which looks the same on the wire: so the token comes before the message is received, and how many
are received at a time is bounded. The size of a message is known when it is whole. Then it counts
in the budget of bodies, and takes places in the queue.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from clsnf import __version__
from clsnf.core.errors import SettingsError
from clsnf.serving.errors import (
    BadRequest,
    GatewayTimeout,
    NotFound,
    RequestError,
    RequestTimeout,
    ServiceUnavailable,
    TooManyRequests,
)
from clsnf.serving.grpc_messages import (
    SERVICE,
    GrpcInferBody,
    asked_model,
    message_class,
    parsed,
    written_response,
)
from clsnf.serving.metrics import UNKNOWN_CATEGORY
from clsnf.serving.open_inference import INPUT_SHAPES, output_shapes, response_of, served_entry
from clsnf.serving.reading import RequestBody
from clsnf.serving.reading_tasks import Encoded
from clsnf.serving.service import InspectionService, MapWish
from clsnf.serving.settings import MiB
from clsnf.serving.tensors import INPUTS, OUTPUTS

Authorize = Callable[[str | None], None]
"""Checks the token that a call gives (None where it gives none). Raises Unauthorized, Forbidden."""

_SmallCall = Callable[[Any], Awaitable[Any]]

log = logging.getLogger("clsnf.serving")

_BUG = "This is a bug in clsnf; the server's log has the details."
_RECEIVING = 32  # messages at a time, half of them from one client
_RECEIVE_S = 15.0  # for a message
_RETRY = 1  # seconds
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
        authorize: checks the token of a call about models; None to answer everybody.

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
    open_to_all: dict[str, _SmallCall] = {
        "ServerLive": small.server_live,
        "ServerReady": small.server_ready,
        "ServerMetadata": small.server_metadata,
    }
    about_models: dict[str, _SmallCall] = {
        "ModelReady": small.model_ready,
        "ModelMetadata": small.model_metadata,
        "RepositoryIndex": small.repository_index,
    }
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(_answering(name, method, check))
        for methods, check in ((open_to_all, None), (about_models, authorize))
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
    name: str, method: _SmallCall, authorize: Authorize | None
) -> Callable[[bytes, grpc.aio.ServicerContext[Any, Any]], Awaitable[bytes]]:
    """The handler of a call that takes and gives a small message."""

    async def answer(data: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
        try:
            if authorize is not None:
                authorize(_bearer(context))
            if len(data) > _SMALL:
                raise BadRequest(f"A {name}Request has at most {_SMALL // 1024} KiB.")
            answer = await method(parsed(f"{name}Request", data))
            return bytes(answer.SerializeToString())
        except Exception as error:
            await _refuse(context, error)
            raise

    return answer


class _SmallCalls:
    """Each takes the method's request and gives its response."""

    def __init__(self, service: InspectionService) -> None:
        self._service = service

    async def server_live(self, request: Any) -> Any:
        return message_class("ServerLiveResponse")(live=True)

    async def server_ready(self, request: Any) -> Any:
        try:
            self._service.check_ready()
        except ServiceUnavailable:
            return message_class("ServerReadyResponse")(ready=False)
        return message_class("ServerReadyResponse")(ready=True)

    async def server_metadata(self, request: Any) -> Any:
        return message_class("ServerMetadataResponse")(
            name="clsnf", version=__version__, extensions=["model_repository"]
        )

    async def model_ready(self, request: Any) -> Any:
        try:
            served_entry(self._service.store, request.name, request.version or None)
            deadline = asyncio.get_running_loop().time() + self._service.settings.deadline_s
            async with self._service.answer_before(deadline):
                await self._service.check_answers(request.name)
        except (NotFound, ServiceUnavailable, GatewayTimeout):
            return message_class("ModelReadyResponse")(ready=False)
        return message_class("ModelReadyResponse")(ready=True)

    async def model_metadata(self, request: Any) -> Any:
        entry = served_entry(self._service.store, request.name, request.version or None)
        answer = message_class("ModelMetadataResponse")(
            name=entry.category, versions=[entry.version], platform="clsnf"
        )
        for name, datatype in INPUTS.items():
            answer.inputs.add(name=name, datatype=datatype, shape=INPUT_SHAPES[name])
        for name, shape in output_shapes(entry).items():
            answer.outputs.add(name=name, datatype=OUTPUTS[name], shape=shape)
        return answer

    async def repository_index(self, request: Any) -> Any:
        answer = message_class("RepositoryIndexResponse")()
        for category, entry in sorted(self._service.store.catalogue.entries.items()):
            answer.models.add(name=category, version=entry.version, state="READY")
        return answer


# ---- inference ----


class _Inference:
    """ModelInfer."""

    def __init__(self, service: InspectionService, authorize: Authorize | None) -> None:
        self._service, self._authorize = service, authorize
        self._receiving: Counter[str] = Counter()  # by client

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
        service, settings = self._service, self._service.settings
        deadline = asyncio.get_running_loop().time() + settings.deadline_s
        if self._authorize is not None:
            self._authorize(_bearer(context))
        client = context.peer().rpartition(":")[0]
        async with AsyncExitStack() as held:
            holding = held.enter_context(service.bodies.hold(client))
            data = await self._received(messages, client, deadline)
            holding.add(len(data))
            category, version = asked_model(data)
            outcome.category = category
            served_entry(service.store, category, version)
            async with service.answer_before(deadline):
                form = GrpcInferBody(settings.images_per_request)
                body = RequestBody(Encoded(form, "", len(data)), data)
                inspections, head = await service.inspect_body(category, body, MapWish(), held)
            assert head is not None
            return written_response(response_of(category, inspections, head.id), list(head.outputs))

    async def _received(
        self, messages: AsyncIterator[bytes], client: str, deadline: float
    ) -> bytes:
        """The call's message.

        Raises:
            TooManyRequests: too many are received already.
            RequestTimeout: it did not come in time.
        """
        if self._receiving.total() >= _RECEIVING or 2 * self._receiving[client] >= _RECEIVING:
            raise TooManyRequests(
                f"{self._receiving.total()} messages are under way: come again.", _RETRY
            )
        self._receiving[client] += 1
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout_at(min(deadline, loop.time() + _RECEIVE_S)):
                return await _only(messages)
        except TimeoutError as error:
            raise RequestTimeout(
                f"The message was not there within {_RECEIVE_S:g} s: is the network slow?"
            ) from error
        finally:
            self._receiving[client] -= 1
            if not self._receiving[client]:
                del self._receiving[client]

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
