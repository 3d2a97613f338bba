"""Metrics of a detector on labelled images, at the masks' own size.

Called by ``clsnf evaluate`` and, once, after selection, by a study.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from clsnf.core.config import ImageSettings
from clsnf.core.errors import DataError
from clsnf.core.progress import Progress, silent
from clsnf.data.images import (
    Placement,
    image_size,
    read_mask,
    read_regions,
    restore_map,
    union_of,
)
from clsnf.data.region_files import has_regions
from clsnf.detector import Detector
from clsnf.metrics import METRICS, LazySamples, PixelSample, Region, evaluate
from clsnf.results import ImageScore, Metrics, TestResult
from clsnf.streams.choice import StreamChoice


class VerdictRates(NamedTuple):
    """How often images are called defective.

    Attributes:
        false_reject_rate: share of the normals; None where there are none.
        recall: share of the defects; None where there are none.
    """

    false_reject_rate: float | None
    recall: float | None


def verdict_rates(labels: NDArray[np.integer], verdicts: NDArray[np.bool_]) -> VerdictRates:
    """False-reject rate and recall of verdicts.

    Args:
        labels: (N,), 0 normal and 1 defect.
        verdicts: (N,), True for a defect.
    """

    def share(images: NDArray[np.bool_]) -> float | None:
        return float(verdicts[images].mean()) if images.any() else None

    return VerdictRates(share(labels == 0), share(labels == 1))


def evaluate_detector(
    detector: Detector,
    table: pa.Table,
    progress: Progress = silent,
    task: str = "evaluate",
    stream: StreamChoice | None = None,
) -> TestResult:
    """Score every image of a table and compare with its labels.

    Args:
        detector: fitted on other images.
        table: rows with path, label, defect_type and mask_path. Without the mask of some defect,
            there are no pixel metrics.
        progress: gets every step, as `task`.
        stream: who scores the images, see :meth:`clsnf.detector.Detector.predict`.

    Raises:
        DataError: no rows.
        ImageError: an image or mask can't be read.
    """
    if len(table) == 0:
        raise DataError("There are no images to evaluate on.")
    rows = table.to_pylist()
    prediction = detector.predict(
        [row["path"] for row in rows], progress=progress, task=task, stream=stream
    )
    rates = verdict_rates(np.array([row["label"] for row in rows]), prediction.verdicts)
    return TestResult(
        metrics=metrics_of_maps(rows, prediction.maps, prediction.scores, detector.settings.image),
        counts=dict(Counter(row["defect_type"] for row in rows)),
        false_reject_rate=rates.false_reject_rate,
        recall=rates.recall,
        scores=[
            ImageScore(row["path"], row["defect_type"], row["label"], float(score), bool(verdict))
            for row, score, verdict in zip(
                rows, prediction.scores, prediction.verdicts, strict=True
            )
        ],
    )


def metrics_of_maps(
    rows: list[dict[str, Any]],
    maps: np.ndarray,
    scores: np.ndarray,
    settings: ImageSettings,
    names: Sequence[str] = tuple(METRICS),
) -> Metrics:
    """Metrics of score maps.

    Metrics that the images do not allow are left out: without defects all of them, without a mask
    of each defect the pixel metrics, without normals those that compare with normals, without
    annotated regions those of regions.

    Args:
        rows: of the images' table, with label, path and mask_path.
        maps: (N, H, W), placed as the images are for the network.
        scores: (N,) image scores.
        settings: how the images were placed.
        names: the metrics to compute, of :data:`clsnf.metrics.METRICS`.
    """
    labels = np.array([row["label"] for row in rows])
    if not labels.any():
        return {}
    samples = samples_of_maps(rows, maps, settings)
    return evaluate(scores, labels, samples, allowed_metrics(rows, names))


def allowed_metrics(rows: list[dict[str, Any]], names: Sequence[str]) -> list[str]:
    """The metrics among `names` that images with labels of both kinds, or of one, allow.

    Args:
        rows: see :func:`metrics_of_maps`.
        names: of :data:`clsnf.metrics.METRICS`.
    """
    has_normals = not all(row["label"] for row in rows)
    masks = [row["mask_path"] for row in rows if row["label"]]
    has_masks = None not in masks
    annotated = has_masks and any(map(has_regions, masks))
    return [
        name
        for name in names
        if (has_masks if METRICS[name].kind == "pixel" else has_normals)
        and (has_normals or not METRICS[name].normals)
        and (annotated or not METRICS[name].regions)
    ]


def samples_of_maps(
    rows: list[dict[str, Any]], maps: np.ndarray, settings: ImageSettings
) -> LazySamples | None:
    """Maps at the masks' own size, each with its mask; None where a defect has no mask.

    Args:
        rows, maps, settings: see :func:`metrics_of_maps`.
    """
    if any(row["mask_path"] is None for row in rows if row["label"]):
        return None

    def sample(index: int) -> PixelSample:
        # Made anew in each pass over the images: full-size maps and masks of a whole test set would
        # not fit into memory.
        row, regions = rows[index], None
        if row["mask_path"] is None:
            mask = np.zeros(image_size(row["path"]), bool)
        elif has_regions(row["mask_path"]):
            found = read_regions(row["mask_path"])
            mask = union_of(found)
            regions = tuple(Region(one.mask, one.saturation) for one in found)
        else:
            mask = read_mask(row["mask_path"])
        score_map = restore_map(maps[index], Placement.of(mask.shape, settings))
        return PixelSample(score_map, mask, None, regions)

    return LazySamples(sample, len(rows))
