"""AU-PRO: the area under the per-region overlap curve.

Defined as in MVTec's evaluation (Bergmann et al., IJCV 129, 2021). The curve is built from the
defect pixels' scores alone: between two of them PRO does not change, however many thresholds the
defect-free pixels would add there.
"""

from __future__ import annotations

import numpy as np

from clsnf.core.errors import MetricError
from clsnf.metrics.pixels import PixelCounts


def check_limit(limit: float) -> None:
    """Raise MetricError for an upper false-positive rate outside (0, 1]."""
    if not 0 < limit <= 1:
        raise MetricError(
            f"the AU-PRO limit is {limit!r}: it must be a false-positive rate in (0, 1], 0.3 as a "
            "rule."
        )


def area_under_pro(counts: PixelCounts, limit: float) -> float:
    """Area under PRO over FPR from 0 to ``limit``, divided by ``limit``; in [0, 1].

    PRO(t) is the mean, over all 8-connected regions with equal weight, of the share of the region
    with scores >= t; FPR(t) is the share of all images' defect-free pixels with scores >= t. Every
    distinct score is a threshold, joined by straight lines from (0, 0) to (1, 1); at the limit the
    curve is interpolated.

    limit: largest FPR, in (0, 1]. Raises MetricError for any other.
    """
    check_limit(limit)
    scores = counts.scores
    gained = np.cumsum(counts.region_share)
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
