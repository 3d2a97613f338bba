"""Does a replica still answer? Asked of itself, while nobody else gets an answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

log = logging.getLogger("clsnf.serving")

_EVERY = 1.0  # seconds between looks
_QUIET = 5.0  # seconds without an answer before the replica asks itself


class Watchdog:
    """Notes when the last answer was; asks itself where that was long ago.

    Args:
        probe: goes the way of a small request; raises where that can't be answered.
        patience: seconds without any answer after which the replica counts as one that does not.
    """

    def __init__(self, probe: Callable[[], Awaitable[None]], patience: float) -> None:
        self._probe, self.patience = probe, patience
        self._last = 0.0
        self._task: asyncio.Task[None] | None = None
        self._problem = ""

    def start(self) -> None:
        self.note_answer()
        self._task = self._task or asyncio.create_task(self._watch())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def note_answer(self) -> None:
        """A request was answered."""
        self._last = asyncio.get_running_loop().time()
        self._problem = ""

    def problem(self, patience: float | None = None) -> str | None:
        """Why the replica does not answer; None while it does.

        Args:
            patience: seconds, instead of the own ones.
        """
        if self._task is None:
            return None
        silent = asyncio.get_running_loop().time() - self._last
        if silent <= (self.patience if patience is None else patience):
            return None
        return f"no picture was answered for {silent:.0f} s{self._problem}"

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_EVERY)
            if loop.time() - self._last < _QUIET:
                continue
            try:
                async with asyncio.timeout(self.patience):
                    await self._probe()
            except TimeoutError:
                self._problem = ""
            except Exception as error:  # whatever it is, the next look may find it gone
                self._problem = f" ({' '.join(str(error).split())[:300]})"
                log.warning("the server's own picture was not answered: %s", error)
            else:
                self.note_answer()
