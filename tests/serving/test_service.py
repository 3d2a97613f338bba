"""The service without HTTP: its queue, deadlines, precision and shared thresholds."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clsnf.serving.errors import ContentTooLarge, GatewayTimeout, TooManyRequests
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
