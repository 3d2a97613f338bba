"""Starting from what is known: best points of an earlier study, or of other categories.

Their metrics are not taken over: they may come from other images or another version. Where nothing
changed, trying the points again costs little; where something did, their metrics are measured anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from optuna.distributions import BaseDistribution

from clsnf.core.errors import DataError, OutputError
from clsnf.results import TrialResult, choice_from_stored, stored_choice, trials_of_study
from clsnf.study.names import spread
from clsnf.study.points import Distributions, is_value
from clsnf.study.trials import MOST_SHARED, without_fusion_weight

_MOST = 3
_ABSENT = object()  # equal to no value


def read_earlier_trials(folder: Path | None) -> list[TrialResult]:
    """The trials of an earlier study; none without a folder.

    Raises:
        DataError: the folder holds no study's trials.
    """
    if folder is None:
        return []
    try:
        return trials_of_study(folder)
    except OutputError as error:
        raise DataError(
            f"{folder} holds no trials of an earlier study to start from (no readable "
            "trials.parquet or optuna.journal)."
        ) from error


def best_points(trials: Sequence[TrialResult], category: str) -> list[dict[str, Any]]:
    """The points of earlier trials that a category tries first, without their fusion weights.

    Its own best ones, best first, at most three; then those that won on other categories, at most
    two, as :func:`points_of_others` orders them.
    """
    own = [
        (trial.objective, without_fusion_weight(trial.config))
        for trial in trials
        if trial.category == category and trial.objective is not None
    ]
    points: list[dict[str, Any]] = []
    for _, config in sorted(own, key=lambda item: -item[0]):
        if config not in points:
            points.append(config)
    return points[:_MOST] + points_of_others(trials, category)[:MOST_SHARED]


def points_of_others(trials: Iterable[TrialResult], category: str) -> list[dict[str, Any]]:
    """The best point of each other category, without its fusion weight.

    Points that won on more categories come first, among equals those of the categories whose trials
    come first.
    """
    best: dict[str, TrialResult] = {}
    for trial in trials:
        if trial.category == category or trial.objective is None:
            continue
        now = best.get(trial.category)
        if now is None or now.objective is None or trial.objective > now.objective:
            best[trial.category] = trial
    points = [without_fusion_weight(trial.config) for trial in best.values()]
    same = [str(sorted(point.items())) for point in points]
    ranked = sorted(range(len(points)), key=lambda n: (-same.count(same[n]), same.index(same[n])))
    return [points[n] for n in ranked if same.index(same[n]) == n]


def _settings_of(distribution: BaseDistribution) -> set[str]:
    """The names in the mappings of a joint choice."""
    return {name for value in _mappings(distribution) for name in value}


def _mappings(distribution: BaseDistribution) -> list[dict[str, Any]]:
    """The values of a joint choice; none of another range."""
    choices = getattr(distribution, "choices", ())
    return [value for value in map(choice_from_stored, choices) if isinstance(value, dict)]


def _value_in(point: Mapping[str, Any], name: str, distribution: BaseDistribution) -> Any:
    """What a point of another space has for a name of this one; `_ABSENT` where nothing fits.

    For a joint choice that is the mapping which agrees with the point, the longest of them.
    """
    own = spread(point)
    mappings = _mappings(distribution)
    if mappings:
        agree = [m for m in mappings if all(own.get(n, _ABSENT) == v for n, v in m.items())]
        return max(agree, key=len, default=_ABSENT)
    value = own.get(name, _ABSENT)
    fits = value is not _ABSENT and is_value(distribution, stored_choice(value))
    return value if fits else _ABSENT


def points_of_space(
    earlier: Sequence[Mapping[str, Any]],
    start: Mapping[str, Any],
    distributions: Distributions,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Earlier points as points of this space.

    Names that only the earlier space had are left out. A name that only this one has, or whose
    earlier value lies outside its range, gets the value of `start`, that of the study's settings.

    Args:
        earlier: points of another space.
        start: a point of this space.
        distributions: of this space.
        say: gets one line where names differ, or where nothing fits.
    """
    known = {full for name in start for full in _settings_of(distributions[name])} | set(start)
    unknown = sorted({name for point in earlier for name in spread(point)} - known)
    points, missing, outside = [], set[str](), set[str]()
    for point in earlier:
        values = {name: _value_in(point, name, ranges) for name, ranges in distributions.items()}
        fitting = {name: value for name, value in values.items() if value is not _ABSENT}
        names = spread(point).keys()
        has = {n for n, d in distributions.items() if n in point or names & _settings_of(d)}
        missing |= start.keys() - has
        outside |= has - fitting.keys()
        if fitting or not start:
            points.append({**start, **fitting})
    parts = [
        f"{', '.join(unknown)} left out, as this space does not have it" if unknown else "",
        f"{', '.join(sorted(missing))} from the settings, as that space did not have it"
        if missing
        else "",
        f"{', '.join(sorted(outside))} from the settings where the value is outside this space"
        if outside
        else "",
    ]
    if any(parts):
        found = f"{len(points)} of {len(earlier)} earlier points are tried"
        say(f"warm start: {found}; {'; '.join(part for part in parts if part)}")
    return points
