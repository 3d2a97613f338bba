"""Starting from what is known: best points of an earlier study, or of other categories.

Their metrics are not taken over: they may come from other images or another version. Where nothing
changed, trying the points again costs little; where something did, their metrics are measured anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from clsnf.core.errors import DataError, OutputError
from clsnf.results import TrialResult, trials_of_study
from clsnf.study.trials import MOST_SHARED, without_fusion_weight

_MOST = 3


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
    """The points of earlier trials that a category tries first.

    Its own best ones, best first, at most three; then those that won on other categories, at most
    two, as :func:`points_of_others` orders them.
    """
    own = [
        (trial.objective, trial.config)
        for trial in trials
        if trial.category == category and trial.objective is not None
    ]
    best = [config for _, config in sorted(own, key=lambda item: -item[0])[:_MOST]]
    return best + points_of_others(trials, category)[:MOST_SHARED]


def points_of_others(trials: Iterable[TrialResult], category: str) -> list[dict[str, Any]]:
    """The best point of each other category.

    Points that won on more categories come first, among equals those of the categories whose trials
    come first. Points that differ in the fusion weight alone count as one.
    """
    best: dict[str, TrialResult] = {}
    for trial in trials:
        if trial.category == category or trial.objective is None:
            continue
        now = best.get(trial.category)
        if now is None or now.objective is None or trial.objective > now.objective:
            best[trial.category] = trial
    points = [trial.config for trial in best.values()]
    same = [str(sorted(without_fusion_weight(point).items())) for point in points]
    ranked = sorted(range(len(points)), key=lambda n: (-same.count(same[n]), same.index(same[n])))
    return [points[n] for n in ranked if same.index(same[n]) == n]
