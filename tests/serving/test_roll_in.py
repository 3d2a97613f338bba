"""What clients see of models that roll in, or are refused."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from clsnf.detector import Detector
from clsnf.serving.ports import Ports
from clsnf.serving.service import InspectionService
from tests.support.small_server import encoded, picture, small_settings


@pytest.fixture
def models(winners: Path, tmp_path: Path) -> Path:
    shutil.copytree(winners, tmp_path / "models" / "winners")
    return tmp_path / "models" / "winners"


@pytest.fixture
def service(models: Path) -> InspectionService:
    return InspectionService(small_settings(models))


@pytest.fixture
def client(service: InspectionService) -> Iterator[TestClient]:
    with TestClient(Ports(service).app) as client:
        yield client


def flip_a_byte(model: Path) -> None:
    tensors = model / "detector.safetensors"
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)


def states(client: TestClient) -> dict[str, str]:
    index = client.post("/v2/repository/index").json()
    return {model["name"]: model["state"] for model in index}


def test_a_refused_model_is_listed_with_its_cause_and_its_version_of_before_answers(
    client: TestClient, service: InspectionService, models: Path, winners: Path
) -> None:
    version = client.get("/v1/models/plate").json()["version"]
    for category in ("plate", "sheet"):
        better = Detector.load(models / category, device="cpu")
        better.calibrate(false_reject_rate=0.4)
        better.save(models / category)
    flip_a_byte(models / "plate")
    (models / "notes").mkdir()
    asyncio.run(service.roll(models))
    listed = client.get("/v1/models").json()
    assert listed["left_out"] == {"notes": "holds no saved detector"}
    (refusal,) = listed["refusals"]
    assert refusal | {"cause": ""} == {"category": "plate", "cause": "", "serves": version}
    assert "checksum" in refusal["cause"]
    assert listed["refused"] == f"plate: {refusal['cause']}"
    plate, sheet = listed["models"]
    assert (plate["refused"], sheet["refused"]) == (refusal["cause"], None)
    assert client.get("/v1/models/plate").json()["refused"] == refusal["cause"]
    assert "clsnf_models_refused{" in client.get("/metrics").text
    assert 'clsnf_models_refused{replica="0"} 1.0' in client.get("/metrics").text
    answer = client.post("/v1/models/plate/inspect", content=encoded(picture()))
    assert (answer.status_code, answer.json()["version"]) == (200, version)
    answer = client.post("/v1/models/sheet/inspect", content=encoded(picture()))
    assert answer.json()["version"] == sheet["version"]
    asyncio.run(service.roll(winners))
    assert client.get("/v1/models").json()["refused"] is None
    assert 'clsnf_models_refused{replica="0"} 0.0' in client.get("/metrics").text


def test_a_model_that_is_broken_at_the_start_says_its_cause_and_the_others_answer(
    models: Path,
) -> None:
    flip_a_byte(models / "plate")
    service = InspectionService(small_settings(models))
    with TestClient(Ports(service).app) as client:
        body = encoded(picture())
        for answer in (
            client.post("/v1/models/plate/inspect", content=body),
            client.get("/v1/models/plate"),
            client.get("/v2/models/plate"),
            client.get("/v2/models/plate/ready"),
        ):
            assert answer.status_code == 503
            assert "checksum" in answer.json()["error"]
        assert states(client) == {"plate": "UNAVAILABLE", "sheet": "READY"}
        assert client.get("/readyz").status_code == 200
        assert client.post("/v1/models/sheet/inspect", content=body).status_code == 200
        shown = client.get("/metrics").text
        assert 'category="plate",endpoint="inspect",replica="0",status="503"' in shown


def test_ready_means_that_the_model_has_answered(client: TestClient, models: Path) -> None:
    assert client.get("/v2/models/plate/ready").json() == {"name": "plate", "ready": True}
    assert client.get("/v2/models/none/ready").status_code == 404
    flip_a_byte(models / "sheet")
    version = client.get("/v1/models/sheet").json()["version"]
    for path in ("/v2/models/sheet/ready", f"/v2/models/sheet/versions/{version}/ready"):
        assert client.get(path).status_code == 503
    assert "checksum" in client.get("/v1/models").json()["refused"]
    assert client.get("/v2/models/plate/ready").status_code == 200


def test_thresholds_that_make_no_sense_are_told_with_the_model(
    client: TestClient, service: InspectionService, models: Path
) -> None:
    service.thresholds.set(service.store.entry("plate"), false_reject_rate=0.3)
    (models.parent / "serving" / "thresholds.json").write_text('{"plate": {"value": 5.0}}')
    service.thresholds.refresh()
    plate, sheet = client.get("/v1/models").json()["models"]
    assert plate["threshold_source"] == "rate"
    assert "value is 5.0" in plate["threshold_refused"]
    assert sheet["threshold_refused"] is None
    page = client.get("/v1/models/plate").json()
    assert page["threshold"]["refused"] == plate["threshold_refused"]
    answer = client.post("/v1/models/plate/inspect", content=encoded(picture()))
    assert answer.json()["threshold"] == plate["threshold"]
