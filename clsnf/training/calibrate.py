"""Thresholds: from the scores of held-out normal images at a stated false-reject rate, never from defects."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from clsnf.errors import MetricError


@dataclass(frozen=True)
class Threshold:
    """Scores above `value` are rejected.

    Attributes:
        value: the threshold.
        false_reject_rate: the rate that was asked for.
        supported_rate: the smallest rate, not below the one asked for, for which this many normal images give a guarantee: 1 / (n + 1)
            where n is too small.
        normals: n, the number of normal images it rests on.
    """

    value: float
    false_reject_rate: float
    supported_rate: float
    normals: int


def threshold_from_normals(scores: np.ndarray, false_reject_rate: float) -> Threshold:
    """The split-conformal threshold.

    The k-th smallest of n scores of held-out normal images, k = ceil((n + 1)(1 - rate)), is exceeded by the next normal image with a
    probability of at most `rate`, whatever the scores' distribution, as long as the images are exchangeable (Vovk et al., 2005). Where
    n is too small for the rate, the largest score is taken, whose guarantee is 1 / (n + 1).

    Args:
        scores: (n,) image scores of normal images that training did not see.
        false_reject_rate: in (0, 1).

    Raises:
        MetricError: no scores, some that are not finite, or a rate outside (0, 1).
    """
    if not 0 < false_reject_rate < 1:
        raise MetricError(f"The false-reject rate is {false_reject_rate!r}: it must lie between 0 and 1, both excluded.")
    n = len(scores)
    if n == 0 or not np.isfinite(scores).all():
        raise MetricError(f"A threshold needs finite scores of at least one normal image, not {n} scores with NaN or none at all.")
    k = min(n, math.ceil((n + 1) * (1 - false_reject_rate)))
    return Threshold(float(np.sort(scores)[k - 1]), false_reject_rate, max(false_reject_rate, 1 / (n + 1)), n)
