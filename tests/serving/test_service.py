"""The service without HTTP: its queue, deadlines, precision and shared thresholds."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from clsnf.serving.errors import (
    ContentTooLarge,
    GatewayTimeout,
    ServiceUnavailable,
    TooManyRequests,
)
from clsnf.serving.inference import NetworkRunner
from clsnf.serving.service import InspectionService
from clsnf.serving.settings import ServingSettings
from clsnf.serving.thresholds import Thresholds
from tests.support.small_server import encoded, picture, small_settings


def run(settings: ServingSettings, work: Callable[[InspectionService], Any]) -> Any:
    async def main() -> Any:
        service = InspectionService(settings)
        await service.start()
        try:
            return await work(service)
        finally:
            await service.close()

    return asyncio.run(main())


def test_a_full_queue_says_when_to_come_again_and_a_late_answer_is_none(
    winners: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = small_settings(
        winners, state=str(tmp_path), queue=2, images_per_request=2, deadline_s=0.5
    )
    gate = threading.Event()
    compute = NetworkRunner.run

    def slow(runner: NetworkRunner, model: Any, pictures: Any) -> Any:
        assert gate.wait(60)
        return compute(runner, model, pictures)

    monkeypatch.setattr(NetworkRunner, "run", slow)

    async def work(service: InspectionService) -> None:
        image = [("a", encoded(picture()))]
        loop = asyncio.get_running_loop()

        async def late() -> None:
            async with service.answer_before(loop.time() + 0.5):
                await service.inspect("plate", image * 2)

        first = asyncio.create_task(late())
        await asyncio.sleep(0)
        with pytest.raises(TooManyRequests, match="2 images wait") as caught:
            await service.inspect("plate", image)
        assert int(caught.value.headers["Retry-After"]) >= 1
        with pytest.raises(GatewayTimeout, match="within"):
            await first
        gate.set()
        assert len(await service.inspect("plate", image)) == 1, "its places are free again"
        with pytest.raises(ContentTooLarge):
            await service.inspect("plate", image * 3)

    run(settings, work)


def test_mixed_precision_stays_close(winners: Path, tmp_path: Path) -> None:
    async def scores(service: InspectionService) -> list[float]:
        images = [(str(i), encoded(picture(i))) for i in range(4)]
        return [found.answer.score for found in await service.inspect("plate", images)]

    found = {
        precision: run(small_settings(winners, state=str(tmp_path), precision=precision), scores)
        for precision in ("float32", "mixed")
    }
    assert found["mixed"] != found["float32"]
    np.testing.assert_allclose(found["mixed"], found["float32"], atol=0.02)


def test_a_threshold_that_was_set_at_another_replica_holds_soon(
    winners: Path, tmp_path: Path
) -> None:
    async def work(service: InspectionService) -> None:
        Thresholds(tmp_path).set(service.store.entry("plate"), value=0.123)
        async with asyncio.timeout(60):
            while "plate" not in service.thresholds.settings:
                await asyncio.sleep(0.05)

    run(small_settings(winners, state=str(tmp_path)), work)


# ---- readiness ----


def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A watchdog that looks often and waits for little."""
    monkeypatch.setattr("clsnf.serving.watchdog._EVERY", 0.05)
    monkeypatch.setattr("clsnf.serving.watchdog._QUIET", 0.1)
    monkeypatch.setattr("clsnf.serving.service._PATIENCE", 1.0)


def reason(service: InspectionService) -> str:
    """Why a service is not ready; empty where it is."""
    try:
        service.check_ready()
    except ServiceUnavailable as error:
        return str(error)
    return ""


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not holds():
            await asyncio.sleep(0.05)


def test_a_server_whose_network_hangs_is_not_ready_until_it_answers_again(
    winners: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient(monkeypatch)

    async def work(service: InspectionService) -> None:
        await service.inspect("plate", [("a", encoded(picture()))])
        assert reason(service) == ""
        gate = threading.Event()
        service._network_thread.submit(gate.wait, 60)
        await until(lambda: "no picture was answered" in reason(service))
        await asyncio.sleep(2 * service._watchdog.patience)
        with pytest.raises(RuntimeError, match="no picture"):
            service.check_alive()
        gate.set()
        await until(lambda: reason(service) == "")
        service.check_alive()

    run(small_settings(winners, state=str(tmp_path), deadline_s=1.0), work)


def test_a_server_whose_readers_hang_is_not_ready_until_they_are_replaced(
    winners: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient(monkeypatch)

    async def work(service: InspectionService) -> None:
        (nursery,) = set(psutil.Process().children()) - others
        for reader in nursery.children():
            reader.suspend()
        await until(lambda: "no picture was answered" in reason(service))
        await until(lambda: reason(service) == "")
        assert len(await service.inspect("plate", [("a", encoded(picture()))])) == 1

    others = set(psutil.Process().children())
    run(small_settings(winners, state=str(tmp_path), deadline_s=1.0, read_s=3, readers=1), work)


def test_a_server_without_readers_is_not_ready_until_they_are_back(
    winners: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient(monkeypatch)

    async def work(service: InspectionService) -> None:
        (nursery,) = set(psutil.Process().children()) - others
        nursery.kill()
        await until(lambda: "No process that reads images" in reason(service))
        await until(lambda: reason(service) == "")
        assert len(await service.inspect("plate", [("a", encoded(picture()))])) == 1

    others = set(psutil.Process().children())
    run(small_settings(winners, state=str(tmp_path), readers=1), work)
