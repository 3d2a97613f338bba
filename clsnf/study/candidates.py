"""Candidates: a trial's maps fused with one of the swept weights, as the detector that they make.

Winners are picked from them, and with several objectives the Pareto front is made of them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from clsnf.core.config import DetectorSettings
from clsnf.evaluation.selection import SweptWeight, best_weight
from clsnf.metrics import METRICS
from clsnf.results import LATENCY, TrialResult
from clsnf.study.context import StudyContext
from clsnf.study.space import settings_of_trial
from clsnf.study.trial import reported_metrics, swept_maps
from clsnf.study.worker import WORKBENCHES

_SCORES = "image_auroc"  # what the weight of image scores is chosen by


@dataclass(frozen=True)
class Candidate:
    """A trial's maps, fused with some weight.

    Attributes:
        trial: whose maps.
        weight: the fusion weight of the map.
        score_weight: the fusion weight that image scores are taken from.
        families: the first objective on each defect family.
        objectives: name -> value, of the finished detector: image metrics are those at
            `score_weight`.
    """

    trial: TrialResult
    weight: float
    score_weight: float
    families: tuple[float, ...]
    objectives: dict[str, float]

    def settings(self, base: DetectorSettings) -> DetectorSettings:
        """The settings of the detector; `base` are those that every trial starts from."""
        return dataclasses.replace(
            settings_of_trial(base, self.trial.config),
            fusion_weight=self.weight,
            score_weight=self.score_weight,
        )


def candidates_of(
    context: StudyContext, category: str, trial: TrialResult
) -> tuple[list[Candidate], list[SweptWeight]]:
    """The candidates of a finished trial, by rising fusion weight, and the sweep behind them.

    The weight of the map that outlines defects is chosen by the objectives. Image scores have a
    weight of their own, unless the settings give one: an image's score is its largest pixel, and in
    single pixels the classifier is wrong more often than the density. It is the swept one with the
    largest image AUROC, mean over the defect families; of equals, the smallest.

    Args:
        context: the study.
        category: whose trial.
        trial: a finished one.
    """
    settings = settings_of_trial(context.settings, trial.config)
    bench = WORKBENCHES.get(context, category, settings)
    swept = swept_maps(context, bench, settings)
    by_score = best_weight(swept, _SCORES)
    if settings.score_weight is not None:
        epochs, depth = settings.finetune.joint_epochs, settings.flow.depth
        names = reported_metrics(context.study)
        (by_score,) = bench.sweep(epochs, depth, names, (settings.score_weight,))
    candidates = [
        Candidate(
            trial,
            at.fusion_weight,
            by_score.fusion_weight,
            at.values(context.study.objective),
            {name: _value(name, trial, at, by_score) for name in context.study.objectives},
        )
        for at in swept
    ]
    return candidates, swept


def _value(name: str, trial: TrialResult, at: SweptWeight, by_score: SweptWeight) -> float:
    if name == LATENCY:
        return trial.value_of(LATENCY)
    return (by_score if METRICS[name].kind == "image" else at).mean(name)
