"""One Tune searcher for many categories: an Optuna study each.

Unusual: Tune sees one flat run of trials, so that a category never waits for another one's slowest
    trial, while each category's
sampler learns from its own trials alone. The next trial goes to the category with the fewest
running ones, then to the one that had the fewest. In sequence, a category waits for its running
trial before it gets the next: then the same seed gives the same trials whatever else is going on,
at the price of idle cores while the last categories end.
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

from clsnf.study.trials import History

CATEGORY, NUMBER = "category", "trial"  # what a trial's config holds besides its values
METRIC = "objective"  # in every report
# How often a trial is begun whose process is killed. Tune's own retries can all fall on one actor
# before its death is known.
MOST_ATTEMPTS = 3

# What a trial reports, and its history keeps beside the objectives.
_KEPT = ("validation_", "family_", "stages_", "stream_", "seconds", "latency", "traceback")


class PerCategorySearch(Searcher):
    """Hands out `trials` trials of each category, and tells its history what came out.

    Args:
        histories: of each category.
        trials: of each category, those of an earlier run included.
        in_sequence: never two trials of a category at once.
        begun: gets the category of every trial that is handed out for the first time.
        tell: gets the record of every trial that ended.
    """

    def __init__(
        self,
        histories: Mapping[str, History],
        trials: int,
        in_sequence: bool,
        begun: Callable[[str], None] = lambda category: None,
        tell: Callable[[dict[str, Any]], None] = lambda record: None,
    ) -> None:
        super().__init__(metric=METRIC, mode="max")
        self._histories, self._trials, self._in_sequence = dict(histories), trials, in_sequence
        self._begun, self._tell = begun, tell
        self._running = dict.fromkeys(histories, 0)
        self._handed: dict[str, tuple[str, int]] = {}
        self._attempts: Counter[tuple[str, int]] = Counter()

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its searcher to go on after a crash; here that is the histories' part."""
        return {}

    @property
    def left(self) -> int:
        """Number of trials to hand out yet."""
        return sum(max(0, self._trials - history.given) for history in self._histories.values())

    def suggest(self, trial_id: str) -> Any:
        """The next trial's values with its category and number (a dict), FINISHED, or None where a
        running trial must end first.
        """
        given = {category: history.given for category, history in self._histories.items()}
        open_categories = [c for c in given if given[c] < self._trials]
        if not open_categories:
            return Searcher.FINISHED
        category = min(open_categories, key=lambda c: (self._running[c], given[c]))
        if self._in_sequence and self._running[category]:
            return None
        number, values = self._histories[category].begin()
        self._running[category] += 1
        self._handed[trial_id] = (category, number)
        self._attempts[category, number] += 1
        if self._attempts[category, number] == 1:
            self._begun(category)
        return {CATEGORY: category, NUMBER: number, **values}

    def name(self, trial_id: str) -> str:
        """A name for people, and for the trial's folder."""
        category, number = self._handed[trial_id]
        attempt = self._attempts[category, number]
        return f"{category}-{number}" + (f"-again-{attempt - 1}" if attempt > 1 else "")

    def is_hopeless(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        """Whether to stop a trial after a report on its way."""
        if "step" not in result:
            return False
        category, number = self._handed[trial_id]
        return self._histories[category].is_hopeless(number, result["step"], result[METRIC])

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Reports on the way are the scheduler's part."""

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Pass on what a trial came to. What ended without a report is left to :class:`Telling`,
        which can see the cause.
        """
        category, number = self._handed[trial_id]
        self._running[category] -= 1
        if error or result is None:
            return
        history = self._histories[category]
        notes = {name: value for name, value in result.items() if name.startswith(_KEPT)}
        if "failed" in result:
            history.fail(number, result["failed"], notes)
        else:
            history.end(number, {} if "step" in result else result, notes)
        self._tell(history.record(number))

    def failed(self, trial_id: str, cause: str) -> None:
        """A trial's process ended without a report: the trial is begun again, a few times at most."""
        category, number = self._handed[trial_id]
        history = self._histories[category]
        if self._attempts[category, number] < MOST_ATTEMPTS:
            history.begin_again(number)
            return
        history.fail(number, cause)
        self._tell(history.record(number))

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the histories lie in their storage."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, as :meth:`save`."""


class Telling(Callback):
    """Tells the searcher why trials ended without a report: their process was killed, or ran out of
    memory.
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
            self._search.failed(trial.trial_id, _cause(trial))


class StopHopeless(FIFOScheduler):
    """Tune's scheduler: first in, first out, and a trial that its category's others leave far
    behind is stopped on its way.
    """

    def __init__(self, search: PerCategorySearch) -> None:
        super().__init__()
        self._search: PerCategorySearch | None = search

    def __getstate__(self) -> dict[str, Any]:
        """See :meth:`PerCategorySearch.__getstate__`."""
        return {"_search": None}

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Stop or go on."""
        hopeless = self._search is not None and self._search.is_hopeless(trial.trial_id, result)
        return TrialScheduler.STOP if hopeless else TrialScheduler.CONTINUE


def _cause(trial: Trial) -> str:
    """The last line of a failed trial's traceback: what a person needs to read first."""
    text = ""
    if trial.error_file and Path(trial.error_file).is_file():
        text = Path(trial.error_file).read_text(errors="replace")
    if any(
        sign in text
        for sign in (
            "ActorDied",
            "ActorUnavailable",
            "is unavailable",
            "OutOfMemory",
            "died unexpectedly",
        )
    ):
        return (
            "Its process was killed, again and again: out of memory, perhaps (fewer trials at "
            "once, or smaller images, need less)."
        )
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].removeprefix("clsnf.core.errors.") if lines else "ended without a message"
