"""Score counts: all that a ranking metric depends on, for whole images and for pixels alike.

There is no array of thresholds. AUROC, AP, F1-max and AU-PRO change, or can be largest, only where
the threshold meets the score of a defect. So it is enough to know, for each *distinct defect
score*, how many defects have it, and how many normal ones lie above it and on it. This is exact,
merges ties, and takes memory in proportion to the number of defects.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clsnf.core.errors import MetricError

Counts = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ScoreCounts:
    """For each of K distinct defect scores, highest first, what a falling threshold has met.

    hits: (K,) >= 1, positives with exactly this score.
    false_above: (K,) >= 0, negatives with a higher score.
    false_at: (K,) >= 0, negatives with exactly this score.
    negatives: >= 1, how many there are in all.
    """

    hits: Counts
    false_above: Counts
    false_at: Counts
    negatives: int

    @property
    def positives(self) -> int:
        """How many there are in all, >= 1."""
        return int(self.hits.sum())


def count_images(scores: ArrayLike, labels: ArrayLike) -> ScoreCounts:
    """Count image scores.

    scores: (N,) real numbers, higher = more of a defect, compared exactly at their own precision.
    labels: (N,), 0 normal and 1 defect.

    Raises MetricError: no images, shapes that differ, labels other than 0 and 1, a score that is
    not finite, one class only.
    """
    score, defect = np.asarray(scores), checked_labels(labels)
    if score.shape != defect.shape:
        raise MetricError(
            f"scores have shape {score.shape}, labels {defect.shape}: both must be (N,), one "
            "score an image."
        )
    if bad := np.flatnonzero(~np.isfinite(score)).tolist():
        raise MetricError(
            f"the score of image {bad[0]} is {score[bad[0]]}: scores must be finite; mend the "
            "model that made it."
        )
    if defect.all() or not defect.any():
        only = "defects" if defect.all() else "normal"
        raise MetricError(
            f"all {len(defect)} images are {only}: image metrics compare two classes; give images "
            "of both."
        )
    positives, hits = np.unique(score[defect], return_counts=True)
    negatives = np.sort(score[~defect])
    below = np.searchsorted(negatives, positives, side="left")
    above = len(negatives) - np.searchsorted(negatives, positives, side="right")
    at = len(negatives) - below - above
    return ScoreCounts(hits[::-1], above[::-1], at[::-1], len(negatives))


def checked_labels(labels: ArrayLike) -> NDArray[np.bool_]:
    """(N,) labels, 0 or 1 -> (N,) bool; MetricError for no images or other values."""
    array = np.asarray(labels)
    if array.size == 0:
        raise MetricError(
            "no images were given: a metric needs at least one normal image and one defect."
        )
    if array.ndim != 1 or not np.isin(array, (0, 1)).all():
        raise MetricError(
            f"labels have shape {array.shape} and values {np.unique(array)[:5].tolist()}: they "
            "must be (N,), 0 normal or 1 defect."
        )
    return array.astype(bool)
