"""An ASGI app on a listening socket, with bounded connections; part of any event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
import sys
import time
from email.utils import formatdate
from functools import partial
from typing import Any

from starlette.types import ASGIApp
from uvicorn.config import Config
from uvicorn.server import ServerState

from clsnf.serving.http_protocol import BoundedConnection, ConnectionLimits, Connections
from clsnf.serving.settings import ServingSettings

_TICK_S = 1.0
_POLL_S = 0.05
# A client may just be sending on a connection that looks idle: it gets its answer, and then the
# connection's end.
_IDLE_GRACE_S = 0.5
_BACKLOG = 2048


def connection_limits(settings: ServingSettings) -> ConnectionLimits:
    """The limits that a server's settings name."""
    return ConnectionLimits(
        connections=settings.connections,
        per_client=settings.connections_per_client,
        idle_s=settings.idle_s,
    )


class HttpServer:
    """Serves an app in the running event loop until :meth:`drain`.

    Args:
        app: runs its lifespan elsewhere.
        limits: of its connections.
    """

    def __init__(self, app: ASGIApp, limits: ConnectionLimits) -> None:
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # clients' errors, mostly
        self._connections = Connections(limits)
        self._config = Config(
            app,
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            timeout_keep_alive=int(limits.idle_s),
            server_header=False,
        )
        self._state = ServerState()
        self._listeners: list[asyncio.AbstractServer] = []
        self._ticking: asyncio.Task[None] | None = None

    async def start(self, listening: socket.socket, tls: ssl.SSLContext | None = None) -> None:
        """Accept connections on a bound socket, which is closed with the server."""
        _raise_file_limit(2 * self._connections.limits.connections)
        self._config.load()
        loop = asyncio.get_running_loop()
        self._set_date()
        make = partial(BoundedConnection, self._connections, self._config, self._state, {}, loop)
        handshake = None if tls is None else self._connections.limits.header_s
        of_unix = listening.family == getattr(socket, "AF_UNIX", None)
        create: Any = loop.create_unix_server if of_unix else loop.create_server
        self._listeners.append(
            await create(
                make,
                sock=listening,
                ssl=tls,
                backlog=_BACKLOG,
                ssl_handshake_timeout=handshake,
            )
        )
        self._ticking = self._ticking or asyncio.create_task(self._tick())

    async def drain(self, seconds: float) -> None:
        """Accept nothing more, answer what is under way, and close.

        Connections that wait to be accepted stay for the other holders of the socket, if any.

        Args:
            seconds: after which connections that still have a request under way are cut.
        """
        until = time.monotonic() + seconds
        self._connections.draining = True
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        grace = time.monotonic() + min(_IDLE_GRACE_S, seconds)
        while len(self._connections) and time.monotonic() < until:
            if time.monotonic() >= grace:
                self._connections.close_idle()
            await asyncio.sleep(_POLL_S)
        self._connections.abort()
        if self._ticking is not None:
            self._ticking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._ticking
            self._ticking = None

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            self._set_date()
            self._connections.check_times()

    def _set_date(self) -> None:
        self._state.default_headers = [(b"date", formatdate(time.time(), usegmt=True).encode())]


def _raise_file_limit(files: int) -> None:
    """Let this process open so many more files, as far as the system allows it."""
    if sys.platform == "win32":  # has no such limit
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = files + 1024
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
