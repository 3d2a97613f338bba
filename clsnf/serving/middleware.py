"""Counts and times the requests that ask a model, by category, endpoint and status.

A route is measured by the name that it is registered with, not by the name of its handler function.
"""

from __future__ import annotations

import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clsnf.serving.metrics import UNKNOWN_CATEGORY
from clsnf.serving.service import InspectionService

# Names of routes, for `name=` where they are registered.
INSPECT, INFER, INFER_VERSION = "inspect", "infer", "infer_version"
DETECT = "detect_anomalies"
# The metrics' label "endpoint" of each measured route.
_ENDPOINTS = {INSPECT: "inspect", INFER: "infer", INFER_VERSION: "infer", DETECT: DETECT}


class RequestMetrics:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, service: InspectionService) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, started = 500, time.perf_counter()

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        finally:
            endpoint = _ENDPOINTS.get(getattr(scope.get("route"), "name", ""))
            if endpoint is not None:
                self._record(scope, endpoint, status, time.perf_counter() - started)

    def _record(self, scope: Scope, endpoint: str, status: int, seconds: float) -> None:
        asked, catalogue = (
            scope.get("path_params", {}).get("category"),
            self._service.store.catalogue,
        )
        known = asked in catalogue.entries or asked in catalogue.refused
        category = asked if known else UNKNOWN_CATEGORY
        record = self._service.metrics.record
        record("clsnf_requests_total", 1, category, endpoint, str(status))
        record("clsnf_request_seconds", seconds, category, endpoint)
