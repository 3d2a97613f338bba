"""One Tune searcher for many categories, with an Optuna study for each.

Tune sees one flat run of trials, so no category waits for the slowest trial of another, while each
category's sampler learns from its own trials alone.

:class:`clsnf.study.allocation.Allocation` says whose turn it is: by default the category with the
fewest running trials, and among equals the one that had the fewest trials. In sequence, a category
waits for its running trial before it gets the next. The same seed then gives the same trials,
however long each takes; the price is idle cores while the last categories end.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray.tune import Callback
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from clsnf.core.durations import duration
from clsnf.core.errors import OutageError
from clsnf.results import TrialResult
from clsnf.study.allocation import Allocation
from clsnf.study.pause import Pause
from clsnf.study.reports import OBJECTIVE, TrialReport
from clsnf.study.trials import CategoryTrials

# What a trial's config holds besides its values; the densities are left out where none are known.
CATEGORY, NUMBER, DENSITIES = "category", "trial", "densities"
# How often a trial is begun whose process is killed. Tune's own retries can all fall on one actor
# before its death is known.
MAX_ATTEMPTS = 3
_MAX_HUNG = 2  # how often a trial is begun that makes no progress
_IDLE = 0.1  # seconds between two questions for a trial while the search is paused


class PerCategorySearch(Searcher):
    """Suggests the trials of all categories, and stores their results.

    Args:
        trials_of: category -> its trials so far.
        allocation: whose turn it is, and when the search ends; it is told of every trial that
            ended, those of an earlier run included.
        in_sequence: whether a category never has two trials at once.
        begun: gets the category of every trial that is begun for the first time.
        ended: gets every trial that ended.
        pause: holds trials back while something that they need is away.
        say: gets a line for each trial that hangs.

    Attributes:
        outage: what ended the search before its time: the storage or something that trials need was
            away for too long. None where nothing did.
    """

    def __init__(
        self,
        trials_of: Mapping[str, CategoryTrials],
        allocation: Allocation,
        in_sequence: bool,
        begun: Callable[[str], None] = lambda category: None,
        ended: Callable[[TrialResult], None] = lambda trial: None,
        pause: Pause | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        super().__init__(metric=OBJECTIVE, mode="max")
        self._trials_of, self._in_sequence = dict(trials_of), in_sequence
        self._allocation = allocation
        self._pause = pause or Pause(0.0)
        self.outage: OutageError | None = None
        for own in self._trials_of.values():
            for trial in own.results():
                allocation.add(trial)
        self._begun, self._ended, self._say = begun, ended, say
        # Tune's ids of the running trials. Tune may say twice that a trial ended: a set stays
        # right, and a count would not.
        self._running: dict[str, set[str]] = {category: set() for category in trials_of}
        self._suggested: dict[str, tuple[str, int]] = {}  # Tune's id -> category and number
        self._names: Counter[tuple[str, int]] = Counter()  # how often a trial was suggested
        self._attempts: Counter[tuple[str, int]] = Counter()  # how often it failed by itself
        self._hung: dict[str, str] = {}  # Tune's id -> cause, of trials that were ended
        self._told: set[tuple[str, int]] = set()  # trials that `ended` was told of

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its searcher to resume after a crash; here the Optuna storage does that."""
        return {}

    @property
    def left(self) -> int | None:
        """Number of trials that are not begun yet; None where no number limits them."""
        if all(own.is_over for own in self._trials_of.values()):
            return 0
        return self._allocation.left(self._begun_trials())

    def _begun_trials(self) -> dict[str, int]:
        return {category: own.begun for category, own in self._trials_of.items()}

    def _running_trials(self) -> dict[str, int]:
        return {category: len(ids) for category, ids in self._running.items()}

    def time_is_up(self) -> bool:
        """Whether trials under way must be stopped; they then wait to be begun again."""
        return self._allocation.time_is_up(self._running_trials())

    @property
    def running(self) -> set[str]:
        """Tune's ids of the running trials."""
        return set().union(*self._running.values())

    @property
    def is_paused(self) -> bool:
        """Whether trials are held back while something that they need is away."""
        return self._pause.is_on

    def suggest(self, trial_id: str) -> Any:
        """The next trial's values with its category and number, as a dict.

        FINISHED where no trial is left; None where a running trial must end first, or where the
        search is paused.
        """
        with self._ending_at_outage():
            return self._suggest(trial_id)
        return Searcher.FINISHED

    def _suggest(self, trial_id: str) -> Any:
        running = self._running_trials()
        under_way = sum(running.values())
        cause = self._pause.given_up(under_way)
        if cause is not None and self.outage is None:
            self.outage = OutageError(cause)
        if self.outage is not None:
            return Searcher.FINISHED
        turns = self._allocation.turns(self._begun_trials(), running)
        if turns and not self._pause.may_begin(under_way):
            if not under_way:
                time.sleep(_IDLE)  # Tune asks again at once
            return None
        for category in turns:
            own = self._trials_of[category]
            if (self._in_sequence and running[category]) or self._waits(category) or own.is_over:
                continue
            point = self._shared_point(category)
            if self._allocation.fits(category, point or own.upcoming, running):
                return self._begin(trial_id, category, point)
        # A trial that runs may have to run again: its process may be killed.
        return None if under_way else Searcher.FINISHED

    def _begin(self, trial_id: str, category: str, point: dict[str, Any] | None) -> dict[str, Any]:
        number, values = self._trials_of[category].begin(point)
        densities = self._trials_of[category].best_densities()
        self._running[category].add(trial_id)
        self._suggested[trial_id] = (category, number)
        self._names[category, number] += 1
        if self._names[category, number] == 1:
            self._begun(category)
        known = {DENSITIES: densities} if densities else {}
        return {CATEGORY: category, NUMBER: number, **known, **values}

    @contextmanager
    def _ending_at_outage(self) -> Iterator[None]:
        """End the search where the storage is away for too long.

        Tune would go on after the error of a searcher, and take the trial for a failed one.
        """
        try:
            yield
        except OutageError as error:
            self.outage = self.outage or error

    # ---- points of other categories ----

    def _waits(self, category: str) -> bool:
        """Whether what won elsewhere is not known yet.

        Trial n learns from the trials before n of other categories, however long these take: only
        so are its values the same the next time.
        """
        own = self._trials_of[category]
        if not (self._in_sequence and self._allocation.shares_points and own.may_share()):
            return False
        running = [self._suggested[i] for ids in self._running.values() for i in ids]
        return any(number < own.next_number for _, number in running)

    def _shared_point(self, category: str) -> dict[str, Any] | None:
        """What won on other categories and is new to this one; None where it is not its turn."""
        own = self._trials_of[category]
        if not (self._allocation.shares_points and own.may_share()):
            return None
        before = own.next_number if self._in_sequence else None
        points = self._allocation.points_of_others(category, before)
        return next((point for point in points if own.is_new(point)), None)

    # ---- what Tune tells ----

    def name(self, trial_id: str) -> str:
        """A name for people, and for the trial's folder."""
        category, number = self._suggested[trial_id]
        times = self._names[category, number]
        return f"{category}-{number}" + (f"-again-{times - 1}" if times > 1 else "")

    def should_prune(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        """Whether to stop a trial after this report."""
        report = TrialReport.from_tune(result)
        if report.step is None:
            return False
        category, number = self._suggested[trial_id]
        with self._ending_at_outage():
            return self._trials_of[category].should_prune(number, report.step, report.objective)
        return False

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Reports on the way are the scheduler's part: see :class:`PruningScheduler`."""

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Store the result of a trial.

        A trial that ended without a report is left to :class:`FailureCallback`, which knows the
        cause.
        """
        category, number = self._suggested[trial_id]
        self._running[category].discard(trial_id)
        if error or result is None or self.outage is not None:
            return
        own, report = self._trials_of[category], TrialReport.from_tune(result)
        with self._ending_at_outage():
            if report.failure is not None and report.is_outage:
                own.restart(number)
                self._pause.begin(f"{category}, trial {number}", report.failure)
                return
            self._pause.end()
            if report.failure is not None:
                own.fail(number, report.failure, report.measured)
            elif report.step is not None:
                own.stop(number, report.measured)
            else:
                own.finish(number, report.measured)
            self._tell(category, number)

    def on_trial_hung(self, trial_id: str, seconds: float) -> None:
        """A trial made no progress for this long, and its process is ended now."""
        category, number = self._suggested[trial_id]
        self._hung[trial_id] = f"It made no progress for {duration(seconds)}, and was ended."
        again = self._attempts[category, number] + 1 < _MAX_HUNG
        self._say(
            f"{category}, trial {number} made no progress for {duration(seconds)}: its process is "
            f"ended, and {'it begins again' if again else 'it has failed'}"
        )

    def on_trial_failed(self, trial_id: str, cause: str, is_lost: bool = False) -> None:
        """A trial's process ended without a report: begin the trial again, a few times at most.

        Args:
            trial_id: Tune's id.
            cause: of the end.
            is_lost: whether the trial's node went away. That says nothing about the trial.
        """
        category, number = self._suggested[trial_id]
        self._running[category].discard(trial_id)
        if self.outage is not None:
            return
        own = self._trials_of[category]
        with self._ending_at_outage():
            if own.result(number).status != "under way":  # it failed after its result was stored
                self._tell(category, number)
                return
            self._attempts[category, number] += not is_lost
            most = _MAX_HUNG if trial_id in self._hung else MAX_ATTEMPTS
            if self._attempts[category, number] < most or self.time_is_up():
                own.restart(number)
                return
            own.fail(number, self._hung.get(trial_id, cause))
            self._tell(category, number)

    def _tell(self, category: str, number: int) -> None:
        """Say once that a trial ended."""
        if (category, number) not in self._told:
            self._told.add((category, number))
            result = self._trials_of[category].result(number)
            self._allocation.add(result)
            self._ended(result)

    def save(self, checkpoint_path: str) -> None:
        """Write an empty file: the trials are in the Optuna storage."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing, for the same reason."""


class FailureCallback(Callback):
    """Tells the searcher why a trial ended without a report.

    Its process was killed, or ran out of memory.
    """

    def __init__(self, search: PerCategorySearch) -> None:
        self._search: PerCategorySearch | None = search

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its callbacks; see :meth:`PerCategorySearch.__getstate__`."""
        return {"_search": None}

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """A trial failed for good."""
        if self._search is not None:
            text = _traceback_of(trial)
            is_lost = any(words in text for words in _NODE_GONE)
            self._search.on_trial_failed(trial.trial_id, _cause(text), is_lost)


class DeadlineCallback(Callback):
    """Stops trials under way when the time that is kept for the winners has come.

    Their finished artifacts stay, and their processes are killed: no trial hears anything while it
    computes.
    """

    def __init__(self, search: PerCategorySearch) -> None:
        self._search: PerCategorySearch | None = search
        self._killed: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """See :meth:`PerCategorySearch.__getstate__`."""
        return {"_search": None, "_killed": set()}

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Tune is between two steps."""
        import ray

        if self._search is None or not self._search.time_is_up():
            return
        for trial in trials:
            actor = trial.temporary_state.ray_actor
            if trial.status == Trial.RUNNING and actor and trial.trial_id not in self._killed:
                self._killed.add(trial.trial_id)
                ray.kill(actor)


class ForgetfulCallback(Callback):
    """Frees what Tune keeps of a trial that ended: for each metric its last values and their means.

    With all trials of a study that would be gigabytes, and the Optuna storage has the results.
    """

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """A trial ended."""
        trial.run_metadata.metric_analysis = {}
        trial.run_metadata.metric_n_steps = {}


class PruningScheduler(FIFOScheduler):
    """Tune's scheduler: first in, first out; trials far behind others of their category stop."""

    def __init__(self, search: PerCategorySearch) -> None:
        super().__init__()
        self._search: PerCategorySearch | None = search

    def __getstate__(self) -> dict[str, Any]:
        """See :meth:`PerCategorySearch.__getstate__`."""
        return {"_search": None}

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Stop the trial or let it go on."""
        prune = self._search is not None and self._search.should_prune(trial.trial_id, result)
        return TrialScheduler.STOP if prune else TrialScheduler.CONTINUE


# Words in Ray's traceback of a trial whose process was killed.
_KILLED = ("ActorDied", "ActorUnavailable", "is unavailable", "OutOfMemory", "died unexpectedly")


# Words in Ray's traceback of a trial whose node went away.
_NODE_GONE = ("its node has died", "node it was running on is dead")


def _traceback_of(trial: Trial) -> str:
    if trial.error_file and Path(trial.error_file).is_file():
        return Path(trial.error_file).read_text(errors="replace")
    return ""


def _cause(text: str) -> str:
    """The last line of a failed trial's traceback: what a person needs to read first."""
    if any(words in text for words in _KILLED):
        return (
            "Its process was killed, again and again: out of memory, perhaps (fewer trials at "
            "once, or smaller images, need less)."
        )
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].removeprefix("clsnf.core.errors.") if lines else "ended without a message"
