"""Metrics one by one; :func:`clsnf.metrics.evaluate` computes several from the same two passes.

Image metrics take ``scores`` (N,) real numbers, higher = more of a defect, and ``labels`` (N,), 0
normal and 1 defect. Pixel metrics take ``samples``, a re-iterable of
:class:`~clsnf.metrics.samples.PixelSample` that is passed over exactly twice, one map in memory at
a time. All raise :class:`~clsnf.core.errors.MetricError` where the metric is not defined: no
images, one class only, scores that are not finite, shapes that differ.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clsnf.metrics import overlap, pimo, ranking
from clsnf.metrics.counts import count_images
from clsnf.metrics.pixels import count_pixels
from clsnf.metrics.samples import PixelSample


def image_auroc(scores: ArrayLike, labels: ArrayLike) -> float:
    """AUROC of the image scores, in [0, 1]."""
    return ranking.auroc(count_images(scores, labels))


def image_ap(scores: ArrayLike, labels: ArrayLike) -> float:
    """Average precision of the image scores, in (0, 1]."""
    return ranking.average_precision(count_images(scores, labels))


def image_f1_max(scores: ArrayLike, labels: ArrayLike) -> float:
    """Largest F1 of the image scores over all thresholds, in (0, 1].

    An oracle: no user could have known its threshold.
    """
    return ranking.f1_max(count_images(scores, labels))


def pixel_auroc(samples: Iterable[PixelSample]) -> float:
    """AUROC over the pixels of all images, in [0, 1]."""
    return ranking.auroc(count_pixels(samples).scores)


def pixel_ap(samples: Iterable[PixelSample]) -> float:
    """Average precision over the pixels of all images, in (0, 1].

    The method's authors call it AUPR.
    """
    return ranking.average_precision(count_pixels(samples).scores)


def pixel_f1_max(samples: Iterable[PixelSample]) -> float:
    """Largest F1 over the pixels of all images and all thresholds, in (0, 1]; an oracle."""
    return ranking.f1_max(count_pixels(samples).scores)


def au_pro(samples: Iterable[PixelSample], limit: float = 0.3) -> float:
    """Area under the per-region overlap curve up to ``limit``, divided by it; in [0, 1].

    limit: a false-positive rate, in (0, 1].
    """
    overlap.check_limit(limit)  # before the long work
    return overlap.area_under_pro(count_pixels(samples), limit)


def au_spro(samples: Iterable[PixelSample], limit: float = 0.3) -> float:
    """Area under the saturated per-region overlap curve up to ``limit``, divided by it; in [0, 1].

    limit: a false-positive rate, in (0, 1].
    """
    overlap.check_limit(limit)  # before the long work
    return overlap.area_under_spro(count_pixels(samples), limit)


def aupimo(samples: Iterable[PixelSample]) -> float:
    """Mean over the defect images of :func:`aupimo_per_image`, in [0, 1]."""
    return pimo.mean_aupimo(count_pixels(samples))


def aupimo_per_image(samples: Iterable[PixelSample]) -> NDArray[np.float64]:
    """Each image's recall averaged over log FPR in [1e-5, 1e-4]: (N,) in the samples' order, NaN
    for normal images.

    Definition, and how it differs from the published implementation:
    :func:`clsnf.metrics.pimo.image_aupimo`.
    """
    return pimo.image_aupimo(count_pixels(samples))
