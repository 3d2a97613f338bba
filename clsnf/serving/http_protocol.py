"""HTTP connections within limits, so that no client costs the others their answers.

uvicorn parses and writes HTTP. It bounds neither the bytes of a header, nor the time until a header
is there, nor the connections of a client, nor the time that an answer waits for a client that does
not read. :class:`BoundedConnection` adds that. Bodies are bounded where they are read
(:mod:`clsnf.serving.request_body`), because only a route knows how much it may take; a connection
takes in no more of a body than the route has asked for.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections import Counter
from dataclasses import dataclass
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

KiB = 2**10
_CLOSING_S = 1.0


@dataclass(frozen=True)
class ConnectionLimits:
    """What the connections of a server may cost; times in seconds.

    Attributes:
        connections: open at once.
        per_client: open at once from one address; 0 for no limit, as behind a proxy.
        header_bytes: of a request's line and headers.
        header_s: from a connection's start, or from the first byte of its next request, until the
            headers are whole.
        idle_s: between two requests.
        stalled_s: without progress of an answer that the client does not read.
        leftover_s, leftover_bytes: of a body that is read and dropped after its request was
            answered (refused, mostly), so that the client sees the answer.
        framing_bytes: of a chunked body beyond its content, for each body, beside
            `framing_ratio` times its content.
    """

    connections: int = 1000
    per_client: int = 100
    header_bytes: int = 64 * KiB
    header_s: float = 10.0
    idle_s: float = 75.0
    stalled_s: float = 20.0
    leftover_s: float = 5.0
    leftover_bytes: int = 16 * KiB * KiB
    framing_bytes: int = 64 * KiB
    framing_ratio: int = 8


class Connections:
    """The open connections of one server, and their limits."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self.limits = limits
        self.draining = False
        self._open: set[BoundedConnection] = set()
        self._by_client: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._open)

    def add(self, connection: BoundedConnection) -> str | None:
        """Count a new connection; the reason where there is no place for it."""
        limits, client = self.limits, connection.client_address
        self._open.add(connection)
        self._by_client[client] += 1
        if 0 < limits.per_client < self._by_client[client]:
            return (
                f"{limits.per_client} connections are open from this address, and no more may be: "
                "use one connection for many requests."
            )
        if len(self._open) > limits.connections:
            return f"{limits.connections} connections are open, and no more may be: come again."
        return None

    def remove(self, connection: BoundedConnection) -> None:
        if connection in self._open:
            self._open.remove(connection)
            client = connection.client_address
            self._by_client[client] -= 1
            if self._by_client[client] <= 0:
                del self._by_client[client]

    def check_times(self) -> None:
        """End the connections that have taken too long; to be called about once a second."""
        now = asyncio.get_running_loop().time()
        for connection in list(self._open):
            connection.check_time(now)

    def close_idle(self) -> None:
        """Close the connections that have no request under way."""
        for connection in list(self._open):
            connection.close_if_idle()

    def abort(self) -> None:
        """Cut all connections."""
        for connection in list(self._open):
            connection.transport.abort()


class BoundedConnection(HttpToolsProtocol):
    """One connection; uvicorn makes it with `config`, `server_state` and so on."""

    def __init__(
        self,
        connections: Connections,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._all, self._limits = connections, connections.limits
        self._in_head = True  # the headers of a request are not whole
        self._head_since: float | None = None  # None between two requests
        self._head_bytes = 0
        self._received = self._content = 0  # bytes of the body with and without its framing
        self._silent = 0  # bytes since the body's last content: trailers, chunk extensions
        self._leftover_since: float | None = None  # answered, while its body still arrives
        self._leftover = 0
        self._unread, self._unread_since = 0, 0.0  # bytes of answers that the client has not read
        self._closing_since: float | None = None
        self._refused = False

    @property
    def client_address(self) -> str:
        """The client's address without its port; empty where it is not known."""
        return self.client[0] if self.client else ""

    # ---- the life of a connection ----

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_since = self.loop.time()
        reason = self._all.add(self)
        if reason is not None:
            self._refuse(503, reason)

    def connection_lost(self, exc: Exception | None) -> None:
        self._all.remove(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        in_head = self._in_head
        if in_head:
            self._head_since = self._head_since or self.loop.time()
            self._head_bytes += len(data)
        elif self._leftover_since is not None:
            self._leftover += len(data)
        else:
            self._received += len(data)
            self._silent += len(data)
        super().data_received(data)
        limits = self._limits
        if self._refused or self.transport.is_closing():
            return
        if in_head and self._in_head and self._head_bytes > limits.header_bytes:
            self._refuse(431, f"The headers have more than {limits.header_bytes} bytes.")
        elif self._leftover > limits.leftover_bytes:
            self.transport.abort()
        elif self._silent > limits.header_bytes:
            self._refuse(431, f"The body's trailers have more than {limits.header_bytes} bytes.")
        elif self._received > limits.framing_bytes + (1 + limits.framing_ratio) * self._content:
            self._refuse(400, "The body's chunks hold next to nothing: send larger ones.")

    # ---- the parser's calls ----

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._received = self._content = self._silent = 0

    def on_headers_complete(self) -> None:
        self._in_head, self._head_since, self._head_bytes = False, None, 0
        super().on_headers_complete()
        if self._all.draining:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        self._content += len(body)
        self._silent = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_head, self._leftover_since, self._leftover = True, None, 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._in_head and not self.pipeline and not self.transport.is_closing():
            # Closing now would take the answer away from a client that still sends.
            self._leftover_since = self.loop.time()

    # ---- refusing and ending ----

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn for what is no HTTP."""
        self._refuse(400, msg)

    def _refuse(self, status: int, reason: str) -> None:
        """Answer that the request or connection is refused, and close."""
        self._refused = True
        cycle = self.cycle
        if cycle is not None and cycle.response_started and not cycle.response_complete:
            self.transport.abort()  # half an answer can't become another one
            return
        content = json.dumps({"error": reason}).encode()
        headers = (
            f"content-type: application/json\r\ncontent-length: {len(content)}\r\n"
            "connection: close\r\n"
        )
        if status == 503:
            headers += "retry-after: 1\r\n"
        self.transport.write(b"".join((STATUS_LINE[status], headers.encode(), b"\r\n", content)))
        self.transport.close()

    def _reset(self) -> None:
        """Cut the connection, and drop what the system would still send."""
        connected = self.transport.get_extra_info("socket")
        if connected is not None:
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def check_time(self, now: float) -> None:
        """End the connection if something has taken too long."""
        limits = self._limits
        unread = self.transport.get_write_buffer_size()
        if self._unread == 0 or unread < self._unread:
            self._unread_since = now
        self._unread = unread
        leftover = self._leftover_since
        if self.transport.is_closing():
            self._closing_since = self._closing_since or now
        if self._closing_since and now - self._closing_since > _CLOSING_S and not unread:
            self.transport.abort()  # over TLS, closing waits for a client that may never answer
        elif unread and now - self._unread_since > limits.stalled_s:
            self._reset()
        elif leftover is not None and now - leftover > limits.leftover_s:
            self.transport.abort()
        elif self._head_since is not None and now - self._head_since > limits.header_s:
            if self._head_bytes and not self._refused:
                self._refuse(408, f"The headers were not there within {limits.header_s:g} s.")
            else:
                self.transport.close()

    def close_if_idle(self) -> None:
        """Close the connection unless a request is under way."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive = False
        elif not self._head_bytes:
            self.transport.close()
