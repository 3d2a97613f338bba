"""What anybody on the network can send: each server goes on answering, within bounds of memory.

Every attack runs against a real server in processes of its own, without a token. Those whose cost
depends on the process that holds the port run against every way to serve. While an attack runs, the
server says that it lives; after it, a good request is answered within two seconds, and the server's
processes have not grown beyond a bound.
"""

from __future__ import annotations

import contextlib
import gzip
import http.client
import io
import json
import socket
import struct
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import requests
from PIL import Image

from tests.support.served import Served, end
from tests.support.small_server import encoded, picture

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="Ray's processes are for Linux"),
]

GOOD = encoded(picture(7))
MiB = 2**20
GROWTH = 700 * MiB  # of all processes together, after an attack: heaps with holes, mostly
DURING = 1200 * MiB  # while it runs: bodies_mb, readers at work, answers
# The same where readers hold pictures and maps of 50 megapixels (docs/serving.md).
DURING_LARGE = 2800 * MiB


class Target:
    """A server under attack."""

    def __init__(self, served: Served) -> None:
        self.served, self.port = served, served.port
        self.url = served.url()
        self.base = self.memory()

    def memories(self) -> dict[str, int]:
        """Bytes that each of its processes holds, shared ones counted once."""
        found = {}
        for process in self.served.family():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                what = " ".join(process.cmdline())[:120]
                found[f"{process.pid} {what}"] = process.memory_full_info().pss
        return found

    def memory(self) -> int:
        return sum(self.memories().values())

    def post(
        self, body: bytes, path: str = "v1/models/plate/inspect", **headers: str
    ) -> requests.Response:
        kind = {"Content-Type": "application/octet-stream"}
        return requests.post(self.url + path, data=body, headers=kind | headers, timeout=60)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def lives(self) -> bool:
        with contextlib.suppress(requests.RequestException):
            return requests.get(self.url + "healthz", timeout=2).ok
        return False

    def answers(self) -> bool:
        """Whether a good request is answered within two seconds."""
        with contextlib.suppress(requests.RequestException):
            return requests.post(self.url + "v1/models/plate/inspect", data=GOOD, timeout=2).ok
        return False


EVERY_WAY = pytest.mark.parametrize("target", ["ray", "local"], indirect=True)
ONE_WAY = pytest.mark.parametrize("target", ["local"], indirect=True)


@pytest.fixture(scope="module")
def target(
    request: pytest.FixtureRequest, winners: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Target]:
    way = {"ray": [], "local": ["--local"]}[request.param]
    # A client's share is small, so that one machine can be many clients' attack.
    limits = ["--set", "connections_per_client=0", "--set", "connections=400"]
    served = Served(tmp_path_factory.mktemp("x"), winners, *way, *limits)
    try:
        served.until(served.ready)
        for _ in range(20):
            assert requests.post(
                served.url() + "v1/models/plate/inspect?map=overlay", data=GOOD, timeout=60
            ).ok
        yield Target(served)
    finally:
        end(served.process)


@contextlib.contextmanager
def under_attack(target: Target, during: int = DURING) -> Iterator[None]:
    """The server lives while the block runs, and is as before after it."""
    stop, failures, largest = threading.Event(), [0], [0]

    def watch() -> None:
        in_a_row = 0
        while not stop.wait(0.25):
            in_a_row = 0 if target.lives() else in_a_row + 1
            failures[0] = max(failures[0], in_a_row)
            largest[0] = max(largest[0], target.memory())

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield
    finally:
        stop.set()
        watching.join(60)
    # A busy machine may miss one look, but not two.
    assert failures[0] < 2, "the server did not say that it lives"
    assert any(target.answers() for _ in range(3)), "a good request is not answered any more"
    assert largest[0] - target.base < during
    deadline = time.monotonic() + 20
    while target.memory() - target.base > GROWTH:
        assert time.monotonic() < deadline, f"grown from {target.base}: {target.memories()}"
        time.sleep(0.5)
    assert target.served.process.poll() is None


def refused(answer: requests.Response, *statuses: int) -> None:
    assert answer.status_code in statuses, (answer.status_code, answer.text[:300])
    assert len(answer.json()["error"].splitlines()) == 1


def drip(
    connection: socket.socket, data: bytes, times: int, pause: float, stop: threading.Event
) -> None:
    """Send the same bytes again and again, until the server or `stop` ends it."""
    with contextlib.suppress(OSError):
        for _ in range(times):
            connection.sendall(data)
            if stop.wait(pause):
                return


# ---- pictures ----


def jpeg(size: tuple[int, int], **options: object) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (120, 130, 140)).save(file, "JPEG", quality=50, **options)
    return file.getvalue()


def repeated_scans() -> bytes:
    data = jpeg((7000, 7000), progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * 4000 + data[-2:]


def fill_bytes() -> bytes:
    data = jpeg((64, 64))
    return data[:2] + b"\xff" * (30 * MiB) + data[2:]


def restart_markers() -> bytes:
    data = jpeg((64, 64))
    return data[:-2] + b"\xff\xd0" * (15 * MiB) + data[-2:]


def chunk(kind: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I4s", len(content), kind)
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def empty_chunks() -> bytes:
    data = encoded(np.zeros((64, 64, 3), np.uint8))
    return data[:33] + chunk(b"teXt", b"") * 2_500_000 + data[33:]


def inflating_png() -> bytes:
    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 64, 64, 8, 2, 0, 0, 0))
    return head + chunk(b"IDAT", zlib.compress(bytes(800 * MiB), 9)) + chunk(b"IEND", b"")


def many_entries() -> bytes:
    entries = 3_000_000
    entry = struct.pack("<HHQ8s", 305, 2, 1, b"x")
    return (
        b"II+\0"
        + struct.pack("<HHQ", 8, 0, 16)
        + struct.pack("<Q", entries)
        + entry * entries
        + bytes(8)
    )


def large_progressive() -> bytes:
    return jpeg((7000, 7000), progressive=True)


PICTURES: dict[str, Callable[[], bytes]] = {
    "a JPEG whose last scan comes 4000 times": repeated_scans,
    "a JPEG of fill bytes": fill_bytes,
    "a JPEG of restart markers": restart_markers,
    "a PNG of empty chunks": empty_chunks,
    "a PNG that inflates without end": inflating_png,
    "a BigTIFF of three million entries": many_entries,
}


@ONE_WAY
@pytest.mark.parametrize("name", PICTURES)
def test_pictures_that_keep_a_decoder_busy(target: Target, name: str) -> None:
    body = PICTURES[name]()
    with under_attack(target):
        threads = [threading.Thread(target=target.post, args=(body,)) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        # A file may also be whole and small, and its rubbish be skipped.
        answer = target.post(body)
        assert answer.status_code in (200, 400, 413, 504), answer.text[:300]


@EVERY_WAY
def test_whole_pictures_of_the_largest_size_and_their_maps(target: Target) -> None:
    body = large_progressive()
    with under_attack(target, DURING_LARGE):
        results: list[int] = []

        def ask(query: str) -> None:
            results.append(target.post(body, f"v1/models/plate/inspect?map={query}").status_code)

        threads = [
            threading.Thread(target=ask, args=(query,)) for query in ("overlay", "png", "npy") * 3
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert len(results) == 9
        assert set(results) <= {200, 413, 429, 504}, target.served.log.read_text()[-3000:]


@ONE_WAY
def test_bodies_that_are_compressed_bombs(target: Target) -> None:
    bomb = gzip.compress(bytes(1000 * MiB), 9)
    with under_attack(target):
        for _ in range(3):
            refused(target.post(bomb, **{"Content-Encoding": "gzip"}), 413, 400)


# ---- bodies ----


@EVERY_WAY
def test_a_threshold_is_never_read_without_a_token(target: Target) -> None:
    head = (
        b"PUT /v1/models/plate/threshold HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    spaces = b"10000\r\n" + b" " * 65536 + b"\r\n"
    stop = threading.Event()
    with under_attack(target):
        flood = target.connect()
        flood.sendall(head)
        threading.Thread(target=drip, args=(flood, spaces, 30_000, 0, stop), daemon=True).start()
        assert flood.recv(65536).split()[1] in (b"401", b"403")
        held = [target.connect() for _ in range(200)]
        for connection in held:
            connection.sendall(head + b"1\r\n \r\n")
        for connection in held:
            assert connection.recv(65536).split()[1] in (b"401", b"403")
        stop.set()
        for connection in [flood, *held]:
            connection.close()


@EVERY_WAY
def test_uploads_that_trickle_hold_no_places(target: Target) -> None:
    head = (
        b"POST /v1/models/plate/inspect HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        b"Content-Type: image/png\r\nContent-Length: 60000000\r\n\r\n"
    )
    with under_attack(target):
        held = [target.connect() for _ in range(100)]
        for connection in held:
            connection.sendall(head + b"\x89")
        assert any(target.answers() for _ in range(3))
        for connection in held:
            assert connection.recv(65536).split()[1] == b"408"
            connection.close()


@ONE_WAY
def test_bodies_that_are_held_share_one_budget(target: Target) -> None:
    head = (
        b"POST /v1/models/plate/inspect HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        b"Content-Type: image/png\r\nContent-Length: 60000000\r\n\r\n"
    )
    statuses: list[bytes] = []

    def hold() -> None:
        with target.connect() as connection, contextlib.suppress(OSError):
            connection.sendall(head + bytes(55_000_000))
            statuses.append(connection.recv(65536).split()[1])

    with under_attack(target):
        threads = [threading.Thread(target=hold) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert set(statuses) <= {b"408", b"429"}


@ONE_WAY
def test_multipart_bodies_of_nothing(target: Target) -> None:
    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    part = b'--b\r\nContent-Disposition: form-data; name="i"; filename="a"\r\n\r\n\r\n'
    with under_attack(target):
        refused(target.post(part * 800_000 + b"--b--\r\n", **kind), 400, 413)
        refused(target.post(b"--b\r\n" + b"A: b\r\n" * 8_000_000, **kind), 400, 413)
        refused(target.post(b"--b\r\nX: " + b"a" * (50 * MiB), **kind), 400, 413)
        whole = part.replace(b"\r\n\r\n\r\n", b"\r\n\r\n" + GOOD + b"\r\n")
        assert target.post(whole + b"--b--\r\n", **kind).status_code == 200
        refused(target.post(whole, **kind), 400)
        refused(target.post(whole + b"--b-", **kind), 400)


def infer(target: Target, body: bytes, **headers: str) -> requests.Response:
    return target.post(body, "v2/models/plate/infer", **headers)


@EVERY_WAY
def test_inference_requests_of_nothing(target: Target) -> None:
    with under_attack(target):
        count = 16_000_000
        head = json.dumps(
            {
                "inputs": [
                    {
                        "name": "files",
                        "datatype": "BYTES",
                        "shape": [count],
                        "parameters": {"binary_data_size": 4 * count},
                    }
                ]
            }
        ).encode()
        length = {"Inference-Header-Content-Length": str(len(head))}
        refused(infer(target, head + bytes(4 * count), **length), 400, 413)
        length = {"Inference-Header-Content-Length": "9" * 5000}
        refused(infer(target, head, **length), 400)
        as_json = {"Content-Type": "application/json"}
        for text in (
            b"[" * 30_000_000,
            b'{"inputs": [' + b"{}," * 10_000_000 + b"{}]}",
            b'{"inputs": [{"name": "images", "datatype": "UINT8", "shape": [1, 2000, 2000, 3], '
            b'"data": [' + b"1," * 24_000_000 + b"1]}]}",
            b'{"inputs": [{"name": "images", "datatype": "UINT8", "shape": [1, 16, 16, 3], '
            b'"data": [' + b"9" * 40_000_000 + b"]}]}",
            b'{"inputs": [{"name": "files", "datatype": "BYTES", "shape": [9000000], '
            b'"data": [' + b'"",' * 8_999_999 + b'""]}]}',
        ):
            refused(infer(target, text, **as_json), 400, 413, 504)


# ---- connections ----


@EVERY_WAY
def test_headers_without_an_end(target: Target) -> None:
    starts = (b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nX: ", b"GET /")
    with under_attack(target):
        for start in starts:
            with target.connect() as connection:
                with contextlib.suppress(OSError):
                    connection.sendall(start)
                    for _ in range(1000):
                        connection.sendall(b"a" * 65536)
                with contextlib.suppress(OSError):
                    assert connection.recv(65536).split()[1] == b"431"


@ONE_WAY
def test_connections_that_say_nothing(target: Target) -> None:
    with under_attack(target):
        held = [target.connect() for _ in range(300)]
        assert any(target.answers() for _ in range(3))
        for connection in held:
            connection.settimeout(60)
            assert connection.recv(10) == b""
            connection.close()


@ONE_WAY
def test_answers_that_nobody_reads(target: Target) -> None:
    large = jpeg((3000, 3000))
    head = (
        "POST /v1/models/plate/inspect?map=npy HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        f"Content-Type: image/jpeg\r\nContent-Length: {len(large)}\r\n\r\n"
    ).encode()
    with under_attack(target):
        held = []
        for _ in range(12):
            connection = target.connect()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(head + large)
            held.append(connection)
        time.sleep(30)
        assert any(target.answers() for _ in range(3))
        for connection in held:
            connection.close()


@EVERY_WAY
def test_clients_that_leave(target: Target) -> None:
    with under_attack(target):
        for number in range(200):
            connection = http.client.HTTPConnection("127.0.0.1", target.port, timeout=60)
            connection.putrequest("POST", "/v1/models/plate/inspect")
            connection.putheader("Content-Length", str(len(GOOD)))
            connection.endheaders()
            assert connection.sock is not None
            connection.sock.sendall(GOOD if number % 2 else GOOD[: number % len(GOOD)])
            connection.close()


# ---- names ----


@ONE_WAY
def test_names_that_lead_elsewhere(target: Target) -> None:
    names = ("..", "%2e%2e%2f%2e%2e%2fetc", "plate%00", "a" * 30_000, "%ff%fe", "plate%2f..", "💥")
    with under_attack(target):
        for name in names:
            for path in (f"v1/models/{name}/inspect", f"v2/models/{name}/infer"):
                answer = target.post(GOOD, path)
                assert answer.status_code in (400, 404, 405, 415), (path[:60], answer.text[:200])
