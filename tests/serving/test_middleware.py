"""Metrics of requests: which requests count, under which labels."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.testclient import TestClient

from clsnf.serving.ports import Ports
from clsnf.serving.service import InspectionService
from tests.support.small_server import encoded, picture, small_settings

COUNTED = re.compile(
    r'clsnf_requests_total\{category="(.+)",endpoint="(.+)",replica="0",status="(.+)"\} (.+)'
)
FILES = {"inputs": [{"name": "files", "datatype": "BYTES", "shape": [1], "data": ["x"]}]}


@pytest.fixture
def app(winners: Path, tmp_path: Path) -> FastAPI:
    return Ports(InspectionService(small_settings(winners, state=str(tmp_path)))).app


def ask_everything(app: FastAPI) -> dict[tuple[str, str, str], float]:
    """Requests by category, endpoint and status, after one of each kind."""
    with TestClient(app) as client:
        version = client.get("/v2/models/plate").json()["versions"][0]
        client.post("/v1/models/plate/inspect", content=encoded(picture()))
        client.post("/v1/models/plate/inspect", content=b"no image")
        client.post("/v1/models/nothing/inspect", content=b"")
        client.get("/v1/models/plate/inspect")
        client.post("/v2/models/plate/infer", json=FILES)
        client.post(f"/v2/models/plate/versions/{version}/infer", json=FILES)
        text = client.get("/metrics").text
    return {(c, e, s): float(count) for c, e, s, count in COUNTED.findall(text)}


EXPECTED = {
    ("plate", "inspect", "200"): 1,
    ("plate", "inspect", "400"): 1,
    ("plate", "inspect", "405"): 1,
    ("-", "inspect", "404"): 1,
    ("plate", "infer", "400"): 2,
}


def test_requests_to_a_model_are_counted_by_category_endpoint_and_status(app: FastAPI) -> None:
    assert ask_everything(app) == EXPECTED


def test_renaming_a_handler_function_loses_no_metrics(app: FastAPI) -> None:
    def rename(routes: list[object]) -> int:
        count = 0
        for route in routes:
            if isinstance(route, APIRoute):
                route.endpoint.__name__ = f"renamed_{count}"
                count += 1
            else:
                count += rename(getattr(getattr(route, "original_router", None), "routes", []))
        return count

    assert rename(list(app.routes)) > 15
    assert ask_everything(app) == EXPECTED
