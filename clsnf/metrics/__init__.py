"""Metrics for detectors, exact and at the masks' own size.

Equal scores are one threshold. Memory is bounded by the number of defect pixels.

``METRICS`` is the registry. A new metric is one function of :class:`ScoreCounts` (images) or
:class:`PixelCounts` (pixels) and one line in it; :func:`evaluate`, its tests and every table that
names metrics then know it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clsnf.core.errors import MetricError, nearest
from clsnf.metrics import overlap, pimo, ranking
from clsnf.metrics.counts import ScoreCounts, count_images
from clsnf.metrics.families import FamilyPixels
from clsnf.metrics.pixels import PixelCounts, count_pixels
from clsnf.metrics.samples import LazySamples, PixelSample, Region
from clsnf.metrics.single_metrics import (
    au_pro,
    au_spro,
    aupimo,
    aupimo_per_image,
    image_ap,
    image_auroc,
    image_f1_max,
    pixel_ap,
    pixel_auroc,
    pixel_f1_max,
)

__all__ = [
    "METRICS",
    "FamilyPixels",
    "LazySamples",
    "Metric",
    "PixelCounts",
    "PixelSample",
    "Region",
    "ScoreCounts",
    "au_pro",
    "au_spro",
    "aupimo",
    "aupimo_per_image",
    "evaluate",
    "evaluate_families",
    "image_ap",
    "image_auroc",
    "image_f1_max",
    "pixel_ap",
    "pixel_auroc",
    "pixel_f1_max",
]


@dataclass(frozen=True)
class Metric:
    """One metric. All are in [0, 1], higher is better, 1 is perfect.

    kind: "image" metrics need scores and labels, "pixel" metrics need samples.
    function: the metric, from the counts that all metrics of its kind share: ScoreCounts for
        images, PixelCounts for pixels.
    oracle: True where the metric chooses a threshold with the labels that it is judged by.
    help: one line for tables and the command line.
    normals: True where it compares with normal images, so that a set without any has none.
    regions: True where it is of annotated regions; without any, another metric says the same.
    """

    kind: Literal["image", "pixel"]
    function: Callable[[Any], float]
    oracle: bool
    help: str
    normals: bool = False
    regions: bool = False


def _of_pixels(metric: Callable[[ScoreCounts], float]) -> Callable[[PixelCounts], float]:
    return lambda counts: metric(counts.scores)


METRICS: dict[str, Metric] = {
    "image_auroc": Metric(
        "image", ranking.auroc, False, "area under the ROC curve of the image scores"
    ),
    "image_ap": Metric(
        "image", ranking.average_precision, False, "average precision of the image scores"
    ),
    "image_f1_max": Metric(
        "image", ranking.f1_max, True, "largest F1 of the image scores over all thresholds (oracle)"
    ),
    "pixel_auroc": Metric(
        "pixel", _of_pixels(ranking.auroc), False, "area under the ROC curve over all pixels"
    ),
    "pixel_ap": Metric(
        "pixel", _of_pixels(ranking.average_precision), False, "average precision over all pixels"
    ),
    "pixel_f1_max": Metric(
        "pixel",
        _of_pixels(ranking.f1_max),
        True,
        "largest F1 over all pixels and thresholds (oracle)",
    ),
    "au_pro": Metric(
        "pixel",
        partial(overlap.area_under_pro, limit=0.3),
        False,
        "area under the per-region overlap up to FPR 0.3",
    ),
    "au_pro_05": Metric(
        "pixel",
        partial(overlap.area_under_pro, limit=0.05),
        False,
        "area under the per-region overlap up to FPR 0.05",
    ),
    "au_spro": Metric(
        "pixel",
        partial(overlap.area_under_spro, limit=0.3),
        False,
        "area under the saturated per-region overlap up to FPR 0.3",
        regions=True,
    ),
    "au_spro_05": Metric(
        "pixel",
        partial(overlap.area_under_spro, limit=0.05),
        False,
        "area under the saturated per-region overlap up to FPR 0.05",
        regions=True,
    ),
    "aupimo": Metric(
        "pixel",
        pimo.mean_aupimo,
        False,
        "per-image recall over FPR 1e-5 to 1e-4 on normal images, log scale",
        normals=True,
    ),
}


def evaluate(
    scores: ArrayLike,
    labels: ArrayLike,
    samples: Iterable[PixelSample] | None,
    names: Iterable[str] | None = None,
) -> dict[str, float]:
    """Compute the metrics that ``names`` asks for, in this order; by default all of ``METRICS``.

    scores: (N,) image scores.
    labels: (N,), 0 normal, 1 defect.
    samples: a re-iterable of N samples in the same order, passed over exactly twice whatever the
        number of pixel metrics; None where only image metrics are asked for.

    Raises MetricError where a metric is not defined (a set of one class, an image labelled a defect
    whose mask is empty, scores that are not finite, unknown names, ...): no metric is ever left out
    or replaced by a stand-in. A caller with a set of normal images alone asks for none.
    """
    wanted = list(METRICS) if names is None else list(names)
    kinds = _kinds(wanted)
    counts: dict[str, ScoreCounts | PixelCounts] = {}
    if "image" in kinds:
        counts["image"] = count_images(scores, labels)
    if "pixel" in kinds:
        if samples is None:
            raise MetricError(
                "samples is None: pixel metrics need maps and masks; give samples, or names of "
                "image metrics only."
            )
        counts["pixel"] = count_pixels(samples, labels)
    return _evaluated(counts, wanted)


def evaluate_families(
    scores: NDArray[np.float32],
    maps: NDArray[np.float32],
    labels: NDArray[np.bool_],
    families: Mapping[str, NDArray[np.intp]],
    pixels: FamilyPixels,
    names: Sequence[str],
) -> dict[str, dict[str, float]]:
    """Metrics of each defect family: those of :func:`evaluate` on all normals and its images.

    scores: (N,) image scores.
    maps: (N, H, W) float32 score maps.
    labels: (N,), True for a defect.
    families: name -> indices of all normals, then of the family's images.
    pixels: the masks of the same images and families.
    names: of metrics.

    Raises MetricError where a metric is not defined; see :func:`evaluate`.
    """
    kinds = _kinds(names)
    with_rates = any(METRICS[name].normals for name in names)
    counted = pixels.count(maps, with_rates) if "pixel" in kinds else {}
    found = {}
    for family, chosen in families.items():
        counts: dict[str, ScoreCounts | PixelCounts] = {}
        if "image" in kinds:
            counts["image"] = count_images(scores[chosen], labels[chosen])
        if "pixel" in kinds:
            counts["pixel"] = counted[family]
        found[family] = _evaluated(counts, names)
    return found


def _kinds(names: Iterable[str]) -> set[str]:
    """The kinds of metrics; MetricError for one that there is not."""
    for name in names:
        if name not in METRICS:
            raise MetricError(f"there is no metric called {name!r}.{nearest(name, METRICS)}")
    return {METRICS[name].kind for name in names}


def _evaluated(
    counts: Mapping[str, ScoreCounts | PixelCounts], names: Iterable[str]
) -> dict[str, float]:
    return {name: METRICS[name].function(counts[METRICS[name].kind]) for name in names}
