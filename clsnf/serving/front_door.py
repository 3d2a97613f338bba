"""Which requests come in at all, by their headers: hosts, origins, methods; ASGI middleware.

A browser sends requests for whatever page is open in it. So it could carry a foreign page's
requests past a firewall: to this server's address (the page's ``Origin`` tells), or to a name of
the page's own that it lets point at this server (DNS rebinding; the name in ``Host`` tells).
Programs send no ``Origin``, and nothing changes for them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.routing import BaseRoute, Match, Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clsnf.serving.errors import UnsupportedMediaType
from clsnf.serving.hosts import (
    is_known_host,
    is_same_host,
    listed_hosts,
    listed_origins,
    own_hosts,
)
from clsnf.serving.schemas import Problem
from clsnf.serving.settings import ServingSettings

# Load balancers and Prometheus ask for these under any name. They say nothing about pictures.
_OPEN_PATHS = {"/healthz", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready"}
_READING = ("GET", "HEAD", "OPTIONS")
# An answer loads nothing and stands in no other page's frame; the pages say what they load.
_POLICY = "default-src 'none'; frame-ancestors 'none'"
# Both say nothing about the body: the second one is curl's default.
_UNSPECIFIED = ("", "application/x-www-form-urlencoded")


class FrontDoor:
    """Refuses foreign hosts and origins, answers HEAD and OPTIONS, and adds security headers.

    Args:
        app: what is asked after that.
        routes: whose methods OPTIONS answers with.
        settings: their ``allowed_hosts`` and ``allowed_origins`` count.
    """

    def __init__(
        self, app: ASGIApp, routes: Sequence[BaseRoute], settings: ServingSettings
    ) -> None:
        self._app, self._routes = app, routes
        self._hosts = listed_hosts(settings.allowed_hosts) | own_hosts()
        self._origins = listed_origins(settings.allowed_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        method, send = scope["method"], _with_headers(send)
        refusal = self._refusal(scope["path"], method, Headers(scope=scope))
        if refusal is not None:
            await refusal(scope, receive, send)
        elif method == "OPTIONS" and (methods := methods_of(self._routes, scope)):
            allowed = Response(status_code=204, headers={"Allow": ", ".join(methods)})
            await allowed(scope, receive, send)
        elif method == "HEAD":
            await self._app(dict(scope) | {"method": "GET"}, receive, _without_body(send))
        else:
            await self._app(scope, receive, send)

    def _refusal(self, path: str, method: str, headers: Headers) -> Response | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if host and path not in _OPEN_PATHS and not is_known_host(host, self._hosts):
            return _refuse(
                421,
                f"This server does not know itself as {host[:100]!r}: ask it by its address, or "
                "name the host in the setting allowed_hosts.",
            )
        if origin is None or method in _READING or origin.lower() in self._origins:
            return None
        if is_same_host(origin, host):
            return None
        return _refuse(
            403,
            f"A page of {origin[:100]!r} may not send requests to this server: name that origin "
            "in the setting allowed_origins.",
        )


def _refuse(status: int, reason: str) -> Response:
    return JSONResponse(Problem(error=reason).model_dump(), status)


def methods_of(routes: Sequence[BaseRoute], scope: Scope) -> list[str]:
    """The methods that a path has in all its routes, such as GET, HEAD, OPTIONS; else none."""

    def found(method: str) -> bool:
        asked = dict(scope) | {"method": method}
        matched = (route for route in routes if route.matches(asked)[0] is Match.FULL)
        # A folder of static files matches every method, and has GET alone.
        return any(method == "GET" or not isinstance(route, Mount) for route in matched)

    methods = [method for method in ("DELETE", "GET", "POST", "PUT") if found(method)]
    if not methods:
        return []
    return sorted({*methods, "OPTIONS"} | ({"HEAD"} if "GET" in methods else set()))


def only(*kinds: str) -> Callable[[Request], Awaitable[None]]:
    """A dependency that refuses bodies of other media types than `kinds`.

    A foreign page can send text/plain or no type at all without asking first. Programs may leave
    the type out.
    """

    async def check(request: Request) -> None:
        named = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if named in kinds or (named in _UNSPECIFIED and "origin" not in request.headers):
            return
        raise UnsupportedMediaType(
            f"A body of type {named[:100]!r} is not read here: send {' or '.join(kinds)}."
        )

    return check


# ---- headers and bodies ----


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers.setdefault("X-Content-Type-Options", "nosniff")
            headers.setdefault("Content-Security-Policy", _POLICY)
        await send(message)

    return sending


def _without_body(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.body":
            message = dict(message) | {"body": b""}
        await send(message)

    return sending
