"""Dynamic batches: images that wait for the network go through it together, one model at a time.

A batch is formed when the network becomes free, from whatever waits by then, so waiting for a batch
to fill hardly ever pays (the wait is 0 by default). The images of a request stay together, images
of different models are never mixed, and models take turns by the age of their oldest request.
Requests whose client has given up are dropped before they cost anything. Ray Serve's own
``@serve.batch`` knows no groups and no turns, and does not run without Ray.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class _Group(Generic[Item, Result]):
    """The items of one request; `number` counts requests."""

    number: int
    items: Sequence[Item]
    results: asyncio.Future[Sequence[Result]]


class Batcher(Generic[Key, Item, Result]):
    """Runs items in batches, in `executor`, one batch at a time.

    Args:
        run: takes a key and items, gives one result for each, in their order.
        executor: where `run` runs.
        size: items in a batch at most; a request that has more is a batch of its own.
        wait: seconds that a batch waits for more items of its key while it is not full.
    """

    def __init__(
        self,
        run: Callable[[Key, Sequence[Item]], Sequence[Result]],
        executor: Executor,
        size: int,
        wait: float = 0.0,
    ) -> None:
        self._run, self._executor, self._size, self._wait = run, executor, size, wait
        self._queues: OrderedDict[Key, deque[_Group[Item, Result]]] = OrderedDict()
        self._count = 0
        self._arrived = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None

    async def submit(self, key: Key, items: Sequence[Item]) -> Sequence[Result]:
        """The results of a request's items, one or more; raises what `run` raises."""
        if not items:
            raise ValueError("a request without items has no results")
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        self._count += 1
        group = _Group[Item, Result](self._count, items, asyncio.get_running_loop().create_future())
        self._queues.setdefault(key, deque()).append(group)
        self._arrived.set()
        return await group.results

    async def close(self) -> None:
        """End the worker; what waits is cancelled."""
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
        for queue in self._queues.values():
            for group in queue:
                group.results.cancel()
        self._queues.clear()

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            key = self._oldest()
            if key is None:
                self._arrived.clear()
                await self._arrived.wait()
                continue
            if self._wait > 0:
                await self._fill(key)
            groups = self._take(key)
            if not groups:
                continue
            items = [item for group in groups for item in group.items]
            try:
                results = await loop.run_in_executor(self._executor, self._run, key, items)
            except Exception as error:
                for group in groups:
                    if not group.results.done():
                        group.results.set_exception(error)
                continue
            start = 0
            for group in groups:
                if not group.results.done():
                    group.results.set_result(results[start : start + len(group.items)])
                start += len(group.items)

    def _oldest(self) -> Key | None:
        """The key whose first request is the oldest; drops requests that nobody waits for."""
        for key in list(self._queues):
            queue = self._queues[key]
            while queue and queue[0].results.done():
                queue.popleft()
            if not queue:
                del self._queues[key]
        return min(self._queues, key=lambda key: self._queues[key][0].number, default=None)

    async def _fill(self, key: Key) -> None:
        """Wait until a batch is full, or until its time is up."""
        until = asyncio.get_running_loop().time() + self._wait
        while sum(len(group.items) for group in self._queues[key]) < self._size:
            self._arrived.clear()
            try:
                await asyncio.wait_for(
                    self._arrived.wait(), until - asyncio.get_running_loop().time()
                )
            except TimeoutError:
                return

    def _take(self, key: Key) -> list[_Group[Item, Result]]:
        """The groups of the next batch; a group that is larger than a batch goes alone."""
        queue, free = self._queues[key], self._size
        taken: list[_Group[Item, Result]] = []
        while queue and (not taken or len(queue[0].items) <= free):
            group = queue.popleft()
            if not group.results.done():
                taken.append(group)
                free -= len(group.items)
        return taken
