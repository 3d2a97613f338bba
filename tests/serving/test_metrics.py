"""Meters never fail a request, whatever they are given."""

from __future__ import annotations

from pathlib import Path

import pytest
from starlette.testclient import TestClient

from clsnf.serving.metrics import ServerMetrics
from clsnf.serving.ports import Ports
from clsnf.serving.ray_metrics import RaySink
from clsnf.serving.service import InspectionService
from tests.support.small_server import encoded, picture, small_settings


class BrokenSink:
    """Fails at everything."""

    def record(self, name: str, value: float, labels: tuple[str, ...]) -> None:
        raise UnicodeEncodeError("ascii", "ö", 0, 1, "no such character")

    def clear(self, name: str) -> None:
        raise RuntimeError("lost")


def test_a_failing_meter_is_counted_and_said_once_and_no_request_fails(
    winners: Path, caplog: pytest.LogCaptureFixture
) -> None:
    service = InspectionService(small_settings(winners), ServerMetrics("0", BrokenSink))
    with TestClient(Ports(service).app) as client:
        for seed in range(2):
            answer = client.post("/v1/models/plate/inspect", content=encoded(picture(seed)))
            assert answer.status_code == 200
        shown = client.get("/metrics").text
    assert 'clsnf_metric_errors_total{metric="clsnf_score",replica="0"} 2.0' in shown
    assert 'clsnf_verdicts_total{category="plate"' in shown, "the other sinks go on"
    said = [r.getMessage() for r in caplog.records if "clsnf_score" in r.getMessage()]
    assert len(said) == 1


def test_a_sink_that_cannot_be_made_ends_no_server(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> BrokenSink:
        raise OSError("no agent")

    metrics = ServerMetrics("0", fail)
    metrics.record("clsnf_waiting_images", 1)
    assert b"clsnf_waiting_images" in metrics.text()
    assert "no agent" in caplog.text


@pytest.mark.parametrize("name", ["Größe-π", "a b", "q\"uo'te\\", "new\nline", "50%", "🔩", ""])
def test_ray_takes_every_name(name: str) -> None:
    sink = RaySink()
    sink.record("clsnf_verdicts_total", 1, (name, "good"))
    sink.record("clsnf_score", 0.5, (name,))
    sink.record("clsnf_drift", 0.5, (name, "brightness"))
