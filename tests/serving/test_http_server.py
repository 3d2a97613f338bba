"""Connections of a real server over real sockets: limits, refusals, draining, shared sockets."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from clsnf.core.errors import SettingsError
from clsnf.serving.http_protocol import ConnectionLimits
from clsnf.serving.http_server import HttpServer
from clsnf.serving.listening import SharedListener, bound_socket, tls_files, url_of

SHORT = ConnectionLimits(
    connections=8, per_client=6, header_bytes=4096, header_s=1.0, stalled_s=1.0, leftover_s=1.0
)


def small_app(gate: threading.Event) -> FastAPI:
    app = FastAPI()

    @app.get("/ok")
    async def ok() -> Response:
        return JSONResponse({"ok": True})

    @app.get("/large")
    async def large() -> Response:
        return Response(bytes(64 * 2**20))

    @app.get("/slow")
    async def slow() -> Response:
        await asyncio.to_thread(gate.wait, 30)
        return JSONResponse({"ok": True})

    @app.post("/refused")
    async def refused(request: Request) -> Response:
        return JSONResponse({"error": "no"}, 403)

    @app.post("/read")
    async def read(request: Request) -> Response:
        return JSONResponse({"bytes": len(await request.body())})

    return app


class Running:
    """A small app on a server in a thread."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self.gate, self._stop = threading.Event(), threading.Event()
        self._started = threading.Event()
        self._listening = bound_socket("127.0.0.1", 0)
        self.port: int = self._listening.getsockname()[1]
        self._limits = limits
        self.thread = threading.Thread(target=asyncio.run, args=(self._serve(),), daemon=True)
        self.thread.start()
        assert self._started.wait(30)

    async def _serve(self) -> None:
        server = HttpServer(small_app(self.gate), self._limits)
        await server.start(self._listening)
        self._started.set()
        while not self._stop.is_set():
            await asyncio.sleep(0.02)
        await server.drain(20)

    def stop(self) -> None:
        self._stop.set()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def ok(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            connection.request("GET", "/ok")
            return connection.getresponse().status == 200


@pytest.fixture
def running() -> Iterator[Running]:
    server = Running(SHORT)
    yield server
    server.gate.set()
    server.stop()
    server.thread.join(30)
    assert not server.thread.is_alive()


def answer(connection: socket.socket) -> tuple[int, dict[str, str]]:
    """Status and JSON of an answer that is followed by the end of the connection."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            received += part
    head, _, body = received.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head, received
    return int(head.split()[1]), json.loads(body)


def ended(connection: socket.socket) -> bool:
    """Whether the server ends the connection."""
    with contextlib.suppress(ConnectionResetError):
        while connection.recv(65536):
            pass
    return True


def send(connection: socket.socket, data: bytes, times: int = 1) -> None:
    with contextlib.suppress(ConnectionError):
        for _ in range(times):
            connection.sendall(data)


def test_an_endless_header_is_refused_when_it_is_too_long(running: Running) -> None:
    for start in (b"GET /ok HTTP/1.1\r\nHost: x\r\nX: ", b"GET /"):
        with running.connect() as connection:
            send(connection, start)
            send(connection, b"a" * 65536, times=8)
            status, problem = answer(connection)
            assert status == 431
            assert "4096 bytes" in problem["error"]
    with running.connect() as connection:
        send(connection, b"GET /ok HTTP/1.1\r\n")
        send(connection, b"A: b\r\n", times=2000)
        assert answer(connection)[0] == 431
    assert running.ok()


def test_endless_trailers_and_chunks_of_nothing_are_refused(running: Running) -> None:
    head = b"POST /read HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    with running.connect() as connection:
        send(connection, head + b"1\r\nx\r\n0\r\nT: ")
        time.sleep(0.2)
        send(connection, b"a" * 65536, times=8)
        assert answer(connection)[0] == 431
    with running.connect() as connection:
        send(connection, head)
        time.sleep(0.2)
        send(connection, (b"1;" + b"e" * 2000 + b"\r\nx\r\n") * 20, times=20)
        assert answer(connection)[0] == 400
    assert running.ok()


def test_what_is_no_http_is_refused_in_json(running: Running) -> None:
    for nonsense in (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc", b"NO HTTP\r\n\r\n", b"\0" * 100):
        with running.connect() as connection:
            send(connection, nonsense)
            assert answer(connection)[0] == 400
    assert running.ok()


def test_headers_that_do_not_come_end_the_connection(running: Running) -> None:
    with running.connect() as silent, running.connect() as slow:
        send(slow, b"GET /ok HTTP/1.1\r\nHost: x\r\n")
        status, problem = answer(slow)
        assert status == 408
        assert "within 1 s" in problem["error"]
        assert ended(silent)


def test_a_kept_connection_may_not_trickle_its_next_request(running: Running) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=30)
    connection.request("GET", "/ok")
    assert connection.getresponse().read()
    assert connection.sock is not None
    send(connection.sock, b"GET /ok HT")
    assert answer(connection.sock)[0] == 408


def test_connections_of_a_client_and_of_all_are_bounded(running: Running) -> None:
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(running.connect()) for _ in range(6)]
        with running.connect() as one_more:
            status, problem = answer(one_more)
            assert status == 503
            assert "from this address" in problem["error"]
        held[0].close()
        deadline = time.monotonic() + 20
        while True:  # the place is free once the server has seen the end
            with contextlib.suppress(AssertionError, OSError, http.client.HTTPException):
                assert running.ok()
                break
            assert time.monotonic() < deadline
    assert running.ok()


def test_a_body_that_nobody_reads_costs_no_memory_and_then_the_connection(
    running: Running,
) -> None:
    head = b"POST /refused HTTP/1.1\r\nHost: x\r\nContent-Length: 2000000000\r\n\r\n"
    with running.connect() as connection:
        send(connection, head)
        received = connection.recv(65536)
        assert received.startswith(b"HTTP/1.1 403")
        send(connection, b"a" * 65536, times=2000)
        assert ended(connection)
    # A small one is read to its end, and the connection serves on.
    body = http.client.HTTPConnection("127.0.0.1", running.port, timeout=30)
    body.request("POST", "/refused", body=b"a" * 100_000)
    assert body.getresponse().read()
    body.request("GET", "/ok")
    assert body.getresponse().status == 200
    body.close()


def test_an_answer_that_nobody_reads_ends_the_connection(running: Running) -> None:
    with running.connect() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        send(connection, b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(4)
        received = 0
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(1 << 20):
                received += len(part)
        assert received < 64 * 2**20
    assert running.ok()


def test_draining_answers_what_is_under_way_and_closes_the_rest() -> None:
    server = Running(SHORT)
    with server.connect() as under_way, server.connect() as idle:
        send(under_way, b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
        send(idle, b"GET /ok HTTP/1.1\r\nHost: x\r\n\r\n")
        assert idle.recv(65536).startswith(b"HTTP/1.1 200")
        server.stop()
        assert ended(idle)
        with pytest.raises(ConnectionRefusedError):
            server.connect()
        assert server.thread.is_alive()
        server.gate.set()
        status, content = answer(under_way)
        assert (status, content) == (200, {"ok": True})
        server.thread.join(30)
        assert not server.thread.is_alive()


# ---- the listening socket ----

HOLD = """
import sys, time
from pathlib import Path
from clsnf.serving.listening import SharedListener
listener = SharedListener(Path(sys.argv[1]), "127.0.0.1", int(sys.argv[2]))
print(listener.port, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("own") / "s"  # short: the path of a Unix socket is bounded


def holder(folder: Path, port: int) -> tuple[subprocess.Popen[str], int]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), str(port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def test_a_socket_outlives_the_process_that_bound_it_and_loses_no_connection(folder: Path) -> None:
    first, port = holder(folder, 0)
    second, same = holder(folder, port)
    assert same == port
    first.kill()
    first.wait()
    waiting = socket.create_connection(("127.0.0.1", port), timeout=20)
    waiting.sendall(b"hello")
    third = SharedListener(folder, "127.0.0.1", port)
    second.kill()
    second.wait()
    accepted, _ = third.socket.accept()
    assert accepted.recv(5) == b"hello"
    for each in (accepted, waiting):
        each.close()
    third.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=20)
    fourth = SharedListener(folder, "127.0.0.1", port)
    fourth.close()


def test_another_server_is_told_that_the_address_is_taken(folder: Path, tmp_path: Path) -> None:
    first = SharedListener(folder, "127.0.0.1", 0)
    with pytest.raises(SettingsError, match=f"no listening at 127.0.0.1:{first.port}"):
        SharedListener(tmp_path / "o", "127.0.0.1", first.port)
    with pytest.raises(SettingsError, match="choose another"):
        bound_socket("127.0.0.1", first.port)
    with pytest.raises(SettingsError, match="no listening at"):
        bound_socket("no.such.host.invalid", 0)
    first.close()


def test_the_folder_of_another_user_is_not_used(folder: Path, monkeypatch: object) -> None:
    folder.mkdir(parents=True)
    linked = folder.parent / "linked"
    linked.symlink_to(folder)
    with pytest.raises(SettingsError, match="belongs to another user"):
        SharedListener(linked, "127.0.0.1", 0)


def test_urls_and_the_environments_certificate(monkeypatch: pytest.MonkeyPatch) -> None:
    assert url_of("::1", 8000, tls=True) == "https://[::1]:8000/"
    assert url_of("127.0.0.1", 80, tls=False) == "http://127.0.0.1:80/"
    for name in ("CLSNF_TLS_CERT", "CLSNF_TLS_KEY"):
        monkeypatch.delenv(name, raising=False)
    assert tls_files() == {}
    monkeypatch.setenv("CLSNF_TLS_KEY", "key.pem")
    with pytest.raises(SettingsError, match="CLSNF_TLS_CERT is not set"):
        tls_files()
    monkeypatch.setenv("CLSNF_TLS_CERT", "cert.pem")
    assert tls_files() == {"certificate": "cert.pem", "key": "key.pem"}
