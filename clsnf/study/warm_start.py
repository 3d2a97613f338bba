"""Starting from an earlier study: its best points are tried first.

Their metrics are not taken over: they may come from other images or another version. Where nothing
changed, trying the points again costs little; where something did, their metrics are measured anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from clsnf.core.errors import DataError, OutputError
from clsnf.results import TrialResult, read_trials, stored_choice
from clsnf.study.points import Distributions, is_value
from clsnf.study.space import FUSION_WEIGHT

_MOST = 3


def read_earlier_trials(folder: Path | None) -> list[TrialResult]:
    """The trials of an earlier study; none without a folder.

    Raises:
        DataError: the folder holds no study's trials.
    """
    if folder is None:
        return []
    try:
        return read_trials(folder / "trials.parquet")
    except OutputError as error:
        raise DataError(
            f"{folder} holds no trials of an earlier study to start from (no readable "
            "trials.parquet)."
        ) from error


def best_points(trials: Sequence[TrialResult], category: str) -> list[dict[str, Any]]:
    """The configs of a category's best trials without their fusion weights, best first.

    At most three different ones.
    """
    finished = [
        (trial.objective, {n: v for n, v in trial.config.items() if n != FUSION_WEIGHT})
        for trial in trials
        if trial.category == category and trial.objective is not None
    ]
    points: list[dict[str, Any]] = []
    for _, config in sorted(finished, key=lambda item: -item[0]):
        if config not in points:
            points.append(config)
    return points[:_MOST]


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
    unknown = sorted({name for point in earlier for name in point} - start.keys())
    points, missing, outside = [], set[str](), set[str]()
    for point in earlier:
        fitting = {
            name: value
            for name, value in point.items()
            if name in start and is_value(distributions[name], stored_choice(value))
        }
        missing |= start.keys() - point.keys()
        outside |= point.keys() & start.keys() - fitting.keys()
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
