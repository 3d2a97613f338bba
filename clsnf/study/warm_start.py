"""Starting from an earlier study: its best points are tried first.

Their metrics are not taken over: they may come from other images or another version. Where nothing
changed, trying the points again costs little; where something did, their metrics are measured anew.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clsnf.core.errors import DataError, OutputError
from clsnf.results import TrialResult, trials_of_study

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


def best_points(trials: list[TrialResult], category: str) -> list[dict[str, Any]]:
    """The configs of a category's best trials, best first, at most three."""
    finished = [
        (trial.objective, trial.config)
        for trial in trials
        if trial.category == category and trial.objective is not None
    ]
    return [config for _, config in sorted(finished, key=lambda item: -item[0])[:_MOST]]
