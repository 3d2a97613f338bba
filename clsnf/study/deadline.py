"""A study that ends in time: what trials and winners cost, and what can still end.

The driver alone looks at the clock. A trial is handed out where its estimated cost fits before the
time that is kept for the winners. Trials that still run when that time comes are stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from clsnf.core.durations import duration
from clsnf.core.errors import OutputError, SettingsError
from clsnf.results import FinishedCategory, TrialResult, read_result
from clsnf.study.names import in_full
from clsnf.study.space import changes_training

# What a trial must compute anew, the costly first: it trains, it lets the learning rate fall after
# another number of epochs, it trains flows, or it weighs stored maps.
Work = Literal["training", "decay", "flows"]
_COSTLY_FIRST: tuple[Work, ...] = ("training", "decay", "flows")

_UPPER = 0.9  # the quantile of seen costs that the next one is taken to be
_MARGIN = 1.25  # and its factor, because the next may be of a kind that was not seen yet
# A category's winner takes 0.4 to 0.7 times as long as its longest trial, and a few seconds for
# what does not grow with the trials. Both measured on the demo at 64 and 160 px.
_WINNER_SHARE, _WINNER_SECONDS = 1.0, 8.0
_REPORT_SECONDS = 5.0  # `clsnf report`, with the tables of a small study


def parse_deadline(until: str | None, hours: float | None, now: datetime) -> float | None:
    """The end of a study, in seconds since the epoch; None where neither is given.

    Args:
        until: a time of day such as ``06:30``, the next one in local time, or an ISO date with a
            time.
        hours: from now.
        now: local time, without a time zone.

    Raises:
        SettingsError: both are given, or one makes no sense.
    """
    if until is not None and hours is not None:
        raise SettingsError("--until and --hours both say when the study ends: give one of them.")
    if hours is not None:
        if not 0 < hours < math.inf:
            raise SettingsError(f"--hours is {hours!r}: it must be above 0, such as 8 or 0.5.")
        return now.timestamp() + 3600 * hours
    return None if until is None else _end_of(until, now)


def _end_of(until: str, now: datetime) -> float:
    try:
        at = datetime.combine(now.date(), datetime.strptime(until, "%H:%M").time())
    except ValueError:
        at = _iso_time(until)
    else:
        at = at if at > now else at + timedelta(days=1)
    if at.timestamp() <= now.timestamp():
        raise SettingsError(f"--until {until} is over already: give a time to come.")
    return at.timestamp()


def _iso_time(until: str) -> datetime:
    try:
        if "T" in until or " " in until:  # a date alone would mean midnight
            return datetime.fromisoformat(until)
    except ValueError:
        pass
    raise SettingsError(
        f"--until {until!r} is no time: give one such as 06:30 or 2026-11-28T06:30."
    )


# ---- what trials and winners cost ----


@dataclass(frozen=True)
class _Cost:
    work: Work
    seconds: float


@dataclass
class _CategoryCosts:
    """What a category's trials took, and which artifacts they left: their settings tell."""

    costs: dict[int, _Cost] = field(default_factory=dict)
    longest: float = 0.0
    trained: set[str] = field(default_factory=set)
    decayed: set[str] = field(default_factory=set)


@dataclass
class Costs:
    """What the next trial, and the winners, will take.

    Args:
        images: category -> number of its training images; a category without trials is taken to
            cost what others cost an image.
        reuse: whether trials share artifacts.
        winner_seconds: category -> what its winner took in an earlier run.
    """

    images: Mapping[str, int]
    reuse: bool = True
    winner_seconds: Mapping[str, float] = field(default_factory=dict)
    _categories: dict[str, _CategoryCosts] = field(default_factory=dict)

    def add(self, trial: TrialResult) -> None:
        """A trial ended, in this run or in an earlier one; trials come by number."""
        own = self._categories.setdefault(trial.category, _CategoryCosts())
        if trial.number in own.costs or trial.status != "finished":
            return
        own.costs[trial.number] = _Cost(self.work_of(trial.category, trial.config), trial.seconds)
        own.longest = max(own.longest, trial.seconds)
        trained, decayed = _artifacts(trial.config)
        own.trained.add(trained)
        own.decayed.add(decayed)

    def work_of(self, category: str, config: Mapping[str, Any]) -> Work:
        """What a trial with this config must compute anew, after the trials that ended."""
        own = self._categories.get(category, _CategoryCosts())
        trained, decayed = _artifacts(config)
        if not self.reuse or trained not in own.trained:
            return "training"
        return "flows" if decayed in own.decayed else "decay"

    def trial(self, category: str, config: Mapping[str, Any]) -> float | None:
        """Seconds that a trial with this config will take, rather too many; None if unknown.

        From trials of the category with the same work to do; else from others' with that work,
        scaled by the number of images; else from trials with more to do, first the category's own.
        """
        work = self.work_of(category, config)
        for costly in reversed(_COSTLY_FIRST[: _COSTLY_FIRST.index(work) + 1]):
            found = self._seen(category, costly) or self._seen_elsewhere(category, costly)
            if found:
                return _MARGIN * _upper(found)
        return None

    def _seen(self, category: str, work: Work) -> list[float]:
        own = self._categories.get(category, _CategoryCosts())
        return [cost.seconds for cost in own.costs.values() if cost.work == work]

    def _seen_elsewhere(self, category: str, work: Work) -> list[float]:
        return [
            seconds * self.images[category] / self.images[other]
            for other in self._categories
            if other != category
            for seconds in self._seen(other, work)
        ]

    def winner(self, category: str) -> float:
        """Seconds that a category's winner and its evidence will take, rather too many."""
        own = self._categories.get(category, _CategoryCosts())
        estimate = _WINNER_SHARE * own.longest + _WINNER_SECONDS
        return _MARGIN * self.winner_seconds.get(category, estimate)


def _artifacts(config: Mapping[str, Any]) -> tuple[str, str]:
    """What decides a trial's training, and its finetuned backbone."""
    named = sorted((name, repr(value)) for name, value in in_full(config).items())
    decayed = [item for item in named if changes_training(item[0])]
    trained = [item for item in decayed if item[0] != "finetune.joint_epochs"]
    return str(trained), str(decayed)


def _upper(seconds: Sequence[float]) -> float:
    """The upper quantile of seen costs: one of them."""
    ordered = sorted(seconds)
    return ordered[min(len(ordered) - 1, math.ceil(_UPPER * len(ordered)) - 1)]


# ---- the end ----


class Deadline:
    """The end of a study, and what can still end before it.

    Args:
        at: seconds since the epoch.
        costs: of trials and winners; it learns as trials end.
        at_once: number of trials, and of winners, at the same time.
        clock: returns seconds since the epoch.
    """

    def __init__(
        self, at: float, costs: Costs, at_once: int, clock: Callable[[], float] = time.time
    ) -> None:
        self.at, self.costs, self._at_once, self._clock = at, costs, at_once, clock

    def seconds_left(self) -> float:
        """Until the end; below 0 after it."""
        return self.at - self._clock()

    def kept(self, categories: Iterable[str]) -> float:
        """Seconds that the winners of these categories and the report will take."""
        costs = [self.costs.winner(category) for category in categories]
        if not costs:
            return 0.0
        # The bound for tasks that are handed out as places get free.
        return sum(costs) / self._at_once + max(costs) * (1 - 1 / self._at_once) + _REPORT_SECONDS

    def fits(self, category: str, config: Mapping[str, Any], winners: Iterable[str]) -> bool:
        """Whether a trial can end in time.

        A trial of which nothing is known may begin while there is time at all.

        Args:
            category: of the trial.
            config: its values.
            winners: categories that will have a winner, this one included.
        """
        needed = self.costs.trial(category, config) or 0.0
        return needed + self.kept(winners) < self.seconds_left()

    def is_over(self, winners: Iterable[str]) -> bool:
        """Whether the time that is kept for these categories' winners has come."""
        return self.seconds_left() <= self.kept(winners)

    # ---- for people ----

    @property
    def name(self) -> str:
        """The end in local time, with the date where it is not today."""
        at, today = datetime.fromtimestamp(self.at), datetime.fromtimestamp(self._clock()).date()
        return f"{at:%H:%M:%S}" if at.date() == today else f"{at:%Y-%m-%d %H:%M:%S}"

    def begin_line(self) -> str:
        """When the study ends."""
        return f"ends at {self.name}, in {duration(self.seconds_left())}"

    def kept_line(self, winners: Iterable[str]) -> str:
        """How much time is left, and what for."""
        kept = self.kept(winners)
        left = f"{self.name} is in {duration(max(0.0, self.seconds_left()))}"
        return f"{left}, and winners, evidence and report need {duration(kept)}" if kept else left

    def why_not(self, category: str, config: Mapping[str, Any], winners: Iterable[str]) -> str:
        """Why a trial does not fit any more."""
        cost = self.costs.trial(category, config)
        trial = "" if cost is None else f", a trial of {category} {duration(cost)}"
        return self.kept_line(winners) + trial


def read_winner_seconds(folders: Sequence[Path], categories: Iterable[str]) -> dict[str, float]:
    """What the winners of these categories took in earlier runs, whose folders these are."""
    found = {}
    for folder in folders:
        for category in categories:
            with suppress(OutputError):
                path = folder / "finished" / f"{category}.json"
                found[category] = read_result(FinishedCategory, path).result.seconds
    return {category: seconds for category, seconds in found.items() if seconds is not None}
