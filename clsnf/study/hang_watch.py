"""A trial that makes no progress is ended, and its place is given to the next.

A worker may hang for ever: its process was stopped, its GPU or a network file system does not
answer. Ray waits for it. Here a trial counts as alive as long as its progress notes change.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any, Protocol

import psutil
import ray
from ray.tune import Callback
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from clsnf.study.progress_notes import Notes, TrialProcess, TrialSign, forget_process, trial_signs

_EVERY = 5.0  # seconds between two looks


class _Search(Protocol):
    """The part of a searcher that is needed here."""

    @property
    def running(self) -> Collection[str]: ...
    @property
    def is_paused(self) -> bool: ...
    def on_trial_hung(self, trial_id: str, seconds: float) -> None: ...


class HangWatch:
    """Looks at the notes of trials that run, and ends those that hang.

    Args:
        search: knows which trials run, and is told which ones hang.
        notes: of the workers.
        timeout: seconds without any change after which a trial hangs.
        end: ends a process.
        clock: seconds that only rise.
    """

    def __init__(
        self,
        search: _Search,
        notes: Notes,
        timeout: float,
        end: Callable[[TrialProcess], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._search, self._notes, self._timeout = search, notes, timeout
        self._end, self._clock = end or end_process, clock
        self._seen: dict[str, tuple[TrialSign, float]] = {}  # trial -> its last sign, and when
        self._looked_at = clock()

    def look(self) -> None:
        """End the trials that hang; at most every few seconds."""
        now = self._clock()
        if now - self._looked_at < min(_EVERY, self._timeout / 4):
            return
        self._looked_at = now
        signs = trial_signs(self._notes)
        running = set(self._search.running)
        for trial_id in signs.keys() - running:  # ended, or of a driver that was killed
            forget_process(self._notes, trial_id)
        seen = {trial_id: seen for trial_id, seen in self._seen.items() if trial_id in running}
        for trial_id in signs.keys() & running:
            sign = signs[trial_id]
            before, at = seen.get(trial_id, (None, now))
            # While the study waits for a full disk or a store, workers wait too.
            if sign != before or self._search.is_paused:
                at = now
            seen[trial_id] = sign, at
            if now - at > self._timeout:
                del seen[trial_id]
                forget_process(self._notes, trial_id)
                self._search.on_trial_hung(trial_id, now - at)
                self._end(sign.process)
        self._seen = seen


def end_process(process: TrialProcess) -> None:
    """Kill a process on any node of the running cluster; also one that was stopped."""
    there = NodeAffinitySchedulingStrategy(process.node, soft=False)
    task = ray.remote(num_cpus=0, max_retries=0)(_kill)
    task.options(scheduling_strategy=there).remote(process.pid)


def _kill(pid: int) -> None:
    with suppress(psutil.Error, ProcessLookupError):
        if any("ray::" in part for part in psutil.Process(pid).cmdline()):
            os.kill(pid, signal.SIGKILL)


class HangCallback(Callback):
    """Tune's callback that looks for trials that hang."""

    def __init__(self, watch: HangWatch) -> None:
        self._watch: HangWatch | None = watch

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its callbacks; only the driver's watches."""
        return {"_watch": None}

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Tune is between two steps."""
        if self._watch is not None:
            self._watch.look()
