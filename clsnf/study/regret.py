"""Regret: what a study's choices lose against an oracle that picks on the test images.

It is computed after selection, and selection never sees it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import pyarrow as pa

from clsnf.core.config import DetectorSettings
from clsnf.core.progress import Progress
from clsnf.evaluation.selection import (
    ValidationLabels,
    family_metrics,
    scores_at,
    validation_labels,
)
from clsnf.results import Metrics, OracleLoss, Regret, TrialResult
from clsnf.study.context import StudyContext
from clsnf.study.space import settings_of_trial
from clsnf.study.worker import WORKBENCHES
from clsnf.training.pipeline import PlacedImages
from clsnf.training.prepare import place_rows

METRICS = ("pixel_ap", "image_auroc")
# Test pixels that the networks of all trials may see for a regret that nobody asked for. That is
# ten networks and 100 images of 256 x 256: well under a minute of one core with ResNet-18.
_CHEAP = 1 << 26


def wants_regret(context: StudyContext, trials: Sequence[TrialResult], test_images: int) -> bool:
    """Whether a category's regret is computed: as the study says, else where it is cheap.

    Every pair of backbone and flows that was tried must run over all test images.

    Args:
        context: the study.
        trials: the category's finished trials.
        test_images: how many there are.
    """
    if context.study.regret is not None:
        return context.study.regret
    networks = {
        dataclasses.replace(
            settings_of_trial(context.settings, trial.config), fusion_weight=0.0, score_weight=None
        )
        for trial in trials
    }
    pixels = sum(each.image.height * each.image.width for each in networks)
    return pixels * test_images <= _CHEAP


class Pick(Protocol):
    """What a selection rule picks: a trial's maps with a fusion weight."""

    @property
    def trial(self) -> TrialResult: ...
    @property
    def weight(self) -> float: ...


class TestMetrics:
    """Metrics of settings on the test images, at the network's size.

    Args:
        context, category: the study and the product.
        test: the test images' table.
    """

    __test__ = False  # pytest takes classes of this name for tests

    def __init__(self, context: StudyContext, category: str, test: pa.Table) -> None:
        self.context, self._category, self._test = context, category, test
        self._rows = test.to_pylist()
        has_masks = all(row["mask_path"] is not None for row in self._rows if row["label"])
        self.names = METRICS if has_masks else ("image_auroc",)
        self._placed: dict[str, tuple[PlacedImages, ValidationLabels]] = {}
        self._known: dict[tuple[str, float], Metrics] = {}

    @property
    def are_defined(self) -> bool:
        """Whether there are both normal and defective test images."""
        return len({bool(row["label"]) for row in self._rows}) == 2

    def of(self, settings: DetectorSettings, weight: float) -> Metrics:
        """The metrics of the settings' maps with a fusion weight; computed once."""
        key = (str(dataclasses.replace(settings, fusion_weight=0.0, score_weight=None)), weight)
        if key not in self._known:
            images, labels = self._images(settings)
            bench = WORKBENCHES.get(self.context, self._category, settings)
            maps = bench.maps(settings.finetune.joint_epochs, settings.flow.depth, images)
            answers = scores_at(maps, weight, labels.valid)
            metrics = family_metrics(answers, labels, self.names)
            self._known[key] = metrics["defect"]
        return self._known[key]

    def _images(self, settings: DetectorSettings) -> tuple[PlacedImages, ValidationLabels]:
        """The test images, with all defects in one family."""
        key = str(settings.image)
        if key not in self._placed:
            images = place_rows(self._test, settings)
            labels = validation_labels(self._rows, settings, images)
            families = tuple("defect" if row["label"] else "good" for row in self._rows)
            self._placed[key] = images, dataclasses.replace(labels, families=families)
        return self._placed[key]


def compute_regret(
    test: TestMetrics,
    trials: Sequence[TrialResult],
    selected: DetectorSettings,
    picks: Mapping[str, Pick],
    progress: Progress,
) -> Regret | None:
    """Compare what was selected with what an oracle would have picked.

    The first oracle has the winner's maps and picks their fusion weight. The second one may also
    pick any trial, with the trial's own fusion weight.

    Args:
        test: metrics on the test images.
        trials: the finished trials.
        selected: the winner's settings.
        picks: selection rule -> what it would have picked.
        progress: told about every step.

    Returns:
        None where the test images are all normal, or all defective.
    """
    if not test.are_defined:
        return None
    base = test.context.settings
    weights = np.unique(
        [*test.context.fusion_weights, selected.fusion_weight, selected.image_weight]
    )
    steps = len(weights) + len(trials) + len(picks)
    done = itertools.count(1)

    def metrics_of(settings: DetectorSettings, weight: float) -> Metrics:
        found = test.of(settings, weight)
        progress("regret", next(done), steps)
        return found

    # Key: the trial that the maps are of (None for the winner's), and the fusion weight.
    swept: dict[tuple[int | None, float], Metrics] = {
        (None, float(weight)): metrics_of(selected, float(weight)) for weight in weights
    }
    tried = dict(swept)
    for trial in trials:
        settings = settings_of_trial(base, trial.config)
        weight = settings.fusion_weight
        tried[trial.number, weight] = metrics_of(settings, weight)
    by_rule = {
        rule: metrics_of(settings_of_trial(base, pick.trial.config), pick.weight)
        for rule, pick in picks.items()
    }
    by_weight, by_trial = {}, {}
    for name in test.names:
        own_weight = selected.fusion_weight if name == "pixel_ap" else selected.image_weight
        own = swept[None, own_weight][name]
        by_weight[name] = _loss(own, swept, name)
        by_trial[name] = _loss(own, tried, name)
    return Regret(by_weight, by_trial, by_rule)


def _loss(
    selected: float, options: Mapping[tuple[int | None, float], Metrics], name: str
) -> OracleLoss:
    """What is lost against the best option; of equal ones, the first counts."""
    trial, weight = max(options, key=lambda key: options[key][name])
    best = options[trial, weight][name]
    return OracleLoss(selected, best, best - selected, trial, weight)
