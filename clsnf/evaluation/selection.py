"""What selection looks at: figures on validation normals and on validation defects, family by
family.

Unusual: a family's figure is computed on its own images and all validation normals, and the
    objective is the plain mean over the
families, so that a family with large, easy defects can't hide one with small ones. Test images are
nowhere near.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clsnf.core.config import DetectorSettings
from clsnf.core.errors import SettingsError, nearest
from clsnf.data.images import Placement, image_size, place_mask, read_mask
from clsnf.metrics import METRICS, PixelSample, evaluate, image_auroc
from clsnf.model.score_maps import image_scores
from clsnf.training.pipeline import PlacedImages, ScoreMaps


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


def validation_labels(
    rows: list[dict[str, Any]], settings: DetectorSettings, images: PlacedImages
) -> ValidationLabels:
    """Families and masks of a table's rows, the masks on the network's canvas."""
    masks = np.zeros((len(rows), *settings.image.size), bool)
    for canvas, row in zip(masks, rows, strict=True):
        if row["mask_path"] is not None:
            canvas[:] = _placed(
                read_mask(row["mask_path"]), Placement.of(image_size(row["path"]), settings.image)
            )
    return ValidationLabels(tuple(row["defect_type"] for row in rows), masks, images.valid)


def _placed(mask: NDArray[np.bool_], placement: Placement) -> NDArray[np.bool_]:
    """A mask (h, w) on the canvas (H, W); one that falls between the canvas's pixels marks those
    that it lies in.
    """
    canvas: NDArray[np.bool_] = place_mask(mask, placement).numpy()
    if mask.any() and not canvas.any():  # or the figures of its family would not be defined
        rows, columns = mask.nonzero()
        height, width = placement.source
        canvas[
            placement.top + rows * placement.height // height,
            placement.left + columns * placement.width // width,
        ] = True
    return canvas


def check_objective(name: str) -> None:
    """Refuse an objective that is no figure, or one that needs an oracle.

    Raises:
        SettingsError: naming the valid ones.
    """
    usable = [n for n, metric in METRICS.items() if not metric.oracle]
    if name not in usable:
        raise SettingsError(f"The objective is {name!r}.{nearest(name, usable)}")


def family_metrics(
    maps: ScoreMaps, labels: ValidationLabels, weight: float, names: tuple[str, ...]
) -> dict[str, dict[str, float]]:
    """Figures of the fused map for each defect family: :func:`family_metrics_of` at fusion weight
    `weight`.
    """
    return family_metrics_of(maps.fused(weight), labels, names)


def family_metrics_of(
    maps: Tensor, labels: ValidationLabels, names: tuple[str, ...], scored: Tensor | None = None
) -> dict[str, dict[str, float]]:
    """Figures of a map for each defect family.

    Args:
        maps: (N, H, W) of the validation images.
        labels: of the same images.
        names: figures of :data:`clsnf.metrics.METRICS`.
        scored: (N, H, W) maps whose largest values are the images' scores; None for `maps`.

    Returns:
        family -> figure -> value in [0, 1].
    """
    scores = image_scores(maps if scored is None else scored, labels.valid).numpy()
    arrays: NDArray[np.float32] = maps.numpy()
    valid = None if labels.valid is None else labels.valid.numpy()

    def sample(i: int) -> PixelSample:
        return PixelSample(arrays[i], labels.masks[i], None if valid is None else valid[i])

    normals = [i for i, family in enumerate(labels.families) if family == "good"]
    result = {}
    for family in sorted(set(labels.families) - {"good"}):
        chosen = normals + [i for i, f in enumerate(labels.families) if f == family]
        is_defect = np.array([labels.families[i] != "good" for i in chosen])
        result[family] = evaluate(
            scores[chosen], is_defect, [sample(i) for i in chosen], list(names)
        )
    return result


def choose_score_weight(
    candidates: Iterable[tuple[float, Tensor]], labels: ValidationLabels
) -> float:
    """The fusion weight whose map gives the best image scores: the largest mean image AUROC over
    the families, of equals the smallest.

    A map that outlines defects well is chosen by its pixels. Whether an image has one at all is
    another question: there a single pixel decides, and the classifier is more often wrong about a
    single pixel than the density is.

    Args:
        candidates: fusion weights, each with its maps (N, H, W) of the validation images; looked at
            one after the other, so that a generator needs no memory for all of them.
        labels: of the same images.
    """
    values = {}
    for weight, maps in candidates:
        scores = image_scores(maps, labels.valid).numpy()
        values[weight] = np.mean(list(_family_aurocs(scores, labels).values()))
    return max(values, key=lambda weight: (values[weight], -weight))


def _family_aurocs(scores: NDArray[np.float32], labels: ValidationLabels) -> dict[str, float]:
    families = np.array(labels.families)
    result = {}
    for family in sorted(set(labels.families) - {"good"}):
        chosen = (families == "good") | (families == family)
        result[family] = image_auroc(scores[chosen], families[chosen] == family)
    return result


def mean_over_families(figures: dict[str, dict[str, float]], name: str) -> float:
    """The objective: the plain mean of one figure over the families."""
    return float(np.mean([family[name] for family in figures.values()]))


def sweep_weights(
    maps: ScoreMaps, labels: ValidationLabels, objective: str, weights: NDArray[np.float64]
) -> list[tuple[float, dict[str, float]]]:
    """The figure for every fusion weight, from stored maps: (weight, family -> value) pairs."""
    swept = []
    with torch.inference_mode():
        for weight in weights:
            figures = family_metrics(maps, labels, float(weight), (objective,))
            swept.append(
                (float(weight), {family: values[objective] for family, values in figures.items()})
            )
    return swept
