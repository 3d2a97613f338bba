"""Several objectives: every trial on the Pareto front is saved as a detector."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from clsnf.core.config import StudySettings
from clsnf.core.progress import Progress
from clsnf.detector import Detector
from clsnf.evaluation.pareto import pareto_front
from clsnf.results import FrontMember, TrialResult
from clsnf.study.context import StudyContext
from clsnf.study.space import apply_config
from clsnf.study.trials import directions_of
from clsnf.study.worker import WORKBENCHES


def front_of(trials: Sequence[TrialResult], study: StudySettings) -> list[TrialResult]:
    """The trials on the Pareto front of the study's objectives, the best in the first one first.

    Trials with equal values are all on the front.
    """
    signs = [1.0 if way == "maximize" else -1.0 for way in directions_of(study).values()]
    values = np.array(
        [[trial.value_of(name) for name in study.objectives] for trial in trials], np.float64
    ).reshape(len(trials), len(signs))
    values *= signs  # higher is better
    front = sorted(pareto_front(values), key=lambda n: tuple(values[n]), reverse=True)
    return [trials[n] for n in front]


def save_front(
    context: StudyContext, category: str, trials: Sequence[TrialResult], progress: Progress
) -> list[FrontMember]:
    """Save the detectors on the Pareto front below ``front/<category>/``."""
    train = context.folder.train_table(category)
    saved = []
    for trial in front_of(trials, context.study):
        settings = apply_config(context.settings, trial.config)
        prepared = WORKBENCHES.get(context, category, settings).prepared
        detector = Detector.from_pipeline(prepared, train, settings, progress)
        name = f"front/{category}/trial-{trial.number}"
        detector.save(context.folder.path / name)
        saved.append(
            FrontMember(
                trial=trial.number,
                config=trial.config,
                objectives={name: trial.value_of(name) for name in context.study.objectives},
                detector=context.folder.location_of(name),
            )
        )
    return saved
