"""Several systems on the same labelled images: metrics, intervals, and what one gains over another.

Every system is judged on the same bootstrap replicates, so that gains are paired.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clsnf.core.config import DetectorSettings
from clsnf.evaluation.evaluate import allowed_metrics, metrics_of_maps, samples_of_maps
from clsnf.metrics import METRICS
from clsnf.metrics.bootstrap import (
    Floats,
    bin_images,
    compare,
    draw_replicates,
    intervals,
    replicate_metrics,
)
from clsnf.model.score_maps import Scores
from clsnf.results import Gain, Interval, Metrics

REPLICATES = 1000


@dataclass(frozen=True)
class ReplicatedMetrics:
    """A system's metrics in every bootstrap replicate.

    Attributes:
        values: metric -> (R,), one value a replicate.
    """

    values: dict[str, Floats]

    @property
    def intervals(self) -> dict[str, Interval]:
        """Metric -> 95 % interval."""
        return dict(intervals(self.values))

    def gain_over(self, other: ReplicatedMetrics) -> dict[str, Gain]:
        """Metric -> gain over another system, which the same :class:`Comparison` replicated."""
        found = compare(self.values, other.values)
        return {name: Gain(gain.low, gain.high, gain.ahead) for name, gain in found.items()}


class Comparison:
    """Labelled images on which systems are compared.

    Args:
        rows: of the images' table, with label, path and mask_path.
        settings: how the images were placed, and the seed of the replicates.
    """

    def __init__(self, rows: list[dict[str, Any]], settings: DetectorSettings) -> None:
        self._rows, self._image_settings = rows, settings.image
        self.labels = np.array([row["label"] for row in rows])
        self._weights = draw_replicates(self.labels, REPLICATES, settings.seed)

    def metrics(self, system: Scores, names: Sequence[str] = tuple(METRICS)) -> Metrics:
        """A system's metrics; see :func:`clsnf.evaluation.evaluate.metrics_of_maps`."""
        return metrics_of_maps(
            self._rows, system.maps.numpy(), system.scores.numpy(), self._image_settings, names
        )

    def replicate(self, system: Scores) -> ReplicatedMetrics:
        """A system's metrics in every replicate."""
        samples = samples_of_maps(self._rows, system.maps.numpy(), self._image_settings)
        images = bin_images(system.scores.numpy(), self.labels, samples)
        found = replicate_metrics(images, self._weights)
        allowed = allowed_metrics(self._rows, tuple(found))
        return ReplicatedMetrics({name: found[name] for name in allowed})
