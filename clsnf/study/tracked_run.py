"""What trackers are told: trials, winners, and the study's files, each as one flat run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from clsnf.core.hashing import content_key
from clsnf.results import StudySummary, TrialResult, TrialStatus, WinnerResult, to_plain
from clsnf.study.names import spread

# What the study itself leaves, as far as it exists. The report is there where an earlier run of the
# study has one.
_STUDY_FILES = ("summary.json", "trials.parquet", "report/report.html")


@dataclass(frozen=True)
class TrackedRun:
    """A run as trackers know them.

    Attributes:
        kind: ``trial``, ``winner`` or ``study``.
        key: distinct for everything that a study sends; the same when it is sent again.
        name: for people.
        category: the product; empty for the study.
        status: how it ended.
        cause: why it failed.
        ended_at: seconds since the epoch; None where that is not known.
        seconds: that it took.
        config: name of a setting -> value.
        metrics: name -> finite value.
        step: what charts have on their x axis: the trial's number.
        files: entries of the study's folder that belong to it.
    """

    kind: Literal["trial", "winner", "study"]
    key: str
    name: str
    category: str = ""
    status: TrialStatus = "finished"
    cause: str | None = None
    ended_at: float | None = None
    seconds: float = 0.0
    config: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    step: int = 0
    files: tuple[str, ...] = ()


def run_of_trial(trial: TrialResult, at: float | None) -> TrackedRun:
    """A trial that ended at `at`; one that did not finish has no objective."""
    measured = dict(trial.measured.flat())
    if trial.objective is not None:
        measured["objective"] = trial.objective
    return TrackedRun(
        kind="trial",
        key=f"trial/{trial.category}/{trial.number}",
        name=f"{trial.category}-{trial.number}",
        category=trial.category,
        status=trial.status,
        cause=trial.cause,
        ended_at=at,
        seconds=trial.wall_seconds or 0.0,
        config=spread(trial.config),
        metrics=_numbers(measured),
        step=trial.number,
    )


def run_of_winner(category: str, winner: WinnerResult) -> TrackedRun:
    """A category's winner with its metrics, its detector and the sheet of examples."""
    metrics = {f"validation_{name}": value for name, value in winner.validation.metrics.items()}
    if winner.test is not None:
        test: dict[str, Any] = {**winner.test.metrics, "recall": winner.test.recall}
        test["false_reject_rate"] = winner.test.false_reject_rate
        metrics |= {f"test_{name}": value for name, value in test.items()}
    # A study that goes on may find another winner, and that is another run.
    found = content_key([winner.trial, to_plain(winner.settings), winner.chosen])[:12]
    return TrackedRun(
        kind="winner",
        key=f"winner/{category}/{found}",
        name=f"{category}-winner",
        category=category,
        seconds=winner.seconds or 0.0,
        config={**winner.chosen, "trial": winner.trial},
        metrics=_numbers(metrics | {"threshold": winner.threshold.value}),
        step=winner.trial,
        files=(f"winners/{category}", f"examples/{category}.png"),
    )


def run_of_study(summary: StudySummary, out: Path) -> TrackedRun:
    """The study's own files in the folder `out`: its results, and the report if there is one."""
    files = tuple(name for name in _STUDY_FILES if (out / name).is_file())
    return TrackedRun(
        kind="study",
        key=f"study/{content_key([summary.at, *files])[:12]}",
        name="study",
        seconds=summary.seconds,
        config={"backbone": summary.backbone, "categories": len(summary.categories)},
        files=files,
    )


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }
