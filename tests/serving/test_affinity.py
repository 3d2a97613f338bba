"""Replicas that share a port and have no room for all models: each model has its place."""

from __future__ import annotations

import asyncio
import http.client
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import requests

from clsnf.detector_file import TENSORS
from clsnf.serving.settings import MiB
from tests.support.replicas import Replica, replicas
from tests.support.small_server import TOKEN, encoded, picture, small_settings

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="replicas share Unix sockets")

BODY = encoded(picture(7))
MODELS, ROOM = 8, 2


@pytest.fixture(scope="module")
def many(winners: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of eight models, all the same."""
    folder = tmp_path_factory.mktemp("many") / "winners"
    for number in range(MODELS):
        shutil.copytree(winners / "plate", folder / f"part {number} ü")
    return folder


class Pair:
    """Two replicas with room for two of eight models each, and a client of each."""

    def __init__(self, models: Path, folder: Path, ending: ExitStack, **more: Any) -> None:
        size = next(models.glob(f"*/{TENSORS}")).stat().st_size
        room = (ROOM * size + size // 2) // MiB + 1
        assert ROOM * size < room * MiB < (ROOM + 1) * size
        settings = small_settings(models, state=str(folder), memory_mb=room, readers=1, **more)
        self.replicas = ending.enter_context(replicas(settings, folder / "s"))
        self.categories = sorted(path.name for path in models.iterdir())
        self.clients = [ending.enter_context(replica.connected()) for replica in self.replicas]

    def ask(self, client: int, category: str, **more: Any) -> requests.Response:
        url = f"http://127.0.0.1:{self.replicas[0].port}/v1/models/{category}/inspect"
        options: dict[str, Any] = {"data": BODY, "timeout": 60} | more
        return self.clients[client].post(url, **options)

    def loads(self) -> float:
        return self.counted("clsnf_model_loads_total")

    def counted(self, metric: str, *labels: str) -> float:
        return sum(replica.counted(metric, *labels) for replica in self.replicas)

    def ask_counted(self, client: int, category: str) -> None:
        """Ask until the answer, which comes a little earlier, is counted too."""
        before = self.counted("clsnf_requests_total")
        assert self.ask(client, category).ok
        until(lambda: self.counted("clsnf_requests_total") == before + 1)

    def fill(self) -> None:
        """Fill both with the first models."""
        for category in self.categories[:ROOM]:
            for client in (0, 1):
                self.ask_counted(client, category)

    def passed_on(self) -> str:
        """A category that the first replica passes on to the second, as they are from now on."""
        for _ in range(2):
            for category in self.categories[ROOM:]:
                second = self.replicas[1]
                before = second.counted("clsnf_requests_total", category)
                self.ask_counted(0, category)
                if second.counted("clsnf_requests_total", category) > before:
                    until(partial(self._is_told, category))
                    return category
            # By chance all of them belong to the first.
            self.replicas.reverse()
            self.clients.reverse()
        raise AssertionError("nothing is passed on")

    def _is_told(self, category: str) -> bool:
        return self.replicas[0].counted("clsnf_passed_on_total", category, "answered") == 1


@pytest.fixture
def ending() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_a_model_without_room_is_loaded_by_one_replica_and_a_request_counts_once(
    many: Path, tmp_path: Path, ending: ExitStack
) -> None:
    pair = Pair(many, tmp_path, ending)
    scores = {pair.ask(c, name).json()["score"] for name in pair.categories for c in (0, 1)}
    assert len(scores) == 1
    # The first two fit into both, and each of the others is loaded by its owner alone.
    assert pair.loads() == 2 * ROOM + (MODELS - ROOM)
    until(lambda: pair.counted("clsnf_passed_on_total", "answered") == MODELS - ROOM)
    until(lambda: pair.counted("clsnf_requests_total", "200") == 2 * MODELS)
    assert pair.counted("clsnf_verdicts_total") == 2 * MODELS


def test_what_is_passed_on_is_answered_as_if_it_came_straight(
    many: Path, tmp_path: Path, ending: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLSNF_TOKEN", TOKEN)
    pair = Pair(many, tmp_path, ending, ask_token=True, max_megabytes=1, bodies_mb=2)
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    for client in pair.clients:
        client.headers.update(bearer)
    pair.fill()
    category = pair.passed_on()
    ask = pair.replicas[1].counted
    asked = pair.ask(0, category, params={"map": "npy"})
    assert asked.json()["map"]["format"] == "npy"
    assert asked.headers["X-Content-Type-Options"] == "nosniff"
    assert pair.ask(0, category, headers={"Accept": "image/png"}).content.startswith(b"\x89PNG")
    parts = [("files", ("a.png", BODY)), ("files", ("b.png", BODY))]
    assert len(pair.ask(0, category, data=None, files=parts).json()["answers"]) == 2

    def chunks() -> Iterator[bytes]:
        yield BODY[:100]
        yield BODY[100:]

    assert pair.ask(0, category, data=chunks()).ok
    for more, status in (
        ({"headers": {"Authorization": "Bearer of nothing at all"}}, 401),
        ({"data": b"x" * (MiB + 1)}, 413),
        ({"data": b"no image at all"}, 400),
        ({"params": {"threshold": "7"}}, 422),
        ({"headers": {"Host": "evil.example"}}, 421),
    ):
        refused = pair.ask(0, category, **more)
        assert refused.status_code == status
        assert refused.json()["error"]
        pair.clients[0] = ending.enter_context(pair.replicas[0].connected())
        pair.clients[0].headers.update(bearer)
    # A client can't name another address, nor pass a request on for itself.
    assert pair.ask(0, category, headers={"clsnf-client": "1.2.3.4", "clsnf-model-version": "0"}).ok
    until(lambda: ask("clsnf_requests_total", category, "401") == 1)
    assert pair.replicas[0].counted("clsnf_requests_total", category, "401") == 0
    url = f"http://127.0.0.1:{pair.replicas[0].port}/v2/models/{category}/ready"
    assert pair.clients[0].get(url, timeout=60).json()["ready"] is True
    assert pair.replicas[0].counted("clsnf_model_loads_total", category) == 0


def held(replica: Replica, images: int) -> Any:
    """Hold places of a replica's queue."""
    admitted = replica.service.admit(images)

    async def enter() -> None:
        admitted.__enter__()

    asyncio.run_coroutine_threadsafe(enter(), replica.loop).result(30)
    return admitted


def test_an_owner_that_is_busy_or_has_gone_costs_no_request(
    many: Path, tmp_path: Path, ending: ExitStack
) -> None:
    pair = Pair(many, tmp_path, ending, target_requests=2)
    pair.fill()
    category = pair.passed_on()
    first, second = pair.replicas
    admitted = held(second, 2)
    assert pair.ask(0, category).ok
    until(lambda: first.counted("clsnf_passed_on_total", category, "not taken") == 1)
    assert first.counted("clsnf_model_loads_total", category) == 1
    second.loop.call_soon_threadsafe(admitted.__exit__, None, None, None)
    asking = [name for name in pair.categories[ROOM:] if name != category] * 8
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(ask_anybody, pair, name) for name in asking]
        second.end()
        assert {answer.result().status_code for answer in asked} == {200}


def test_the_socket_of_a_killed_replica_is_removed_and_costs_no_request(
    many: Path, tmp_path: Path, ending: ExitStack
) -> None:
    pair = Pair(many, tmp_path, ending)
    own = next((tmp_path / "s").glob("*.http"))
    for number in range(12):
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(own.with_name(f"{own.name[:12]}-{number}.http")))
    assert {ask_anybody(pair, name).status_code for name in pair.categories * 2} == {200}
    until(lambda: pair.counted("clsnf_passed_on_total", "not reached") > 0)
    assert len(list((tmp_path / "s").glob("*.http"))) < 14


def test_a_client_that_leaves_frees_the_owner_and_a_lost_owner_is_said(
    many: Path, tmp_path: Path, ending: ExitStack
) -> None:
    pair = Pair(many, tmp_path, ending)
    pair.fill()
    category = pair.passed_on()
    first, second = pair.replicas
    connection = begun(first, category)
    until(lambda: second.service.bodies.held > 0)
    connection.close()
    until(lambda: first.counted("clsnf_passed_on_total", category, "left") == 1)
    until(lambda: second.counted("clsnf_requests_total", category, "400") == 1)
    connection = begun(first, category)
    until(lambda: second.service.bodies.held > 0)
    second.cut_peers()
    answer = connection.getresponse()
    assert answer.status == 503
    assert b"send it again" in answer.read()


def begun(replica: Replica, category: str) -> http.client.HTTPConnection:
    """A connection of this replica with a request whose body has no end yet."""
    connection = replica.connection()
    connection.putrequest("POST", quote(f"/v1/models/{category}/inspect"))
    connection.putheader("Content-Length", "100000")
    connection.endheaders(b"x" * 50_000)
    return connection


def ask_anybody(pair: Pair, category: str) -> requests.Response:
    """Ask over a new connection."""
    url = f"http://127.0.0.1:{pair.replicas[0].port}/v1/models/{category}/inspect"
    return requests.post(url, data=BODY, timeout=60)


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)
