"""Trackers, told on the side: TensorBoard always, MLflow and Weights & Biases where asked for.

Each tracker has a thread and a queue of its own (:class:`Outbox`), and hears of a trial after the
study has stored it. A tracker that is slow or gone costs the study nothing: what it missed is sent
again while the study runs and for a bounded time at its end. What is missing even then is said in
one line, and ``--resume`` sends it: ``tracked.json`` in the study's folder says what arrived.
"""

from __future__ import annotations

import dataclasses
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, Protocol

from clsnf.core.errors import ClsnfError, OutputError
from clsnf.results import (
    StudySummary,
    TrackedRuns,
    TrialResult,
    WinnerResult,
    read_result,
    write_result,
)
from clsnf.study.folder import StudyFolder
from clsnf.study.mlflow_tracker import MlflowTracker, check_mlflow
from clsnf.study.request import Reporter, StudyRequest
from clsnf.study.tensorboard_tracker import TensorBoardTracker
from clsnf.study.tracked_run import TrackedRun, run_of_study, run_of_trial, run_of_winner
from clsnf.study.wandb_tracker import WandbTracker, check_wandb

_MOST_WAITING = 10_000  # runs in a queue; what comes then is left to --resume
_LONGEST_PAUSE = 60.0  # seconds between two tries while the study runs
_LONGEST_PAUSE_AT_END = 2.0
# Seconds that trackers get after the study's end: in all, while nothing arrives, and after an
# interrupt.
_PATIENCE, _PATIENCE_WITH_FAILURES, _PATIENCE_INTERRUPTED = 120.0, 20.0, 10.0


class Tracker(Protocol):
    """Where runs are shown.

    Attributes:
        place: its name and place, without secrets, for messages and ``tracked.json``.
        batch: the most runs that `send` takes.
    """

    place: str
    batch: int

    def send(self, runs: Sequence[TrackedRun]) -> None:
        """Send runs, once each however often it is called; may block, and raise anything."""


def check_trackers(request: StudyRequest) -> None:
    """Refuse a tracker that can't be used: no package, no key, no server, no such URI.

    Raises:
        SettingsError: naming the option.
    """
    if request.mlflow is not None:
        check_mlflow(request.mlflow, request.name)
    if request.wandb is not None:
        check_wandb(request.wandb)


class Sent:
    """``tracked.json``: which runs have arrived where; shared by the trackers' threads."""

    def __init__(self, out: Path, say: Callable[[str], None]) -> None:
        self._path = out / "tracked.json"
        # Writing may take long, and the study must not wait for it in `has`.
        self._lock, self._writing = threading.Lock(), threading.Lock()
        self.resumed = self._path.exists()
        try:
            found = read_result(TrackedRuns, self._path) if self.resumed else None
        except OutputError as error:
            say(f"trackers may show trials twice: {error}")
            found = None
        self.study = found.study if found is not None else f"{out.name}-{secrets.token_hex(4)}"
        self._runs = {} if found is None else {at: set(keys) for at, keys in found.sent.items()}
        self._write()

    def has(self, place: str, key: str) -> bool:
        """Whether a run has arrived."""
        with self._lock:
            return key in self._runs.get(place, ())

    def add(self, place: str, runs: Sequence[TrackedRun]) -> None:
        """Note that runs have arrived."""
        with self._lock:
            self._runs.setdefault(place, set()).update(run.key for run in runs)
        self._write()

    def _write(self) -> None:
        # A full disk is no reason to stop: the next run that arrives is noted together with this.
        with self._writing, suppress(OSError, OutputError):
            with self._lock:
                sent = {place: sorted(keys) for place, keys in self._runs.items()}
            write_result(self._path, TrackedRuns(self.study, sent))


class Outbox:
    """A tracker's queue, and the thread that empties it.

    Args:
        tracker: gets the runs, in its own thread only.
        sent: knows, and notes, what has arrived.
        say: gets a line when the tracker can't be reached, and at the end for what it misses.
    """

    def __init__(self, tracker: Tracker, sent: Sent, say: Callable[[str], None]) -> None:
        self._tracker, self._sent, self._say = tracker, sent, say
        self._changed = threading.Condition()
        self._waiting: deque[TrackedRun] = deque()
        self._missed: list[TrackedRun] = []  # found the queue full
        self._cause: str | None = None  # of the last failure; None after a success
        self._closing = self._given_up = False
        name = f"clsnf-{type(tracker).__name__}"
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def put(self, run: TrackedRun) -> None:
        """Send a run soon, unless it has arrived already."""
        if self._sent.has(self._tracker.place, run.key):
            return
        with self._changed:
            full = len(self._waiting) >= _MOST_WAITING
            (self._missed if full else self._waiting).append(run)
            self._changed.notify_all()

    def _work(self) -> None:
        failures = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if self._given_up or not self._waiting:
                    return
                batch = [
                    self._waiting[n] for n in range(min(self._tracker.batch, len(self._waiting)))
                ]
            try:
                self._tracker.send(batch)
            except Exception as error:  # whatever a tracker does, the study goes on
                failures += 1
                self._failed(batch, error, failures)
            else:
                failures = 0
                self._arrived(batch)

    def _arrived(self, batch: Sequence[TrackedRun]) -> None:
        if self._given_up:  # the study is over, and its folder may be gone
            return
        self._sent.add(self._tracker.place, batch)
        with self._changed:
            for _ in batch:
                self._waiting.popleft()
            self._cause = None
            self._changed.notify_all()

    def _failed(self, batch: Sequence[TrackedRun], error: Exception, failures: int) -> None:
        """Put the runs behind the others, for one of them may be to blame, and pause."""
        with self._changed:
            self._waiting.rotate(-len(batch))
            self._cause = _first_line(error)
            ending = self._closing
        if failures == 1 and not ending:
            self._say(
                f"{self._tracker.place}: {self._cause}; the study goes on, and what is missed "
                "there is sent later"
            )
        since = time.monotonic()
        with self._changed:
            while not self._given_up:
                longest = _LONGEST_PAUSE_AT_END if self._closing else _LONGEST_PAUSE
                left = since + min(2.0 ** min(failures, 10), longest) - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)

    def start_to_close(self) -> None:
        """Let the thread end once the queue is empty."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def close(self, since: float, patience: float) -> None:
        """Wait for what is left in the queue, and say what did not arrive.

        Args:
            since: when the study ended (:func:`time.monotonic`).
            patience: seconds from then.
        """
        with self._changed, suppress(KeyboardInterrupt):  # the user need not wait
            while self._waiting:
                waited = time.monotonic() - since
                limit = patience if self._cause is None else _PATIENCE_WITH_FAILURES
                if waited >= min(limit, patience):
                    break
                self._changed.wait(0.2)
        with self._changed:
            self._given_up = True
            self._changed.notify_all()
            missed = [*self._waiting, *self._missed]
            cause = self._cause or "it is too slow"
        if missed:
            self._say(
                f"{self._tracker.place} lacks {_counted(missed)}, because {cause}: the same "
                "command with --resume sends them"
            )


_PLURALS: dict[Literal["trial", "winner", "study"], str] = {
    "trial": "trials",
    "winner": "winners",
    "study": "studies",
}


def _counted(runs: Sequence[TrackedRun]) -> str:
    kinds: Counter[str] = Counter(run.kind for run in runs)
    return ", ".join(
        f"{kinds[kind]} {kind if kinds[kind] == 1 else plural}"
        for kind, plural in _PLURALS.items()
        if kinds[kind]
    )


def _first_line(error: Exception) -> str:
    """The first line of an error; trackers raise texts of many lines."""
    text = (str(error).strip().splitlines() or [""])[0][:300].rstrip(" .:")
    return text if isinstance(error, ClsnfError) else f"{type(error).__name__}: {text}"


@contextmanager
def tell_trackers(
    request: StudyRequest, folder: StudyFolder, reporter: Reporter
) -> Iterator[Reporter]:
    """Tell trackers what the reporter hears while the block runs; yields the reporter to use."""
    sent = Sent(folder.path, reporter.say)
    trackers: list[Tracker] = [TensorBoardTracker(folder)]
    if request.mlflow is not None:
        trackers.append(
            MlflowTracker(request.mlflow, request.name, sent.study, sent.resumed, folder)
        )
    if request.wandb is not None:
        trackers.append(WandbTracker(request.wandb, request.name, sent.study, folder))
    outboxes = [Outbox(tracker, sent, reporter.say) for tracker in trackers]

    def put(run: TrackedRun) -> None:
        for outbox in outboxes:
            outbox.put(run)

    def earlier(trials: list[TrialResult]) -> None:
        reporter.earlier(trials)
        for trial in trials:
            put(run_of_trial(trial, at=None))

    def trial(result: TrialResult) -> None:
        reporter.trial(result)
        put(run_of_trial(result, at=time.time()))

    def winner(category: str, result: WinnerResult) -> None:
        reporter.winner(category, result)
        put(run_of_winner(category, result))

    def ended(summary: StudySummary) -> None:
        reporter.ended(summary)
        put(run_of_study(summary, folder.path))

    patience = _PATIENCE_INTERRUPTED
    try:
        yield dataclasses.replace(
            reporter, earlier=earlier, trial=trial, winner=winner, ended=ended
        )
        patience = _PATIENCE
    finally:
        since = time.monotonic()
        for outbox in outboxes:
            outbox.start_to_close()
        for outbox in outboxes:
            outbox.close(since, patience)
