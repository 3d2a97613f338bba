"""Several objectives: the trials that no other trial beats in all of them, each saved as a
detector.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from clsnf.core.config import StudySettings
from clsnf.core.progress import Progress
from clsnf.detector import Detector
from clsnf.study.folder import StudyPlan
from clsnf.study.latency import LATENCY
from clsnf.study.space import apply_config
from clsnf.study.trial import workbench


def objectives_of(study: StudySettings) -> dict[str, Literal["maximize", "minimize"]]:
    """Names in a trial's report, each with the direction that Optuna wants."""
    return {
        name if name == LATENCY else f"validation_{name}": "minimize"
        if name == LATENCY
        else "maximize"
        for name in study.objectives
    }


def front(trials: list[dict[str, Any]], objectives: Mapping[str, str]) -> list[dict[str, Any]]:
    """The trials that no other one is at least as good as in every objective and better in one; the
    best in the first objective first.

    Args:
        trials: records with ``figures``.
        objectives: as :func:`objectives_of` gives them.
    """
    signs = [1 if direction == "maximize" else -1 for direction in objectives.values()]

    def values(trial: dict[str, Any]) -> list[float]:
        return [sign * trial["figures"][name] for sign, name in zip(signs, objectives, strict=True)]

    def is_beaten(own: list[float]) -> bool:
        return any(
            all(o >= v for o, v in zip(other, own, strict=True)) and other != own
            for other in map(values, trials)
        )

    return sorted(
        (trial for trial in trials if not is_beaten(values(trial))), key=values, reverse=True
    )


def save_front(
    plan: StudyPlan, category: str, trials: list[dict[str, Any]], progress: Progress
) -> list[dict[str, Any]]:
    """Save the detectors of the front below ``front/<category>/``; returns trial, config,
    objectives and folder of each.
    """
    objectives = objectives_of(plan.study_settings)
    saved = []
    train = plan.train_table(category)
    for trial in front(trials, objectives):
        settings = apply_config(plan.detector_settings, trial["config"])
        detector = Detector.from_pipeline(
            workbench(plan, category, settings).prepared, train, settings, progress
        )
        folder = f"front/{category}/trial-{trial['trial']}"
        detector.save(plan.folder / folder)
        saved.append(
            {
                "trial": trial["trial"],
                "config": trial["config"],
                "objectives": {
                    name.removeprefix("validation_"): trial["figures"][name] for name in objectives
                },
                "detector": plan.place_of(folder),
            }
        )
    return saved
