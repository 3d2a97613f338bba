"""How far the pictures of the day lie from the normal images that a model was calibrated on."""

from __future__ import annotations

import numpy as np

from clsnf.data.image_statistics import STATISTICS
from clsnf.serving.catalogue import ModelEntry

_WEIGHT = 0.02  # of the newest picture in the running mean: about the last 50 pictures count


class DriftMonitor:
    """A running mean of image statistics for each model."""

    def __init__(self) -> None:
        self._means: dict[tuple[str, str], np.ndarray] = {}

    def update(self, entry: ModelEntry, statistics: np.ndarray) -> dict[str, float]:
        """Add a picture; gives the running mean of each statistic.

        Args:
            entry: the model that was asked.
            statistics: (5,), see :func:`clsnf.data.image_statistics.statistics_of`.

        Returns:
            By name of the statistic, in standard deviations from the validation normals; empty
            where the model was saved by a version that noted no statistics.
        """
        known = entry.provenance.image_statistics
        if set(known) != set(STATISTICS):
            return {}
        mean, spread = np.array([known[name] for name in STATISTICS]).T
        distance = (statistics - mean) / spread
        key = (entry.category, entry.version)
        before = self._means.get(key)
        now = distance if before is None else before + _WEIGHT * (distance - before)
        self._means[key] = now
        return {name: float(value) for name, value in zip(STATISTICS, now, strict=True)}
