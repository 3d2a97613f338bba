"""AUPIMO: per-image recall at very low false-positive rates (Bertoldo et al., "AUPIMO", BMVC 2024).

Exact, and without a curve. An image's recall at rate f is the share of its defect pixels whose
score can be a threshold within f. So each pixel adds to the area from the rate that its own score
costs up to the upper bound, and the image's AUPIMO is the mean of that over its pixels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from clsnf.core.errors import MetricError
from clsnf.metrics.pixels import PixelCounts

LOWEST_RATE = 1e-5
HIGHEST_RATE = 1e-4


def image_aupimo(counts: PixelCounts) -> NDArray[np.float64]:
    """AUPIMO of each image: its recall, averaged over log FPR in [1e-5, 1e-4].

    Recall at rate f is that of the lowest threshold with FPR(t) <= f, a step function of f; FPR(t)
    is the mean over the *normal* images of the share of their pixels >= t, as published. In closed
    form, with u, l the bounds and F(p) the rate of pixel p's score: mean over the image's defect
    pixels of (ln u - ln clip(F(p), l, u)) / (ln u - ln l).

    Differs from the published implementation, which joins 300,000 evenly spaced thresholds by
    trapezoids between the thresholds nearest to the bounds: here every score is a threshold and the
    bounds are met exactly. The two agree in the limit where no normal pixel ties with a defect
    pixel; on a tie, the defect pixel counts only from the rate on that includes the tied ones.

    Where the normal images have too few pixels to resolve 1e-5 (fewer than 100,000 in all, for
    images of one size), the recall at rates below the first false pixel is the one without any
    false pixel; with fewer than 10,000 that is the whole metric. The published implementation
    leaves such rates out, or refuses.

    Returns (N,) float64 in [0, 1], in the samples' order, NaN for normal images. Raises MetricError
    without normal images.
    """
    if counts.normal_rate is None:
        raise MetricError(
            f"all {counts.images} images have defects: AUPIMO takes its false-positive rate from "
            "normal images; add some."
        )
    cost = np.log(np.clip(counts.normal_rate, LOWEST_RATE, HIGHEST_RATE))
    worth = (np.log(HIGHEST_RATE) - cost) / (np.log(HIGHEST_RATE) - np.log(LOWEST_RATE))  # (K,)
    total = np.bincount(
        counts.pixel_image, weights=worth[counts.pixel_rank], minlength=counts.images
    )
    pixels = np.bincount(counts.pixel_image, minlength=counts.images)
    return np.divide(total, pixels, out=np.full(counts.images, np.nan), where=pixels > 0)


def mean_aupimo(counts: PixelCounts) -> float:
    """Mean of :func:`image_aupimo` over the images with defects, in [0, 1]."""
    return float(np.nanmean(image_aupimo(counts)))
