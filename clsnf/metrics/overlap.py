"""AU-PRO and AU-sPRO: the areas under the per-region overlap curve and the saturated one.

Defined as in MVTec's evaluations (Bergmann et al., IJCV 129, 2021, and IJCV 130, 2022). The curve
is built from the defect pixels' scores alone: between two of them the overlap does not change,
however many thresholds the defect-free pixels would add there.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from clsnf.core.errors import MetricError
from clsnf.metrics.counts import ScoreCounts
from clsnf.metrics.pixels import PixelCounts


def check_limit(limit: float) -> None:
    """Raise MetricError for an upper false-positive rate outside (0, 1]."""
    if not 0 < limit <= 1:
        raise MetricError(
            f"the limit of an overlap's area is {limit!r}: it must be a false-positive rate in "
            "(0, 1], 0.3 as a rule."
        )


def area_under_pro(counts: PixelCounts, limit: float) -> float:
    """Area under PRO over FPR from 0 to ``limit``, divided by ``limit``; in [0, 1].

    PRO(t) is the mean, over all 8-connected regions with equal weight, of the share of the region
    with scores >= t; FPR(t) is the share of all images' defect-free pixels with scores >= t. Every
    distinct score is a threshold, joined by straight lines from (0, 0) to (1, 1); at the limit the
    curve is interpolated.

    limit: largest FPR, in (0, 1]. Raises MetricError for any other.
    """
    return _area(counts.scores, counts.region_share, limit)


def area_under_spro(counts: PixelCounts, limit: float) -> float:
    """Area under the saturated PRO over FPR from 0 to ``limit``, divided by it; in [0, 1].

    As :func:`area_under_pro`, of annotated regions, which may overlap; all have equal weight. A
    region of A pixels that is saturated at S of them counts min(found / S, 1). FPR(t) is the share
    of the pixels that lie in no region, good images included, with scores >= t.

    The published evaluation places its thresholds until the curve's points lie close together. Here
    every score is one, which is what it approaches. Its headline is the limit 0.05; it reports
    0.01, 0.05, 0.1, 0.3 and 1, for logical and for structural anomalies apart, each with all good
    images, and the mean of the two.

    limit: largest FPR, in (0, 1]. Raises MetricError for any other.
    """
    return _area(counts.scores, counts.saturated_share, limit)


def _area(scores: ScoreCounts, share: NDArray[np.float64], limit: float) -> float:
    """The area up to ``limit`` of an overlap that gains ``share`` at each defect score, (K,)."""
    check_limit(limit)
    gained = np.cumsum(share)
    # Each defect score adds two corners: where FPR has climbed at the old PRO, and where the score
    # itself has been met.
    fpr = np.zeros(2 * len(gained) + 2)
    pro = np.zeros(len(fpr))
    fpr[1:-1:2] = scores.false_above / scores.negatives
    fpr[2:-1:2] = (scores.false_above + scores.false_at) / scores.negatives
    pro[2:-1:2] = gained
    pro[3::2] = gained
    fpr[-1] = 1.0
    # The first corner at or beyond the limit: there is one, and it is not (0, 0).
    end = int(np.searchsorted(fpr, limit))
    share = (limit - fpr[end - 1]) / (fpr[end] - fpr[end - 1])
    x = np.append(fpr[:end], limit)
    y = np.append(pro[:end], pro[end - 1] + share * (pro[end] - pro[end - 1]))
    return float(np.trapezoid(y, x)) / limit
