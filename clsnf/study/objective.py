"""What selection looks at: figures on validation normals and on validation defects, family by family.

Unusual: a family's figure is computed on its own images and all validation normals, and the objective is the plain mean over the
families, so that a family with large, easy defects can't hide one with small ones. Test images are nowhere near.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clsnf.errors import SettingsError, nearest
from clsnf.metrics import METRICS, PixelSample, evaluate
from clsnf.model.score_maps import fuse, image_scores
from clsnf.training.pipeline import ScoreMaps


@dataclass(frozen=True)
class ValidationLabels:
    """What is known of the validation images, on the network's canvas.

    Attributes:
        families: (N,) name of the defect family, ``good`` for a normal.
        masks: (N, H, W) bool.
        valid: (N, H, W) bool, False on padding, or None.
    """

    families: tuple[str, ...]
    masks: NDArray[np.bool_]
    valid: Tensor | None


def check_objective(name: str) -> None:
    """Refuse an objective that is no figure, or one that needs an oracle.

    Raises:
        SettingsError: naming the valid ones.
    """
    usable = [n for n, metric in METRICS.items() if not metric.oracle]
    if name not in usable:
        raise SettingsError(f"The objective is {name!r}.{nearest(name, usable)}")


def family_figures(maps: ScoreMaps, labels: ValidationLabels, weight: float, names: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Figures of the fused map for each defect family.

    Args:
        maps: both maps of the validation images.
        labels: of the same images.
        weight: fusion weight w.
        names: figures of :data:`clsnf.metrics.METRICS`.

    Returns:
        family -> figure -> value in [0, 1].
    """
    fused = fuse(maps.density, maps.classifier, weight)
    scores = image_scores(fused, labels.valid).numpy()
    arrays: NDArray[np.float32] = fused.numpy()
    valid = None if labels.valid is None else labels.valid.numpy()

    def sample(i: int) -> PixelSample:
        return PixelSample(arrays[i], labels.masks[i], None if valid is None else valid[i])

    normals = [i for i, family in enumerate(labels.families) if family == "good"]
    result = {}
    for family in sorted(set(labels.families) - {"good"}):
        chosen = normals + [i for i, f in enumerate(labels.families) if f == family]
        is_defect = np.array([labels.families[i] != "good" for i in chosen])
        result[family] = evaluate(scores[chosen], is_defect, [sample(i) for i in chosen], list(names))
    return result


def mean_over_families(figures: dict[str, dict[str, float]], name: str) -> float:
    """The objective: the plain mean of one figure over the families."""
    return float(np.mean([family[name] for family in figures.values()]))


def sweep_weights(
    maps: ScoreMaps, labels: ValidationLabels, objective: str, weights: NDArray[np.float64]
) -> list[tuple[float, float]]:
    """The objective for every fusion weight, from stored maps: (weight, value) pairs."""
    with torch.inference_mode():
        return [(float(w), mean_over_families(family_figures(maps, labels, float(w), (objective,)), objective)) for w in weights]
