"""Batches: what waits goes together, models take turns, and who has given up costs nothing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from clsnf.core.errors import ClsnfError
from clsnf.serving.batching import Batcher


class Recorder:
    """Doubles numbers, notes its batches, and computes only while the gate is open."""

    def __init__(self) -> None:
        self.batches: list[tuple[str, list[int]]] = []
        self.gate = threading.Event()
        self.entered = threading.Semaphore(0)

    def __call__(self, key: str, items: Sequence[int]) -> list[int]:
        self.entered.release()
        assert self.gate.wait(60)
        self.batches.append((key, list(items)))
        if 13 in items:
            raise ClsnfError("thirteen")
        return [2 * item for item in items]


def batched(
    work: Callable[[Batcher[str, int, int], Recorder], Any], size: int = 4, wait: float = 0.0
) -> Recorder:
    run = Recorder()

    async def main() -> None:
        with ThreadPoolExecutor(1) as executor:
            batcher: Batcher[str, int, int] = Batcher(run, executor, size, wait)
            try:
                await work(batcher, run)
            finally:
                run.gate.set()
                await batcher.close()

    asyncio.run(main())
    return run


def test_what_waits_while_the_network_is_busy_goes_together_and_models_take_turns() -> None:
    async def work(batcher: Batcher[str, int, int], run: Recorder) -> None:
        first = asyncio.create_task(batcher.submit("a", [1]))
        await asyncio.to_thread(run.entered.acquire)
        rest = [
            asyncio.create_task(batcher.submit(key, [i]))
            for i, key in enumerate("abababbaaaa", start=2)
        ]
        await asyncio.sleep(0)
        run.gate.set()
        assert list(await first) == [2]
        assert [list(r) for r in await asyncio.gather(*rest)] == [[2 * i] for i in range(2, 13)]

    run = batched(work)
    assert run.batches == [
        ("a", [1]),
        ("a", [2, 4, 6, 9]),
        ("b", [3, 5, 7, 8]),
        ("a", [10, 11, 12]),
    ]


def test_a_requests_images_stay_together_and_one_that_fails_hurts_its_batch_alone() -> None:
    async def work(batcher: Batcher[str, int, int], run: Recorder) -> None:
        groups = [[1, 2, 3], [4, 5], [13], [6], [21, 22, 23, 24, 25, 26]]
        tasks = [asyncio.create_task(batcher.submit("a", group)) for group in groups]
        run.gate.set()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert list(found[0]) == [2, 4, 6]  # type: ignore[arg-type]
        assert all(isinstance(result, ClsnfError) for result in found[1:4])
        # more than a batch holds
        assert list(found[4]) == [42, 44, 46, 48, 50, 52]  # type: ignore[arg-type]
        assert list(await batcher.submit("a", [7])) == [14]

    run = batched(work)
    assert [items for _, items in run.batches] == [
        [1, 2, 3],
        [4, 5, 13, 6],
        [21, 22, 23, 24, 25, 26],
        [7],
    ]


def test_who_has_given_up_costs_nothing() -> None:
    async def work(batcher: Batcher[str, int, int], run: Recorder) -> None:
        first = asyncio.create_task(batcher.submit("a", [1]))
        await asyncio.to_thread(run.entered.acquire)
        gone = asyncio.create_task(batcher.submit("a", [2]))
        kept = asyncio.create_task(batcher.submit("a", [3]))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        run.gate.set()
        await asyncio.gather(first, kept)

    assert [items for _, items in batched(work).batches] == [[1], [3]]


def test_a_batch_that_may_wait_fills_up() -> None:
    async def work(batcher: Batcher[str, int, int], run: Recorder) -> None:
        run.gate.set()
        first = asyncio.create_task(batcher.submit("a", [1]))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        rest = [asyncio.create_task(batcher.submit("a", [i])) for i in (2, 3, 4)]
        await asyncio.gather(first, *rest)

    assert [items for _, items in batched(work, wait=60).batches] == [[1, 2, 3, 4]]
