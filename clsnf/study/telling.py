"""Tune's callback: a plain record of every ended trial."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.tune import Callback

from clsnf.study.search import CATEGORY

_FIGURES = ("validation_", "family_", "stages_")


class Telling(Callback):
    """Keeps a record of every ended trial and passes it on.

    Attributes:
        records: category, trial, status (``finished`` or ``failed``), cause, config, objective, seconds, figures.
    """

    def __init__(self, tell: Callable[[dict[str, Any]], None]) -> None:
        self.records: list[dict[str, Any]] = []
        self._tell = tell

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its callbacks; a terminal can't be."""
        return {"records": self.records, "_tell": _silent}

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial finished."""
        self._add(trial, "finished", None)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial failed for good."""
        self._add(trial, "failed", _cause(trial))

    def _add(self, trial: Any, status: str, cause: str | None) -> None:
        result = trial.last_result or {}
        record = {
            "category": trial.config[CATEGORY],
            "trial": trial.trial_id,
            "status": status,
            "cause": cause,
            "config": {k: v for k, v in trial.config.items() if k != CATEGORY},
            "objective": result.get("objective") if status == "finished" else None,
            "seconds": result.get("seconds"),
            "figures": {k: v for k, v in result.items() if k.startswith(_FIGURES)},
        }
        self.records.append(record)
        self._tell(record)


def _silent(record: dict[str, Any]) -> None:
    """Tell nobody."""


def _cause(trial: Any) -> str:
    """The last line of a failed trial's traceback: what a person needs to read first."""
    text = ""
    if trial.error_file and os.path.isfile(trial.error_file):
        text = Path(trial.error_file).read_text(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].removeprefix("clsnf.errors.") if lines else "ended without a message"
