"""Results POSTed to a real server that is away for a while, refuses, or fails."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from clsnf.core.errors import OutageError
from clsnf.watching.courier import Courier
from clsnf.watching.output import RefusedError
from clsnf.watching.output_webhook import Webhook
from clsnf.watching.state import State
from tests.support.small_server import free_port
from tests.support.watching import made_context, made_result, wait_until
from tests.support.web_server import serving


class Receiver(BaseHTTPRequestHandler):
    """Keeps what it is sent, and answers with ``status``."""

    bodies: ClassVar[list[dict[str, object]]] = []
    headers_seen: ClassVar[list[dict[str, str]]] = []
    status = 200

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.status == 200:
            type(self).bodies.append(json.loads(body))
            type(self).headers_seen.append(dict(self.headers))
        self.send_response(self.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""


@pytest.fixture
def receiver() -> type[Receiver]:
    return type("OneReceiver", (Receiver,), {"bodies": [], "headers_seen": [], "status": 200})


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    state = State(tmp_path / "state", ["webhook"], 1000, lambda line: None)
    yield state
    state.close()


def test_results_come_in_order_when_the_server_is_there_and_when_it_comes_back(
    receiver: type[Receiver], state: State
) -> None:
    port, lines = free_port(), list[str]()
    output = Webhook(f"http://127.0.0.1:{port}/hook?secret", made_context())
    courier = Courier("webhook", output, state, lines.append)
    sent = [state.add(made_result(n)).id for n in range(5)]
    courier.start()
    wait_until(lambda: lines)
    server = ThreadingHTTPServer(("127.0.0.1", port), receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    wait_until(lambda: state.waiting() == {"webhook": 0}, 60)
    receiver.status = 503
    sent.append(state.add(made_result(5)).id)
    wait_until(lambda: any("answered 503" in line for line in lines))
    receiver.status = 200
    wait_until(lambda: state.waiting() == {"webhook": 0}, 60)
    courier.finish(5)
    server.shutdown()
    server.server_close()
    assert [body["id"] for body in receiver.bodies] == sent
    assert [headers["Idempotency-Key"] for headers in receiver.headers_seen] == sent
    assert not any("secret" in line for line in lines)


def test_what_the_server_refuses_for_good_is_counted_and_does_not_hold_up_the_others(
    receiver: type[Receiver], state: State
) -> None:
    lines: list[str] = []
    receiver.status = 422
    with serving(receiver) as port:
        courier = Courier(
            "webhook", Webhook(f"http://127.0.0.1:{port}/", made_context()), state, lines.append
        )
        courier.start()
        state.add(made_result(1))
        wait_until(lambda: courier.refused == 1)
        receiver.status = 200
        good = state.add(made_result(2))
        wait_until(lambda: state.waiting() == {"webhook": 0})
        courier.finish(5)
    assert [body["id"] for body in receiver.bodies] == [good.id]
    assert any("422" in line for line in lines)


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (301, OutageError),
        (401, OutageError),
        (404, OutageError),
        (429, OutageError),
        (500, OutageError),
        (400, RefusedError),
        (413, RefusedError),
    ],
)
def test_what_an_answer_means(
    receiver: type[Receiver], status: int, error: type[Exception]
) -> None:
    receiver.status = status
    with serving(receiver) as port, pytest.raises(error):
        Webhook(f"http://127.0.0.1:{port}/", made_context()).deliver([made_result(1)])


def test_a_token_goes_along(receiver: type[Receiver], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLSNF_WEBHOOK_TOKEN", "hush")
    with serving(receiver) as port:
        Webhook(f"http://127.0.0.1:{port}/", made_context()).deliver([made_result(1)])
    assert receiver.headers_seen[0]["Authorization"] == "Bearer hush"
