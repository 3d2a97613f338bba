"""Several objectives: every candidate on the Pareto front is saved as a detector."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from clsnf.core.config import StudySettings
from clsnf.core.progress import Progress
from clsnf.detector import Detector
from clsnf.evaluation.pareto import pareto_front
from clsnf.results import FrontMember
from clsnf.study.candidates import Candidate
from clsnf.study.context import StudyContext
from clsnf.study.trials import directions_of
from clsnf.study.worker import WORKBENCHES


def front_of(candidates: Sequence[Candidate], study: StudySettings) -> list[Candidate]:
    """The candidates on the Pareto front of the study's objectives, best in the first one first.

    Trials with equal values are all on the front. Of equal weights of one trial, the first is.
    """
    signs = [1.0 if way == "maximize" else -1.0 for way in directions_of(study).values()]
    distinct: dict[tuple[float, ...], Candidate] = {}
    for candidate in candidates:
        values = tuple(candidate.objectives[name] for name in study.objectives)
        distinct.setdefault((candidate.trial.number, *values), candidate)
    own = list(distinct.values())
    higher = np.array([values[1:] for values in distinct], np.float64).reshape(len(own), len(signs))
    higher *= signs  # higher is better
    front = sorted(pareto_front(higher), key=lambda n: tuple(higher[n]), reverse=True)
    return [own[n] for n in front]


def save_front(
    context: StudyContext, category: str, front: Sequence[Candidate], progress: Progress
) -> list[FrontMember]:
    """Save the detectors of the Pareto front below ``front/<category>/``."""
    if not front:
        return []
    train = context.folder.train_table(category)
    saved = []
    for candidate in front:
        settings = candidate.settings(context.settings)
        prepared = WORKBENCHES.get(context, category, settings).prepared
        detector = Detector.from_pipeline(prepared, train, settings, progress)
        name = f"front/{category}/trial-{candidate.trial.number}-weight-{candidate.weight:g}"
        detector.save(context.folder.path / name)
        saved.append(
            FrontMember(
                trial=candidate.trial.number,
                config={
                    **candidate.trial.config,
                    "fusion_weight": candidate.weight,
                    "score_weight": candidate.score_weight,
                },
                objectives=candidate.objectives,
                detector=context.folder.location_of(name),
            )
        )
    return saved
