"""A trial that makes no progress is ended, and its place is given to the next.

A worker may hang for ever: its process was stopped, its GPU or a network file system does not
answer. Ray waits for it. Here a trial counts as alive as long as its progress notes change.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Collection, Mapping
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
        end: ends a process; where that is not known, an actor.
        clock: seconds that only rise.
    """

    def __init__(
        self,
        search: _Search,
        notes: Notes,
        timeout: float,
        end: Callable[[TrialProcess | None, Any], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._search, self._notes, self._timeout = search, notes, timeout
        self._end, self._clock = end or end_process, clock
        # Trial -> its last sign, None before the first, and when that changed.
        self._seen: dict[str, tuple[TrialSign | None, float]] = {}
        # An actor may hang before it notes that it has the next trial.
        self._process_of: dict[Any, TrialProcess] = {}
        self._looked_at = clock()

    def look(self, actor_of: Mapping[str, Any]) -> None:
        """End the trials that hang; at most every few seconds.

        Args:
            actor_of: trial -> the actor that it was given to. A trial that waits for an actor does
                not hang.
        """
        now = self._clock()
        if now - self._looked_at < min(_EVERY, self._timeout / 4):
            return
        self._looked_at = now
        signs = trial_signs(self._notes)
        running = set(self._search.running)
        for trial_id in signs.keys() - running:  # ended, or of a driver that was killed
            forget_process(self._notes, trial_id)
        seen: dict[str, tuple[TrialSign | None, float]] = {}
        for trial_id in running & actor_of.keys():
            actor, sign = actor_of[trial_id], signs.get(trial_id)
            if sign is not None:
                self._process_of[actor] = sign.process
            before, at = self._seen.get(trial_id, (None, now))
            # While the study waits for a full disk or a store, workers wait too.
            if sign != before or self._search.is_paused:
                at = now
            if now - at > self._timeout:
                forget_process(self._notes, trial_id)
                self._search.on_trial_hung(trial_id, now - at)
                self._end(self._process_of.pop(actor, None), actor)
            else:
                seen[trial_id] = sign, at
        self._seen = seen


def end_process(process: TrialProcess | None, actor: Any) -> None:
    """Kill an actor on any node of the running cluster.

    Args:
        process: of the actor. Its end by a signal works also where it was stopped.
        actor: killed where the process is not known.
    """
    if process is None:
        ray.kill(actor)
        return
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
            given = ((trial, trial.temporary_state.ray_actor) for trial in trials)
            self._watch.look({trial.trial_id: actor for trial, actor in given if actor})
