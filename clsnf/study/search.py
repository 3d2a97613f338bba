"""One Tune searcher for many categories, with an Optuna study for each.

Tune sees one flat run of trials, so no category waits for the slowest trial of another, while each
category's sampler learns from its own trials alone.

The next trial goes to the category with the fewest running trials, and among equals to the one that
had the fewest trials. In sequence, a category waits for its running trial before it gets the next.
The same seed then gives the same trials, however long each takes; the price is idle cores while
the last categories end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ray.tune import Callback
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from clsnf.results import TrialResult
from clsnf.study.reports import OBJECTIVE, TrialReport
from clsnf.study.trials import CategoryTrials

CATEGORY, NUMBER = "category", "trial"  # what a trial's config holds besides its values
# How often a trial is begun whose process is killed. Tune's own retries can all fall on one actor
# before its death is known.
MAX_ATTEMPTS = 3


class PerCategorySearch(Searcher):
    """Suggests `trials` trials of each category, and stores their results.

    Args:
        trials_of: category -> its trials so far.
        trials: number of trials of each category, those of an earlier run included.
        in_sequence: whether a category never has two trials at once.
        begun: gets the category of every trial that is begun for the first time.
        ended: gets every trial that ended.
    """

    def __init__(
        self,
        trials_of: Mapping[str, CategoryTrials],
        trials: int,
        in_sequence: bool,
        begun: Callable[[str], None] = lambda category: None,
        ended: Callable[[TrialResult], None] = lambda trial: None,
    ) -> None:
        super().__init__(metric=OBJECTIVE, mode="max")
        self._trials_of, self._trials, self._in_sequence = dict(trials_of), trials, in_sequence
        self._begun, self._ended = begun, ended
        # Tune's ids of the running trials. Tune may say twice that a trial ended: a set stays
        # right, and a count would not.
        self._running: dict[str, set[str]] = {category: set() for category in trials_of}
        self._suggested: dict[str, tuple[str, int]] = {}  # Tune's id -> category and number
        self._attempts: Counter[tuple[str, int]] = Counter()
        self._told: set[tuple[str, int]] = set()  # trials that `ended` was told of

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its searcher to resume after a crash; here the Optuna storage does that."""
        return {}

    @property
    def left(self) -> int:
        """Number of trials that are not begun yet."""
        return sum(max(0, self._trials - own.begun) for own in self._trials_of.values())

    def suggest(self, trial_id: str) -> Any:
        """The next trial's values with its category and number, as a dict.

        FINISHED where no trial is left; None where a running trial must end first.
        """
        begun = {category: own.begun for category, own in self._trials_of.items()}
        unfinished = [category for category in begun if begun[category] < self._trials]
        if not unfinished:
            return Searcher.FINISHED
        category = min(unfinished, key=lambda c: (len(self._running[c]), begun[c]))
        if self._in_sequence and self._running[category]:
            return None
        number, values = self._trials_of[category].begin()
        self._running[category].add(trial_id)
        self._suggested[trial_id] = (category, number)
        self._attempts[category, number] += 1
        if self._attempts[category, number] == 1:
            self._begun(category)
        return {CATEGORY: category, NUMBER: number, **values}

    def name(self, trial_id: str) -> str:
        """A name for people, and for the trial's folder."""
        category, number = self._suggested[trial_id]
        attempt = self._attempts[category, number]
        return f"{category}-{number}" + (f"-again-{attempt - 1}" if attempt > 1 else "")

    def should_prune(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        """Whether to stop a trial after this report."""
        report = TrialReport.from_tune(result)
        if report.step is None:
            return False
        category, number = self._suggested[trial_id]
        return self._trials_of[category].should_prune(number, report.step, report.objective)

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
        if error or result is None:
            return
        own, report = self._trials_of[category], TrialReport.from_tune(result)
        if report.failure is not None:
            own.fail(number, report.failure, report.measured)
        elif report.step is not None:
            own.stop(number, report.measured)
        else:
            own.finish(number, report.measured)
        self._tell(category, number)

    def on_trial_failed(self, trial_id: str, cause: str) -> None:
        """A trial's process ended without a report: begin the trial again, a few times at most."""
        category, number = self._suggested[trial_id]
        self._running[category].discard(trial_id)
        own = self._trials_of[category]
        if own.result(number).status != "under way":  # what failed came after its result was stored
            self._tell(category, number)
            return
        if self._attempts[category, number] < MAX_ATTEMPTS:
            own.restart(number)
            return
        own.fail(number, cause)
        self._tell(category, number)

    def _tell(self, category: str, number: int) -> None:
        """Say once that a trial ended."""
        if (category, number) not in self._told:
            self._told.add((category, number))
            self._ended(self._trials_of[category].result(number))

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
            self._search.on_trial_failed(trial.trial_id, _cause(trial))


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


def _cause(trial: Trial) -> str:
    """The last line of a failed trial's traceback: what a person needs to read first."""
    text = ""
    if trial.error_file and Path(trial.error_file).is_file():
        text = Path(trial.error_file).read_text(errors="replace")
    if any(words in text for words in _KILLED):
        return (
            "Its process was killed, again and again: out of memory, perhaps (fewer trials at "
            "once, or smaller images, need less)."
        )
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].removeprefix("clsnf.core.errors.") if lines else "ended without a message"
