"""Metrics of a ranking, the same for images and pixels: AUROC, average precision, F1-max.

All three read :class:`~clsnf.metrics.counts.ScoreCounts` and are exact: equal scores are one
threshold. TP and FP below are the positives and negatives at or above the threshold, P and N all of
them.
"""

from __future__ import annotations

import numpy as np

from clsnf.metrics.counts import ScoreCounts


def auroc(counts: ScoreCounts) -> float:
    """Area under the ROC curve, in [0, 1].

    The probability that a positive scores above a negative, where ties count half.
    The Mann-Whitney statistic over P * N (Hanley and McNeil, Radiology 143, 1982); equals
    scikit-learn's ``roc_auc_score``.
    """
    below = counts.negatives - counts.false_above - counts.false_at
    return (
        float(counts.hits @ ((below + 0.5 * counts.false_at) / counts.negatives)) / counts.positives
    )


def average_precision(counts: ScoreCounts) -> float:
    """Average precision, in (0, 1].

    The sum over thresholds of (recall gained) * (precision there), without interpolation.
    A threshold gains recall only at a positive's score. Equals scikit-learn's
    ``average_precision_score``.
    """
    true = np.cumsum(counts.hits)
    precision = true / (true + counts.false_above + counts.false_at)
    return float(counts.hits @ precision) / counts.positives


def f1_max(counts: ScoreCounts) -> float:
    """Largest F1 over all thresholds, in (0, 1]: max of 2 TP / (TP + FP + P).

    An oracle: its threshold is chosen with the labels that it is judged by. The best threshold is a
    positive's score, since lowering it further to a negative's adds only false ones.
    """
    true = np.cumsum(counts.hits)
    return float(
        np.max(2 * true / (true + counts.false_above + counts.false_at + counts.positives))
    )
