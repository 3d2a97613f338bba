"""Hostile and odd bodies at a real server: what they get, and what others get meanwhile."""

from __future__ import annotations

import gzip
import json
import os
import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import requests

from clsnf.serving import reading_tasks
from tests.support.small_server import TOKEN, encoded, http_server, picture, small_settings


@pytest.fixture(scope="module")
def address(winners: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "token").write_text(TOKEN)
    made = small_settings(
        winners,
        state=str(folder / "state"),
        token_file=str(folder / "token"),
        queue=2,
        images_per_request=2,
        bodies_mb=128,
    )
    with http_server(made) as found:
        yield found


def inspect(address: str, body: bytes, **more: Any) -> requests.Response:
    url = f"http://{address}/v1/models/plate/inspect"
    return requests.post(url, data=body, timeout=60, **more)


def raw(address: str) -> socket.socket:
    host, _, port = address.partition(":")
    return socket.create_connection((host, int(port)), timeout=60)


def head(path: str, length: int, method: str = "POST", *more: str) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Content-Length: {length}", *more]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


INSPECT = "/v1/models/plate/inspect"


# ---- forms ----


def form(*parts: bytes, end: bytes = b"--b--\r\n") -> bytes:
    return b"".join(b"--b\r\n" + part + b"\r\n" for part in parts) + end


def ask_form(address: str, body: bytes) -> requests.Response:
    return inspect(address, body, headers={"Content-Type": "multipart/form-data; boundary=b"})


PART = b'Content-Disposition: form-data; name="images"'
PNG = encoded(picture())


@pytest.mark.parametrize(
    ("headers", "name"),
    [
        (PART + b'; filename="a.png"', "a.png"),
        (PART + b"; filename*=UTF-8''Gr%C3%B6%C3%9Fe.png", "Größe.png"),
        (PART + 'filename="Größe.png"'.join(["; ", ""]).encode(), "Größe.png"),
        (PART, "image 1"),
        (b"Content-Type: image/png", "image 1"),
        (PART + b'; filename="a\x00\tb.png"', "a??b.png"),
    ],
)
def test_a_part_is_a_file_whatever_its_name(address: str, headers: bytes, name: str) -> None:
    answer = ask_form(address, form(headers + b"\r\n\r\n" + PNG))
    assert answer.status_code == 200, answer.text
    assert answer.json()["answers"][0]["name"] == name


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (form(PART + b"\r\n\r\n" + PNG, end=b""), 400, "no end"),
        (form(PART + b"\r\n\r\n" + PNG, end=b"--b"), 400, "cut short"),
        (form(PART + b"\r\n\r\n" + PNG)[:300], 400, "no end"),
        (form(PART + b"\r\n\r\n" + PNG)[:-4] + b"x", 400, "cut short"),
        (b"", 400, "boundary"),
        (b"--b--", 400, "no files"),
        (form(*[PART + b"\r\n\r\n" + PNG] * 3), 413, "at most 2"),
        (form(*[PART + b"\r\n\r\n"] * 100_000), 413, "at most 2"),
        (form(b"X: " + b"y" * 100_000 + b"\r\n\r\n" + PNG), 400, "8192"),
    ],
)
def test_a_form_that_is_cut_or_too_much_is_refused(
    address: str, body: bytes, status: int, words: str
) -> None:
    answer = ask_form(address, body)
    assert (answer.status_code, words in answer.json()["error"]) == (status, True), answer.text


def test_images_of_a_large_form_are_read_side_by_side(address: str) -> None:
    images = [np.random.default_rng(i).integers(0, 256, (400, 300, 3), np.uint8) for i in (1, 2)]
    files = [encoded(image) for image in images]
    assert sum(map(len, files)) > reading_tasks._APART
    alone = [inspect(address, file).json()["score"] for file in files]
    answer = ask_form(address, form(*(PART + b"\r\n\r\n" + file for file in files)))
    assert [found["score"] for found in answer.json()["answers"]] == pytest.approx(alone, abs=1e-6)


def test_a_compressed_form_gets_what_it_gets_without(address: str) -> None:
    images = [np.random.default_rng(i).integers(0, 256, (400, 300, 3), np.uint8) for i in (1, 2)]
    body = form(*(PART + b"\r\n\r\n" + encoded(image) for image in images))
    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    plain, packed = (
        inspect(address, data, headers=kind | more, params={"map": "overlay"}).json()["answers"]
        for data, more in ((body, {}), (gzip.compress(body), {"Content-Encoding": "gzip"}))
    )
    assert [one["score"] for one in packed] == pytest.approx([one["score"] for one in plain])
    assert [one["map"] for one in packed] == [one["map"] for one in plain]


# ---- types and raw frames ----


@pytest.mark.parametrize(
    "kind",
    ["image/jpg", "image/x-png", "image/tif", "binary/octet-stream", "image/x-portable-pixmap"],
)
def test_names_that_libraries_give_are_read(address: str, kind: str) -> None:
    assert inspect(address, PNG, headers={"Content-Type": kind}).status_code == 200


def test_a_raw_frame_gets_what_its_file_gets(address: str) -> None:
    image = picture()
    octets = {"Content-Type": "application/octet-stream"}
    expected = inspect(address, PNG).json()["score"]
    answer = inspect(address, image.tobytes(), params={"shape": "72x60x3"}, headers=octets)
    assert answer.json()["score"] == pytest.approx(expected, abs=1e-6)
    grey = inspect(address, image[..., 0].tobytes(), params={"shape": "72x60x1"}, headers=octets)
    same = inspect(address, encoded(np.repeat(image[..., :1], 3, axis=2)))
    assert grey.json()["score"] == pytest.approx(same.json()["score"], abs=1e-6)
    drawn = inspect(
        address,
        image.tobytes(),
        params={"shape": "72x60x3"},
        headers={**octets, "Accept": "image/png"},
    )
    assert drawn.content.startswith(b"\x89PNG")
    short = inspect(address, b"x", params={"shape": "72x60x3"}, headers=octets)
    assert (short.status_code, "12960" in short.text) == (400, True)
    for shape in ("72x60", "0x0x3", "72x60x4", "x", "99999x99999x3"):
        wrong = inspect(address, image.tobytes(), params={"shape": shape}, headers=octets)
        assert wrong.status_code in (400, 422), shape
    png = inspect(address, PNG, params={"shape": "72x60x3"}, headers={"Content-Type": "image/png"})
    assert png.status_code == 422


# ---- who sends slowly, or more than there is room for ----


def test_the_token_comes_before_the_body(address: str) -> None:
    path = "/v1/models/plate/threshold"
    for token, status in (("wrong", b"401"), (TOKEN, b"413")):
        with raw(address) as client:
            authorization = f"Authorization: Bearer {token}"
            kind = "Content-Type: application/json"
            client.sendall(head(path, 10**9, "PUT", authorization, kind))
            assert client.recv(1000).split()[1] == status
    with raw(address) as client:  # no length, and no end
        lines = ["Transfer-Encoding: chunked", f"Authorization: Bearer {TOKEN}"]
        text = head(path, 0, "PUT", *lines, "Content-Type: application/json")
        client.sendall(text.replace(b"Content-Length: 0\r\n", b"") + b"1388\r\n" + b" " * 5000)
        assert client.recv(1000).split()[1] == b"413"


def test_uploads_that_are_held_take_no_place_from_others(address: str) -> None:
    with ExitStack() as stack:
        held = [stack.enter_context(closing(raw(address))) for _ in range(70)]
        for client in held:
            client.sendall(head(INSPECT, 1000) + b"x")
        assert inspect(address, PNG).status_code == 200
        assert requests.get(f"http://{address}/healthz", timeout=60).status_code == 200
        assert requests.get(f"http://{address}/readyz", timeout=60).status_code == 200
        # Each is refused long before its deadline of 30 s.
        started = time.monotonic()
        assert {client.recv(1000).split()[1] for client in held} == {b"408"}
        assert time.monotonic() - started < 25


def test_bodies_that_fill_the_memory_are_refused_and_others_are_not(
    winners: Path, tmp_path: Path
) -> None:
    made = small_settings(winners, state=str(tmp_path), max_megabytes=4, bodies_mb=8)
    with http_server(made) as address, ExitStack() as stack:
        held = [stack.enter_context(closing(raw(address))) for _ in range(2)]
        for client in held:  # together more than half of the memory, which is for one client
            client.sendall(head(INSPECT, 2**22) + b"x" * (2**21 + 2**20))
        (refused,), _, _ = select.select(held, [], [])  # whichever comes second
        assert refused.recv(1000).split()[1] == b"429"
        assert inspect(address, PNG).status_code == 200


def test_who_does_not_take_its_map_does_not_keep_others_from_theirs(
    winners: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clsnf.serving.responses._LEAST_SECONDS", 0.5)
    made = small_settings(winners, state=str(tmp_path), max_megapixels=4)
    body = encoded(np.zeros((1900, 2000, 3), np.uint8))
    with http_server(made) as address, raw(address) as idle:
        idle.sendall(head(INSPECT + "?map=npy", len(body)) + body)
        assert idle.recv(12) == b"HTTP/1.1 200"
        # The maps of both together have more than 4 megapixels.
        answer = inspect(address, body, params={"map": "npy"})
        assert (answer.status_code, len(answer.content) > 4 * 1900 * 2000) == (200, True)


# ---- what keeps parsers busy ----


def v2_bomb(count: int) -> tuple[bytes, dict[str, str]]:
    """Files of no bytes, as many as that."""
    tensor = {"name": "files", "datatype": "BYTES", "shape": [count]}
    text = json.dumps({"inputs": [tensor | {"parameters": {"binary_data_size": 4 * count}}]})
    return text.encode() + bytes(4 * count), {"Inference-Header-Content-Length": str(len(text))}


@pytest.mark.parametrize("name", ["binary", "shape of one", "JSON", "lists", "digits"])
def test_a_bomb_of_the_inference_protocol_is_refused_and_others_are_answered(
    address: str, name: str
) -> None:
    body, headers = v2_bomb(16_000_000)
    if name == "shape of one":
        body = body.replace(b"[16000000]", b"[1]       ")
    elif name in ("JSON", "lists"):
        inner = ",".join(['""' if name == "JSON" else "[]"] * 16_000_000)
        tensor = '{"name": "files", "datatype": "BYTES", "shape": [2], "data": [' + inner + "]}"
        body, headers = ('{"inputs": [' + tensor + "]}").encode(), {}
    elif name == "digits":
        headers = {"Inference-Header-Content-Length": "9" * 5000}
    answers: list[requests.Response] = []
    url = f"http://{address}/v2/models/plate/infer"
    thread = threading.Thread(
        target=lambda: answers.append(requests.post(url, data=body, headers=headers, timeout=60))
    )
    thread.start()
    while thread.is_alive():
        assert requests.get(f"http://{address}/healthz", timeout=5).status_code == 200
    thread.join()
    assert answers[0].status_code in (400, 413), answers[0].text
    assert len(answers[0].text) < 1000
    assert inspect(address, PNG).status_code == 200


def test_a_client_that_goes_away_ends_what_was_done_for_it(winners: Path, tmp_path: Path) -> None:
    # A JSON array of as many numbers as the body may hold takes seconds to become a picture.
    made = small_settings(winners, state=str(tmp_path), readers=1)
    others = set(psutil.Process().children(recursive=True))
    with http_server(made) as address:
        assert inspect(address, PNG).status_code == 200
        nursery, reader = sorted(
            set(psutil.Process().children(recursive=True)) - others,
            key=lambda p: p.ppid() != os.getpid(),
        )
        numbers = "[" + ",".join(["[1,2,3]"] * 8_000_000) + "]"
        tensor = {"name": "images", "datatype": "UINT8", "shape": [1, 2000, 4000, 3]}
        text = json.dumps({"inputs": [tensor]})[:-3] + ', "data": [' + numbers + "]}]}"
        before = reader.cpu_times().user
        with raw(address) as client:
            client.sendall(head("/v2/models/plate/infer", len(text)) + text.encode())
            until = time.monotonic() + 60
            while reader.cpu_times().user < before + 0.3:
                assert time.monotonic() < until
        until = time.monotonic() + 60
        while nursery.children() in ([], [reader]):
            assert time.monotonic() < until
            time.sleep(0.05)
        assert inspect(address, PNG).status_code == 200
        assert 'clsnf_readers_replaced_total{cause="gone"' in metrics(address)


def metrics(address: str) -> str:
    return requests.get(f"http://{address}/metrics", timeout=60).text
