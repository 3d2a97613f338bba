"""Thresholds and p-values from the scores of held-out normal images, never from defects."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import beta

from clsnf.core.errors import MetricError


@dataclass(frozen=True)
class Threshold:
    """Scores above `value` are rejected.

    Attributes:
        value: the threshold.
        false_reject_rate: the rate that was asked for.
        supported_rate: the smallest rate, not below the one asked for, that this many normal images
            can guarantee: 1 / (n + 1) if n is small.
        normals: n, the number of normal images that the threshold rests on.
    """

    value: float
    false_reject_rate: float
    supported_rate: float
    normals: int

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the true false-reject rate: (low, high) in [0, 1].

        The share of all normal images above the k-th smallest of n scores is distributed as Beta(n
        + 1 - k, k), for any continuous distribution of the scores (David and Nagaraja, Order
        Statistics, 2003). More normal images are the only way to lower `high`.
        """
        k = _rank(self.normals, self.false_reject_rate)
        low, high = beta.ppf((0.025, 0.975), self.normals + 1 - k, k)
        return float(low), float(high)


def _rank(n: int, rate: float) -> int:
    """k: the threshold is the k-th smallest of n scores."""
    return min(n, math.ceil((n + 1) * (1 - rate)))


def check_rate(rate: float) -> None:
    """Check a false-reject rate.

    Raises:
        MetricError: it lies outside (0, 1).
    """
    if not 0 < rate < 1:
        raise MetricError(
            f"The false-reject rate is {rate!r}: it must lie between 0 and 1, both excluded."
        )


def threshold_from_normals(scores: np.ndarray, false_reject_rate: float) -> Threshold:
    """The split-conformal threshold.

    The k-th smallest of n scores of held-out normal images, k = ceil((n + 1)(1 - rate)), is
    exceeded by the next normal image with a probability of at most `rate`. This holds for any
    distribution of the scores, as long as the images are exchangeable (Vovk et al., 2005). If n is
    too small for the rate, the threshold is the largest score, which guarantees 1 / (n + 1).

    Args:
        scores: (n,) image scores of normal images that training did not see.
        false_reject_rate: in (0, 1).

    Raises:
        MetricError: no scores, some that are not finite, or a rate outside (0, 1).
    """
    check_rate(false_reject_rate)
    n = len(scores)
    if n == 0 or not np.isfinite(scores).all():
        raise MetricError(
            f"A threshold needs finite scores of at least one normal image, not {n} scores with "
            "NaN or none at all."
        )
    return Threshold(
        float(np.sort(scores)[_rank(n, false_reject_rate) - 1]),
        false_reject_rate,
        max(false_reject_rate, 1 / (n + 1)),
        n,
    )


def p_value(score: float, normal_scores: np.ndarray) -> float:
    """The share of normal images that score at least as high, counted with the image itself.

    The split-conformal p-value (1 + number of scores >= `score`) / (n + 1). A normal image gets a
    p-value of at most t with a probability of at most t, whatever the scores' distribution, as long
    as the images are exchangeable (Vovk et al., 2005).

    Args:
        score: of the image.
        normal_scores: (n,) image scores of normal images that training did not see.

    Returns:
        In (0, 1].
    """
    higher = int((np.asarray(normal_scores) >= score).sum())
    return (higher + 1) / (len(normal_scores) + 1)
