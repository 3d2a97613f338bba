"""Metrics that choices are based on: of validation normals and validation defects, by family.

A defect family's metric is computed on the family's own images and all validation normals. The
objective is the plain mean over the families. A family with large, easy defects therefore can't
hide one with small defects. Nothing here reads test images.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clsnf.core.config import DetectorSettings, Fusion
from clsnf.core.errors import SettingsError, nearest
from clsnf.data.images import Placement, image_size, place_mask, read_mask
from clsnf.evaluation.selection_rules import pick
from clsnf.metrics import METRICS, FamilyPixels, evaluate_families, image_auroc
from clsnf.model.score_maps import Scores, image_scores
from clsnf.results import Metrics
from clsnf.training.pipeline import PlacedImages, ScoreMaps

NORMAL = "good"  # the family of images without defects


@dataclass(frozen=True)
class ValidationLabels:
    """What is known of the validation images, placed as the images are.

    Attributes:
        families: (N,) name of the defect family, ``good`` for a normal.
        masks: (N, H, W) bool.
        valid: (N, H, W) bool, False on padding, or None.
    """

    families: tuple[str, ...]
    masks: NDArray[np.bool_]
    valid: Tensor | None

    @property
    def is_normal(self) -> NDArray[np.bool_]:
        """(N,), True for a normal."""
        return np.array(self.families) == NORMAL

    def by_family(self) -> dict[str, NDArray[np.intp]]:
        """Defect family, in alphabetical order -> indices of all normals, then of its images."""
        normals = np.flatnonzero(self.is_normal)
        return {
            family: np.concatenate([normals, members])
            for family, members in self._members().items()
        }

    @cached_property
    def pixels(self) -> FamilyPixels:
        """The masks, worked through for pixel metrics by family."""
        valid = None if self.valid is None else self.valid.numpy()
        normals = np.flatnonzero(self.is_normal)
        return FamilyPixels(self.masks, valid, normals, self._members())

    def _members(self) -> dict[str, NDArray[np.intp]]:
        families = np.array(self.families)
        return {
            family: np.flatnonzero(families == family)
            for family in sorted(set(self.families) - {NORMAL})
        }


def validation_labels(
    rows: list[dict[str, Any]], settings: DetectorSettings, images: PlacedImages
) -> ValidationLabels:
    """Families and masks of a table's rows, the masks placed as the images are."""
    masks = np.zeros((len(rows), *settings.image.size), bool)
    for placed, row in zip(masks, rows, strict=True):
        if row["mask_path"] is not None:
            placement = Placement.of(image_size(row["path"]), settings.image)
            placed[:] = _place_visibly(read_mask(row["mask_path"]), placement)
    return ValidationLabels(tuple(row["defect_type"] for row in rows), masks, images.valid)


def _place_visibly(mask: NDArray[np.bool_], placement: Placement) -> NDArray[np.bool_]:
    """A mask (h, w) placed as its image is, (H, W).

    A defect so small that it vanishes in scaling marks the pixels that it lies in: without a defect
    pixel, its family's metrics would not be defined.
    """
    placed: NDArray[np.bool_] = place_mask(mask, placement).numpy()
    if mask.any() and not placed.any():
        rows, columns = mask.nonzero()
        height, width = placement.source
        placed[
            placement.top + rows * placement.height // height,
            placement.left + columns * placement.width // width,
        ] = True
    return placed


def check_objective(name: str) -> None:
    """Refuse an objective that is no metric, or a metric that is an oracle.

    Raises:
        SettingsError: naming the valid ones.
    """
    usable = [n for n, metric in METRICS.items() if not metric.oracle]
    if name not in usable:
        raise SettingsError(f"The objective is {name!r}.{nearest(name, usable)}")


def scores_of_map(maps: Tensor, valid: Tensor | None) -> Scores:
    """The answers of a system with a single map: image scores are the maps' largest values.

    Args:
        maps: (N, H, W).
        valid: (N, H, W) bool, False on padding; None where there is none.
    """
    return Scores(maps if valid is None else maps * valid, image_scores(maps, valid))


def scores_at(maps: ScoreMaps, weight: float, valid: Tensor | None) -> Scores:
    """The answers at one fusion weight, for the fused maps and for the image scores alike.

    Args:
        maps: of N images.
        weight: the fusion weight.
        valid: (N, H, W) bool, False on padding; None where there is none.
    """
    return maps.scores(Fusion(weight, smoothing=maps.smoothing), valid)


def family_metrics(
    answers: Scores, labels: ValidationLabels, names: tuple[str, ...]
) -> dict[str, Metrics]:
    """Metrics for each defect family.

    Args:
        answers: maps and scores of the validation images.
        labels: of the same images.
        names: metrics of :data:`clsnf.metrics.METRICS`.

    Returns:
        Family -> metric -> value in [0, 1].
    """
    return evaluate_families(
        answers.scores.numpy(),
        answers.maps.numpy(),
        ~labels.is_normal,
        labels.by_family(),
        labels.pixels,
        names,
    )


def mean_over_families(metrics: dict[str, Metrics], name: str) -> float:
    """The plain mean of one metric over the families; of the objective, what is maximized."""
    return float(np.mean([family[name] for family in metrics.values()]))


@dataclass(frozen=True)
class SweptWeight:
    """The metrics at one fusion weight, of the map and of the image scores alike.

    Attributes:
        fusion_weight: of the map.
        families: defect family -> metric -> value.
    """

    fusion_weight: float
    families: dict[str, Metrics]

    def values(self, name: str) -> tuple[float, ...]:
        """A metric on each family."""
        return tuple(metrics[name] for metrics in self.families.values())

    def mean(self, name: str) -> float:
        """The plain mean of a metric over the families."""
        return mean_over_families(self.families, name)


def sweep_weights(
    maps: ScoreMaps, labels: ValidationLabels, names: tuple[str, ...], weights: Iterable[float]
) -> list[SweptWeight]:
    """The metrics at each fusion weight, from maps that are computed already.

    Args:
        maps: of the validation images.
        labels: of the same images.
        names: metrics of :data:`clsnf.metrics.METRICS`.
        weights: to try.
    """
    with torch.inference_mode():
        return [
            SweptWeight(
                weight, family_metrics(scores_at(maps, weight, labels.valid), labels, names)
            )
            for weight in map(float, weights)
        ]


def best_weight(swept: Sequence[SweptWeight], objective: str) -> SweptWeight:
    """The swept weight with the largest mean of a metric; of equals, the first."""
    return swept[pick("mean", [at.values(objective) for at in swept])]


def choose_score_weight(
    maps: ScoreMaps, labels: ValidationLabels, weights: Iterable[float]
) -> float:
    """The fusion weight whose map gives the best image scores.

    Best is the largest image AUROC, mean over the defect families; of equals, the smallest weight.

    The weight of the map that outlines defects is chosen by pixels. Image scores have a weight of
    their own: an image's score is its largest pixel, and in single pixels the classifier is wrong
    more often than the density.

    Args:
        maps: of the validation images.
        labels: of the same images.
        weights: to choose from.
    """
    values = {}
    for weight in map(float, weights):
        scores = image_scores(maps.fused(weight), labels.valid).numpy()
        values[weight] = np.mean(_family_aurocs(scores, labels))
    return max(values, key=lambda weight: (values[weight], -weight))


def _family_aurocs(scores: NDArray[np.float32], labels: ValidationLabels) -> list[float]:
    is_defect = ~labels.is_normal
    return [
        image_auroc(scores[chosen], is_defect[chosen]) for chosen in labels.by_family().values()
    ]
