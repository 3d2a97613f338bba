"""The HTTP interface, without Ray: what is answered, and what is refused with which status."""

from __future__ import annotations

import base64
import gzip
import io
import json
import socket
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from starlette.testclient import TestClient

from clsnf.detector import Detector
from clsnf.evaluation.pictures import overlay
from clsnf.serving.ports import Ports
from clsnf.serving.service import InspectionService
from tests.support.small_server import TOKEN, encoded, http_server, picture, small_settings

AUTHORIZED = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module")
def client(winners: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "token").write_text(TOKEN + "\n")
    made = small_settings(
        winners,
        state=str(folder / "state"),
        token_file=str(folder / "token"),
        max_megabytes=1,
        max_megapixels=2,
    )
    with TestClient(Ports(InspectionService(made)).app, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def plate(winners: Path) -> Detector:
    return Detector.load(winners / "plate", device="cpu")


def ask(client: TestClient, body: bytes, category: str = "plate", **more: Any) -> Any:
    return client.post(f"/v1/models/{category}/inspect", content=body, **more)


# ---- answers ----


@pytest.mark.parametrize("category", ["plate", "sheet"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF", "WEBP"])
def test_an_answer_equals_the_detectors_on_the_same_file(
    client: TestClient, winners: Path, tmp_path: Path, category: str, kind: str
) -> None:
    body = encoded(picture(3), kind)
    (tmp_path / "picture").write_bytes(body)
    detector = Detector.load(winners / category, device="cpu")
    prediction = detector.predict([tmp_path / "picture"])
    answer = ask(client, body, category, headers={"Content-Type": f"image/{kind.lower()}"}).json()
    assert answer["score"] == pytest.approx(float(prediction.scores[0]), abs=1e-6)
    assert answer["threshold"] == detector.threshold.value
    assert answer["verdict"] == ("defect" if prediction.verdicts[0] else "good")
    normals = np.array(detector.provenance.validation_scores)
    assert answer["p_value"] == (1 + (normals >= answer["score"]).sum()) / (len(normals) + 1)
    assert (answer["height"], answer["width"]) == (72, 60)
    assert set(answer["milliseconds"]) == {"read", "wait", "network", "draw", "total"}


def test_the_map_comes_as_values_or_as_a_picture_at_the_images_size(
    client: TestClient, plate: Detector
) -> None:
    image = picture(4)
    (score_map, _, _) = next(iter(plate.predict_each([image])))
    values = ask(client, encoded(image), params={"map": "npy"}).json()["map"]
    found = np.load(io.BytesIO(base64.b64decode(values["base64"])), allow_pickle=False)
    np.testing.assert_allclose(found, score_map, atol=1e-5)
    drawn = ask(client, encoded(image), params={"map": "png"}).json()["map"]
    assert Image.open(io.BytesIO(base64.b64decode(drawn["base64"]))).size == (60, 72)
    assert "map" not in ask(client, encoded(image)).json()


@pytest.mark.parametrize(
    ("size", "expected"), [("24", (20, 24)), ("canvas", (64, 64)), ("99", (60, 72)), ("1", (1, 1))]
)
def test_a_map_comes_at_the_size_asked_for(
    client: TestClient, size: str, expected: tuple[int, int]
) -> None:
    for kind in ("png", "overlay", "npy"):
        asked = {"map": kind, "size": size}
        answer = ask(client, encoded(picture(4)), params=asked).json()
        body = io.BytesIO(base64.b64decode(answer["map"]["base64"]))
        found = np.load(body).shape[::-1] if kind == "npy" else Image.open(body).size
        assert found == expected
        assert (answer["width"], answer["height"]) == (60, 72)
    alone = ask(client, encoded(picture(4)), params={"size": size}, headers={"Accept": "image/png"})
    assert Image.open(io.BytesIO(alone.content)).size == expected


def test_an_overlay_at_a_size_shows_what_the_large_one_does(client: TestClient) -> None:
    def shown(size: str) -> np.ndarray:
        asked = {"map": "overlay", "size": size, "threshold": 1.0}  # without an outline
        answer = ask(client, encoded(picture(4, (144, 120))), params=asked).json()
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["map"]["base64"]))))

    small = np.asarray(Image.fromarray(shown("native")).reduce(2)).astype(int)
    assert np.abs(small - shown("72")).mean() < 2


@pytest.mark.parametrize("size", ["0", "-3", "large", "32001", ""])
def test_sizes_that_make_no_sense_are_refused(client: TestClient, size: str) -> None:
    answer = ask(client, encoded(picture()), params={"map": "png", "size": size})
    assert (answer.status_code, "size" in answer.json()["error"]) == (422, True)


def test_small_maps_of_many_large_images_are_drawn(client: TestClient) -> None:
    body = encoded(np.zeros((1000, 1100, 3), np.uint8))
    files = [("images", ("a.png", body, "image/png"))] * 2
    asked = {"map": "npy", "size": "100"}
    assert client.post("/v1/models/plate/inspect", files=files, params=asked).status_code == 200


def test_a_threshold_can_be_tried_and_moves_the_outline(client: TestClient) -> None:
    def cyan(**more: Any) -> int:
        asked = {"map": "overlay"} | more
        answer = ask(client, encoded(picture(4)), params=asked).json()
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["map"]["base64"]))))
        return int((shown == (0, 255, 255)).all(axis=2).sum())

    score = ask(client, encoded(picture(4)), "sheet").json()["score"]
    for tried, verdict in ((score - 0.01, "defect"), (score + 0.01, "good")):
        answer = ask(client, encoded(picture(4)), "sheet", params={"threshold": tried}).json()
        assert (answer["verdict"], answer["threshold"]) == (verdict, pytest.approx(tried))
    assert cyan(threshold=0.0) > 0
    assert cyan(threshold=1.0) == 0
    assert client.get("/v1/models/plate").json()["threshold"]["source"] == "model"


def test_a_tried_threshold_does_not_count_among_the_verdicts(client: TestClient) -> None:
    def verdicts() -> list[str]:
        lines = client.get("/metrics").text.splitlines()
        return [line for line in lines if line.startswith("clsnf_verdicts_total")]

    ask(client, encoded(picture(4)))
    before = verdicts()
    ask(client, encoded(picture(4)), params={"threshold": 0.1})
    assert verdicts() == before
    ask(client, encoded(picture(4)))
    assert verdicts() != before


def test_detect_anomalies_answers_as_the_cloud_service_did(client: TestClient) -> None:
    def detect(seed: int, category: str = "plate") -> dict[str, Any]:
        path = f"/v1/models/{category}/detect-anomalies"
        answer = client.post(path, content=encoded(picture(seed)))
        assert answer.status_code == 200, answer.text
        result: dict[str, Any] = answer.json()["DetectAnomalyResult"]
        return result

    found = []
    for seed in range(4):
        result, answer = detect(seed), ask(client, encoded(picture(seed))).json()
        assert result["Source"] == {"Type": "direct"}
        assert result["IsAnomalous"] is (answer["verdict"] == "defect")
        assert 0.5 <= result["Confidence"] <= 1
        found.append((abs(answer["score"] - answer["threshold"]), result["Confidence"]))
        mask = Image.open(io.BytesIO(base64.b64decode(result["AnomalyMask"])))
        assert mask.size == (60, 72)
        pixels = np.asarray(mask.convert("RGB"))
        share = float((pixels == (208, 2, 27)).all(axis=2).mean())
        areas = {a["Name"]: a["PixelAnomaly"] for a in result["Anomalies"]}
        assert next(iter(areas)) == "background"
        assert areas["background"]["Color"] == "#FFFFFF"
        assert areas["background"]["TotalPercentageArea"] == pytest.approx(1 - share)
        assert ("anomaly" in areas) == (share > 0)
    assert [c for _, c in sorted(found)] == sorted(c for _, c in found)
    assert client.post("/v1/models/none/detect-anomalies", content=b"x").status_code == 404
    form = {"images": ("a.png", encoded(picture(1)), "image/png")}
    assert client.post("/v1/models/plate/detect-anomalies", files=form).status_code == 415
    assert 'endpoint="detect_anomalies"' in client.get("/metrics").text


def test_who_prefers_a_picture_gets_the_overlay_with_the_answer_in_headers(
    client: TestClient, plate: Detector
) -> None:
    image = picture(5)
    answer = ask(client, encoded(image), headers={"Accept": "image/png"})
    assert answer.headers["content-type"] == "image/png"
    (score_map, score, _) = next(iter(plate.predict_each([image])))
    expected = overlay(image, score_map, plate.shown_from, plate.map_threshold)
    shown = np.asarray(Image.open(io.BytesIO(answer.content)))
    assert np.abs(shown.astype(int) - expected).max() <= 1
    assert float(answer.headers["clsnf-score"]) == pytest.approx(score, abs=1e-6)
    assert answer.headers["clsnf-verdict"] in ("good", "defect")
    for accept in (
        "*/*",
        "application/json, image/png",
        "image/png;q=0.5, application/json",
        "image/png;q=x",
        "",
    ):
        assert (
            ask(client, encoded(image), headers={"Accept": accept}).headers["content-type"]
            == "application/json"
        )


def test_the_images_of_a_multipart_request_are_one_batch(client: TestClient) -> None:
    images = [picture(seed) for seed in range(3)]
    files = [
        ("images", (f"{i}.png", encoded(image), "image/png")) for i, image in enumerate(images)
    ]
    answers = client.post("/v1/models/plate/inspect", files=files).json()["answers"]
    assert [a["name"] for a in answers] == ["0.png", "1.png", "2.png"]
    assert {a["batch"] for a in answers} == {3}
    alone = [ask(client, encoded(image)).json()["score"] for image in images]
    assert [a["score"] for a in answers] == pytest.approx(alone, abs=1e-6)


def test_a_compressed_body_is_read(client: TestClient) -> None:
    body = encoded(picture(), "BMP")
    expected = ask(client, body).json()["score"]
    for name, packed in {"gzip": gzip.compress(body), "deflate": zlib.compress(body)}.items():
        assert ask(client, packed, headers={"Content-Encoding": name}).json()["score"] == expected


def test_models_say_what_they_are(client: TestClient, plate: Detector) -> None:
    listed = {m["category"]: m for m in client.get("/v1/models").json()["models"]}
    assert set(listed) == {"plate", "sheet"}
    page = client.get("/v1/models/plate").json()
    assert page["version"] == listed["plate"]["version"]
    assert page["trained_on"]["images"] == plate.provenance.fit_images
    assert page["threshold"]["value"] == plate.threshold.value
    assert page["validation_scores"] == pytest.approx(list(plate.provenance.validation_scores))
    assert set(page["looks"]) == {"brightness", "contrast", "sharpness", "redness", "blueness"}


def test_health_and_documentation_answer(client: TestClient) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json()["models"] == 2
    docs = client.get("/docs").text
    assert "http" not in docs.replace("http-equiv", ""), (
        "the documentation loads nothing from another host"
    )
    assert client.get("/openapi.json").json()["info"]["title"] == "clsnf"


def test_metrics_for_prometheus_count_what_happened(client: TestClient) -> None:
    def metric(name: str) -> float:
        lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith(name)]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    asked = 'clsnf_requests_total{category="plate",endpoint="inspect",replica="0",status="200"}'
    before, images = metric(asked), metric("clsnf_verdicts_total")
    ask(client, encoded(picture()))
    assert metric(asked) == before + 1
    assert metric("clsnf_verdicts_total") == images + 1
    ask(client, b"", "nothing-" + "x" * 100)
    assert "nothing-" not in client.get("/metrics").text, "names from requests make no series"
    assert 'clsnf_drift{category="plate",look="brightness"' in client.get("/metrics").text


# ---- thresholds ----


def test_a_threshold_is_set_with_the_token_and_verdicts_follow(
    client: TestClient, plate: Detector
) -> None:
    body = encoded(picture())
    score = ask(client, body).json()["score"]
    set_to = client.put("/v1/models/plate/threshold", json={"value": 0.0}, headers=AUTHORIZED)
    assert (set_to.status_code, set_to.json()["threshold"]["source"]) == (200, "value")
    assert ask(client, body).json()["verdict"] == "defect"
    rate = client.put(
        "/v1/models/plate/threshold", json={"false_reject_rate": 0.5}, headers=AUTHORIZED
    ).json()["threshold"]
    assert rate["false_reject_rate"] == 0.5
    assert rate["value"] < plate.threshold.value
    back = client.delete("/v1/models/plate/threshold", headers=AUTHORIZED).json()["threshold"]
    assert (back["value"], back["source"]) == (plate.threshold.value, "model")
    assert ask(client, body).json()["score"] == score


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": f"Basic {TOKEN}"}, 401),
    ],
)
def test_without_the_token_no_threshold_moves(
    client: TestClient, plate: Detector, headers: dict[str, str], status: int
) -> None:
    answer = client.put("/v1/models/plate/threshold", json={"value": 0.1}, headers=headers)
    assert answer.status_code == status
    assert answer.headers["www-authenticate"] == "Bearer"
    assert client.get("/v1/models/plate").json()["threshold"]["value"] == plate.threshold.value


@pytest.mark.parametrize(
    "new",
    [
        {},
        {"value": 2},
        {"false_reject_rate": 0},
        {"value": 0.1, "false_reject_rate": 0.1},
        {"valu": 1},
        3,
    ],
)
def test_a_threshold_that_makes_no_sense_is_refused(client: TestClient, new: Any) -> None:
    answer = client.put("/v1/models/plate/threshold", json=new, headers=AUTHORIZED)
    assert answer.status_code == 422
    assert answer.json()["error"]


def test_a_server_without_a_token_lets_nobody_set_thresholds(
    winners: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CLSNF_TOKEN", raising=False)
    with TestClient(
        Ports(InspectionService(small_settings(winners, state=str(tmp_path)))).app
    ) as client:
        answer = client.put("/v1/models/plate/threshold", json={"value": 0.1}, headers=AUTHORIZED)
    assert answer.status_code == 403
    assert "CLSNF_TOKEN" in answer.json()["error"]


# ---- refusals ----


def bomb(width: int, height: int) -> bytes:
    """A small PNG whose header announces a picture of that size."""
    body = bytearray(encoded(picture()))
    body[16:24] = struct.pack(">II", width, height)
    body[29:33] = struct.pack(">I", zlib.crc32(body[12:29]))
    return bytes(body)


REFUSED = {
    "no image": (b"hello", 400, "starts like no image"),
    "empty": (b"", 400, "empty"),
    "cut short": (encoded(picture())[:-40], 400, "cut short"),
    "cut within the header": (encoded(picture())[:20], 400, ""),
    "damaged": (encoded(picture(), "JPEG")[:200] + b"\0" * 50 + b"\xff\xd9", 400, ""),
    "a bomb": (bomb(50_000, 50_000), 400, "megapixels"),
    "above the server's limit": (bomb(2000, 1001), 400, "2 megapixels"),
    "a thread": (bomb(1, 40_000), 400, "each side"),
    "a long strip": (bomb(40_000, 20), 400, "each side"),
    "a dot": (encoded(picture(size=(3, 3))), 400, "each side"),
    "too many bytes": (b"\x89PNG\r\n\x1a\n" + b"\0" * 2**20, 413, "1 MiB"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_body_that_is_no_sound_image_is_refused_with_the_reason(
    client: TestClient, name: str
) -> None:
    body, status, words = REFUSED[name]
    answer = ask(client, body)
    assert answer.status_code == status
    assert words in answer.json()["error"]


def test_maps_of_many_large_images_are_refused(client: TestClient) -> None:
    body = encoded(np.zeros((1000, 1100, 3), np.uint8))
    files = [("images", ("a.png", body, "image/png"))] * 2
    assert client.post("/v1/models/plate/inspect", files=files).status_code == 200
    answer = client.post("/v1/models/plate/inspect", files=files, params={"map": "npy"})
    assert (answer.status_code, "fewer" in answer.json()["error"]) == (413, True)


def test_curl_s_word_for_a_body_of_any_kind_is_read_as_an_image(client: TestClient) -> None:
    body = encoded(picture())
    answer = ask(client, body, headers={"Content-Type": "application/x-www-form-urlencoded"})
    assert answer.status_code == 200
    assert answer.json()["score"] == ask(client, body).json()["score"]


def test_other_refusals_have_their_own_status(client: TestClient) -> None:
    body = encoded(picture())
    unknown = ask(client, body, "plat")
    assert unknown.status_code == 404
    assert unknown.json()["categories"] == ["plate", "sheet"]
    assert ask(client, body, headers={"Content-Type": "text/html"}).status_code == 415
    assert ask(client, body, headers={"Content-Encoding": "br"}).status_code == 415
    assert ask(client, body, params={"map": "gif"}).status_code == 422
    assert (
        ask(client, gzip.compress(b"\0" * 2**22), headers={"Content-Encoding": "gzip"}).status_code
        == 413
    )
    assert (
        ask(client, gzip.compress(body)[:-9], headers={"Content-Encoding": "gzip"}).status_code
        == 400
    )
    files = [("images", ("a.png", body, "image/png"))]
    assert client.post("/v1/models/plate/inspect", files=files * 17).status_code == 413
    assert (
        client.post(
            "/v1/models/plate/inspect", files=files * 2, headers={"Accept": "image/png"}
        ).status_code
        == 406
    )
    form = ask(
        client, b"images=text", headers={"Content-Type": "application/x-www-form-urlencoded"}
    )
    assert (form.status_code, "no image" in form.json()["error"]) == (400, True)
    one_bad = client.post(
        "/v1/models/plate/inspect", files=[*files, ("images", ("b.png", b"x", "image/png"))]
    )
    assert one_bad.status_code == 400
    assert "b.png" in one_bad.json()["error"]


@pytest.mark.parametrize(
    "name",
    [
        "%2e%2e",
        "..%2fwinners%2fplate",
        "%2e",
        "plate%2f..",
        "%2fetc%2fpasswd",
        "plate%00",
        "Plate",
        " ",
    ],
)
def test_no_name_leads_out_of_the_folder(client: TestClient, name: str) -> None:
    assert ask(client, encoded(picture()), name).status_code in (404, 405)
    assert client.post(f"/v2/models/{name}/infer", content=b"{}").status_code in (404, 405)


@given(
    body=st.binary(max_size=300),
    prefix=st.sampled_from([0, 8, 33, 60, 200, 1000]),
    kind=st.sampled_from(["PNG", "JPEG", "TIFF", "WEBP", "BMP"]),
)
@settings(max_examples=120, deadline=None)
def test_no_bytes_make_a_server_error(
    client: TestClient, body: bytes, prefix: int, kind: str
) -> None:
    answer = ask(client, encoded(picture(), kind)[:prefix] + body)
    assert answer.status_code in (200, 400), answer.text
    assert client.get("/readyz").status_code == 200


@given(boundary=st.text('abc-=;" ', max_size=6), body=st.binary(max_size=200))
@settings(max_examples=80, deadline=None)
def test_no_multipart_body_makes_a_server_error(
    client: TestClient, boundary: str, body: bytes
) -> None:
    framed = (
        b"--abc\r\nContent-Disposition: form-data; name=x; filename=y\r\n\r\n"
        + body
        + b"\r\n--abc--\r\n"
    )
    for content in (body, framed):
        answer = ask(
            client, content, headers={"Content-Type": f"multipart/form-data; boundary={boundary}"}
        )
        assert answer.status_code in (400, 413), answer.text


def test_a_bug_is_answered_as_one_and_hides_its_details(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr("clsnf.serving.app.image_form", broken)
    answer = ask(client, b"x")
    assert (answer.status_code, "secret" in answer.text) == (500, False)
    assert json.loads(answer.text)["error"]


def test_a_body_that_does_not_come_gets_a_408_and_its_place_is_free_again(
    winners: Path, tmp_path: Path
) -> None:
    made = small_settings(
        winners, state=str(tmp_path), deadline_s=0.5, queue=1, images_per_request=1
    )
    with http_server(made) as address:
        host, _, port = address.partition(":")
        # The queue has one place: it would refuse the second if the first still held it.
        for _ in range(2):
            with socket.create_connection((host, int(port)), timeout=60) as slow:
                head = b"POST /v1/models/plate/inspect HTTP/1.1\r\nHost: localhost\r\n"
                slow.sendall(head + b"Content-Length: 100\r\n\r\nhalf")
                assert slow.recv(1000).split()[1] == b"408"
