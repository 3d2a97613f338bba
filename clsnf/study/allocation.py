"""Which category gets the next trial, and when a category's search ends.

Where each category has a number of trials of its own, turns are fair. Where all of them share a
budget (``--total-trials``, ``--until``, ``--hours``), every category gets :data:`FLOOR` trials, and
each trial after that goes to the category with the most to gain, as :func:`expected_gains`
estimates it from the trials so far. Equal histories give equal turns: nothing here is random.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from clsnf.core.config import StudySettings
from clsnf.results import Measurements, TrialResult
from clsnf.study.deadline import Deadline
from clsnf.study.warm_start import points_of_others

FLOOR = 3  # trials that each category gets before gains are compared
_PRIOR = 20  # chosen by benchmarks/allocation.py: with less of it, round robin is better


@dataclass
class History:
    """The trials of a category that ended.

    Attributes:
        finished: number of a trial -> its result.
        ended: numbers of all that ended; stopped and failed ones are among them.
    """

    finished: dict[int, TrialResult] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)

    def add(self, trial: TrialResult) -> None:
        """A trial ended; to hear of the same trial twice changes nothing."""
        self.ended.add(trial.number)
        if trial.objective is not None:
            seconds = Measurements(seconds=trial.measured.seconds)  # the rest would fill memory
            self.finished[trial.number] = dataclasses.replace(trial, measured=seconds)

    @property
    def values(self) -> list[float]:
        """The objectives of the finished trials, by number."""
        ordered = [trial for _, trial in sorted(self.finished.items())]
        return [trial.objective for trial in ordered if trial.objective is not None]

    @property
    def best(self) -> float | None:
        """The highest objective; None before the first."""
        return max(self.values, default=None)

    @property
    def since_best(self) -> int:
        """Number of trials after the first one with the best objective, of those that ended."""
        at = [n for n, trial in sorted(self.finished.items()) if trial.objective == self.best]
        return sum(number > at[0] for number in self.ended) if at else 0

    @property
    def mean_seconds(self) -> float:
        """What a finished trial took, on average; 0 before the first."""
        seconds = [trial.seconds for trial in self.finished.values()]
        return sum(seconds) / len(seconds) if seconds else 0.0


def expected_best(values: Sequence[float], of: int) -> float:
    """The mean of the best among `of` different ones of the values, over all such subsets."""
    ordered, total = sorted(values), math.comb(len(values), of)
    return sum(v * math.comb(rank, of - 1) / total for rank, v in enumerate(ordered))


def growth(values: Sequence[float]) -> float:
    """How much the best objective grows per unit of ln(trials), over the second half of the trials.

    The best of k trials, averaged over all orders of the n values, is a curve that no lucky order
    disturbs. This is its slope from n/2 to n.

    Args:
        values: objectives of a category's finished trials, in any order.

    Returns:
        0 or more; 0 for fewer than two values.
    """
    n = len(values)
    if n < 2:
        return 0.0
    half = (n + 1) // 2
    return (max(values) - expected_best(values, half)) / math.log(n / half)


def expected_gains(
    values: Mapping[str, Sequence[float]], others: Mapping[str, int]
) -> dict[str, float]:
    """What one more trial of each category is worth, up to a common factor.

    A category's own :func:`growth` is drawn towards the mean of all, as if :data:`_PRIOR` more
    trials had shown that: a few trials alike do not mean that there is nothing to gain. It falls
    with the square of the number of trials, because objectives have an upper end. A category
    without a finished trial has no gain.

    Args:
        values: category -> objectives of its finished trials.
        others: category -> number of its trials that add nothing: that run, failed or were stopped.
    """
    own = {category: growth(found) for category, found in values.items() if found}
    mean = sum(own.values()) / len(own) if own else 0.0
    gains = dict.fromkeys(values, 0.0)
    for category in own:
        n = len(values[category])
        drawn = (n * own[category] + _PRIOR * mean) / (n + _PRIOR)
        gains[category] = drawn / (n + 1 + others[category]) ** 2
    return gains


class Allocation:
    """Turns of a study's categories.

    Args:
        study: how many trials, and when a category's search ends.
        deadline: when the study ends; gains are then compared per second. None: not by the clock.
        say: gets a line when a category's search ends before its trials are used up, and when
            handing out stops.
    """

    def __init__(
        self,
        study: StudySettings,
        deadline: Deadline | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._study, self._deadline, self._say = study, deadline, say
        self._histories: dict[str, History] = {}
        self._ended: set[str] = set()  # categories, by target or plateau
        # Categories whose next trial can't end in time, as far as is known now.
        self._refused: set[str] = set()
        self._open: list[str] = []  # categories that might have another trial, as last asked
        self._stop_was_said = self._time_is_up = False

    @property
    def shares_points(self) -> bool:
        """Whether categories try what is best for others."""
        return self._study.share_points

    def add(self, trial: TrialResult) -> None:
        """A trial ended, in this run or in an earlier one."""
        self._history(trial.category).add(trial)
        if self._deadline is not None:
            self._deadline.costs.add(trial)
            self._refused.clear()

    def _history(self, category: str) -> History:
        return self._histories.setdefault(category, History())

    def points_of_others(self, category: str, before: int | None) -> list[dict[str, Any]]:
        """Points that won on other categories, see :func:`clsnf.study.warm_start.points_of_others`.

        Args:
            category: that will try them.
            before: only trials with a smaller number count; None: all that ended.
        """
        trials = (
            trial
            for history in self._histories.values()
            for number, trial in sorted(history.finished.items())
            if before is None or number < before
        )
        return points_of_others(trials, category)

    # ---- whose turn it is ----

    def turns(self, begun: Mapping[str, int], running: Mapping[str, int]) -> list[str]:
        """The categories that may have another trial, the one whose turn it is first.

        Args:
            begun: category -> number of its trials that began, those that ended included.
            running: category -> number of its trials that have not ended.
        """
        study = self._study
        if study.total_trials and sum(begun.values()) >= study.total_trials:
            return []
        if self.time_is_up(running):
            return []
        may = [category for category in begun if not self._is_over(category, begun[category])]
        self._open = may
        fair = sorted(may, key=lambda c: (running[c], begun[c]))
        if not study.total_trials and self._deadline is None:
            return fair
        first = [category for category in fair if begun[category] < FLOOR]
        later = [category for category in fair if begun[category] >= FLOOR]
        gains = self._gains(later, running)
        return first + sorted(later, key=lambda c: -gains[c])

    def left(self, begun: Mapping[str, int]) -> int | None:
        """Number of trials that are not begun; None where only the clock or a plateau ends it."""
        study, limits = self._study, []
        if study.trials is not None:
            limits.append(sum(max(0, study.trials - number) for number in begun.values()))
        if study.total_trials:
            limits.append(max(0, study.total_trials - sum(begun.values())))
        return min(limits, default=None)

    def _gains(self, categories: Sequence[str], running: Mapping[str, int]) -> dict[str, float]:
        """What a trial is worth; with a deadline, a second of one."""
        values = {category: self._history(category).values for category in categories}
        others = {
            category: len(self._history(category).ended) - len(found) + running[category]
            for category, found in values.items()
        }
        gains = expected_gains(values, others)
        if self._deadline is None:
            return gains
        return {c: g / max(self._history(c).mean_seconds, 1e-3) for c, g in gains.items()}

    # ---- when a search ends ----

    def _is_over(self, category: str, begun: int) -> bool:
        if self._study.trials is not None and begun >= self._study.trials:
            return True
        if category not in self._ended:
            why = self._why_ended(category)
            if why is None:
                return False
            self._ended.add(category)
            self._say(f"{category}: no more trials: {why}")
        return True

    def _why_ended(self, category: str) -> str | None:
        """Why a category's search ended before its trials were used up; None where it did not."""
        history, study = self._history(category), self._study
        if history.best is None:
            return None
        if study.target is not None and history.best >= study.target:
            return f"{study.objective} {history.best:.4f} reaches the target, {study.target:g}"
        if study.plateau and history.since_best >= study.plateau:
            return (
                f"{study.objective} {history.best:.4f} was not improved by "
                f"{history.since_best} trials (plateau)"
            )
        return None

    # ---- the clock ----

    def fits(
        self,
        category: str,
        values: Mapping[str, Any] | Callable[[], Mapping[str, Any]],
        running: Mapping[str, int],
    ) -> bool:
        """Whether a category's next trial can end in time; without a deadline always.

        Args:
            category: of the trial.
            values: its config, or what gives it: that costs something.
            running: category -> number of its trials that have not ended.
        """
        if self._deadline is None:
            return True
        if category in self._refused:
            return False
        config = values() if callable(values) else values
        winners = self._winners(running) | {category}
        if self._deadline.fits(category, config, winners):
            return True
        self._refused.add(category)
        if self._refused.issuperset(self._open):
            self._say_stop(self._deadline.why_not(category, config, winners))
        return False

    def time_is_up(self, running: Mapping[str, int]) -> bool:
        """Whether the time that is kept for the winners has come; it then stays so."""
        if self._deadline is None or self._time_is_up:
            return self._time_is_up
        winners = self._winners(running)
        if self._deadline.is_over(winners):
            self._time_is_up = True
            self._say_stop(self._deadline.kept_line(winners))
            number = sum(running.values())
            if number:
                trials = "1 trial under way is" if number == 1 else f"{number} trials under way are"
                self._say(f"time is up: {trials} stopped; --resume runs what is left")
        return self._time_is_up

    def _winners(self, running: Mapping[str, int]) -> set[str]:
        """The categories that will have a winner."""
        found = {category for category, own in self._histories.items() if own.finished}
        return found | {category for category, number in running.items() if number}

    def _say_stop(self, why: str) -> None:
        if not self._stop_was_said:
            self._stop_was_said = True
            self._say(f"no more trials: {why}")
