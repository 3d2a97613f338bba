"""Real worker processes: they are ended, they crash, they hang, their parent is killed."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from clsnf.core.errors import OutageError
from clsnf.serving.errors import BadRequest, GatewayTimeout, RequestError, ServiceUnavailable
from clsnf.serving.reading_pool import ReadingError, ReadingPool


@dataclass(frozen=True)
class Echo:
    """Gives what it gets, and the process that did."""

    def run(self, buffers: Sequence[memoryview]) -> tuple[int, Sequence[memoryview]]:
        return os.getpid(), buffers


@dataclass(frozen=True)
class Hang:
    def run(self, buffers: Sequence[memoryview]) -> Any:
        while True:
            time.sleep(1)


@dataclass(frozen=True)
class EndSelf:
    number: int

    def run(self, buffers: Sequence[memoryview]) -> Any:
        os.kill(os.getpid(), self.number)
        time.sleep(60)


@dataclass(frozen=True)
class Fill:
    """Takes memory until there is none."""

    def run(self, buffers: Sequence[memoryview]) -> Any:
        held = [np.ones(2**25, np.uint8) for _ in range(10_000)]
        return len(held), ()


@dataclass(frozen=True)
class Fail:
    error: Exception

    def run(self, buffers: Sequence[memoryview]) -> Any:
        raise self.error


def with_pool(
    work: Callable[[ReadingPool], Awaitable[None]], workers: int = 2, seconds: float = 60
) -> list[str]:
    """Run `work` with a pool; gives the causes why workers were replaced."""
    causes: list[str] = []

    async def main() -> None:
        pool = ReadingPool(workers, seconds, 2**28, causes.append)
        await pool.start()
        try:
            await work(pool)
        finally:
            await pool.close()

    asyncio.run(main())
    return causes


async def both_workers(pool: ReadingPool) -> set[int]:
    """The pool's processes, all of them started."""
    async with asyncio.timeout(60):
        while len(pids_of(pool)) < 2:
            await asyncio.sleep(0.02)
    return pids_of(pool)


def pids_of(pool: ReadingPool) -> set[int]:
    return {worker.pid for worker in pool._live}


async def gone(pids: set[int]) -> None:
    async with asyncio.timeout(60):
        while any(
            psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
            for pid in pids
        ):
            await asyncio.sleep(0.05)


def test_many_tasks_side_by_side_get_their_own_answers() -> None:
    async def work(pool: ReadingPool) -> None:
        pids = await both_workers(pool)
        sent = [
            np.random.default_rng(i).integers(0, 256, 1 + i * 7_000, np.uint8).tobytes()
            for i in range(200)
        ]
        replies = await asyncio.gather(*(pool.run(Echo(), [b"", one, b"end"]) for one in sent))
        assert [[bytes(b) for b in reply.buffers] for reply in replies] == [
            [b"", one, b"end"] for one in sent
        ]
        assert {reply.result for reply in replies} == pids

    assert with_pool(work) == []


def test_a_task_that_hangs_is_ended_and_the_next_is_answered() -> None:
    async def work(pool: ReadingPool) -> None:
        with pytest.raises(GatewayTimeout, match="within 5 s"):
            await pool.run(Hang())
        assert (await pool.run(Echo(), [b"x"])).buffers == [b"x"]

    assert with_pool(work, workers=1, seconds=5) == ["late"]


def test_others_are_answered_while_a_task_hangs_and_who_leaves_ends_it() -> None:
    async def work(pool: ReadingPool) -> None:
        pids = await both_workers(pool)
        hanging = asyncio.create_task(pool.run(Hang()))
        await asyncio.sleep(0)
        replies = [await pool.run(Echo()) for _ in range(5)]
        assert len({reply.result for reply in replies}) == 1
        hanging.cancel()
        (ended,) = pids - {replies[0].result}
        await gone({ended})

    assert with_pool(work) == ["gone"]


def test_the_second_image_of_a_large_request_waits_behind_the_first_of_another() -> None:
    async def work(pool: ReadingPool) -> None:
        order: list[str] = []

        async def ask(name: str, rank: int) -> None:
            await pool.run(Echo(), rank=rank)
            order.append(name)

        large = [ask(f"large {i}", i) for i in range(4)]
        await asyncio.gather(*large, ask("small", 0))
        assert order[:2] == ["large 0", "small"]

    with_pool(work, workers=1)


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGSEGV, BadRequest), (signal.SIGKILL, ServiceUnavailable)]
)
def test_a_worker_that_dies_costs_one_request_one_line(
    number: int, error: type[RequestError]
) -> None:
    async def work(pool: ReadingPool) -> None:
        with pytest.raises(error) as caught:
            await pool.run(EndSelf(number))
        assert "\n" not in str(caught.value)
        assert (await pool.run(Echo(), [b"x"])).buffers == [b"x"]

    assert with_pool(work, workers=1) == ["died"]


def test_a_worker_that_dies_while_it_waits_costs_nothing() -> None:
    async def work(pool: ReadingPool) -> None:
        for pid in await both_workers(pool):
            os.kill(pid, signal.SIGKILL)
            await gone({pid})
        replies = await asyncio.gather(*(pool.run(Echo(), [b"x"]) for _ in range(10)))
        assert all(reply.buffers == [b"x"] for reply in replies)

    assert set(with_pool(work)) == {"died"}


def test_a_parent_of_workers_that_dies_is_replaced() -> None:
    async def work(pool: ReadingPool) -> None:
        (nursery,) = psutil.Process().children()
        nursery.kill()
        await gone(pids_of(pool))
        async with asyncio.timeout(60):
            while pool.alive:
                await asyncio.sleep(0.05)
        assert (await pool.run(Echo(), [b"x"])).buffers == [b"x"]
        assert pool.alive

    with_pool(work, workers=1)


def test_memory_is_bounded_and_a_bug_is_told_from_a_refusal() -> None:
    async def work(pool: ReadingPool) -> None:
        with pytest.raises(BadRequest, match="memory"):
            await pool.run(Fill())
        with pytest.raises(BadRequest, match="refused") as caught:
            await pool.run(Fail(BadRequest("refused", {"more": 1}, {"X": "y"})))
        assert (caught.value.details, caught.value.headers) == ({"more": 1}, {"X": "y"})
        with pytest.raises(ReadingError, match="a bug"):
            await pool.run(Fail(ZeroDivisionError("a bug")))
        assert (await pool.run(Echo(), [b"x"])).buffers == [b"x"]

    assert with_pool(work, workers=1) == []


_PARENT = """
import asyncio
from clsnf.serving.reading_pool import ReadingPool
from tests.serving.test_reading_pool import Hang, both_workers

async def main():
    pool = ReadingPool(2, 60, 2**28)
    await pool.start()
    await both_workers(pool)
    hanging = asyncio.create_task(pool.run(Hang()))
    await asyncio.sleep(0.2)
    print("hangs", flush=True)
    await hanging

asyncio.run(main())
"""


def test_no_child_outlives_a_parent_that_is_killed() -> None:
    root = Path(__file__).parents[2]
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT], stdout=subprocess.PIPE, text=True, cwd=root
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == "hangs\n"
    children = {child.pid for child in psutil.Process(parent.pid).children(recursive=True)}
    assert len(children) == 3
    parent.kill()
    parent.wait()
    parent.stdout.close()
    asyncio.run(gone(children))


def test_a_pool_that_closes_leaves_no_process() -> None:
    pids: set[int] = set()

    async def work(pool: ReadingPool) -> None:
        pids.update(await both_workers(pool))
        asyncio.create_task(pool.run(Hang()))  # noqa: RUF006
        await asyncio.sleep(0.1)

    with_pool(work)
    asyncio.run(gone(pids))


def test_a_pool_that_cannot_start_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        monkeypatch.setattr(sys, "executable", shutil.which("false"))
        pool = ReadingPool(2, 60, 2**28)
        with pytest.raises(OutageError, match="can't be started"):
            await pool.start()
        await pool.close()

    asyncio.run(main())
