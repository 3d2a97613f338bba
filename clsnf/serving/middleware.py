"""Counts and times requests that ask a model something, by category, endpoint and status."""

from __future__ import annotations

import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clsnf.serving.metrics import OTHER
from clsnf.serving.service import InspectionService

_MEASURED = {
    "inspect": "inspect",
    "infer": "infer",
    "infer_version": "infer",
}  # endpoint functions to names


class Measured:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, service: InspectionService) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, started = 500, time.perf_counter()

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            endpoint = _MEASURED.get(getattr(scope.get("endpoint"), "__name__", ""))
            if endpoint is not None:
                asked = scope.get("path_params", {}).get("category")
                category = asked if asked in self._service.store.catalogue.entries else OTHER
                self._service.meters.record(
                    "clsnf_requests_total", 1, category, endpoint, str(status)
                )
                self._service.meters.record(
                    "clsnf_request_seconds", time.perf_counter() - started, category, endpoint
                )
