"""Figures of a detector on labelled images, at the masks' own size.

Called by ``clsnf evaluate`` and, once, after selection, by a study.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from clsnf.core.config import ImageSettings
from clsnf.core.errors import DataError
from clsnf.core.progress import Progress, silent
from clsnf.data.images import Placement, image_size, read_mask, restore_map
from clsnf.detector import Detector
from clsnf.metrics import METRICS, LazySamples, PixelSample, evaluate
from clsnf.streams.choice import StreamChoice

_NEEDS_NORMALS = ("aupimo",)


def evaluate_detector(
    detector: Detector,
    table: pa.Table,
    progress: Progress = silent,
    task: str = "evaluate",
    stream: StreamChoice | None = None,
) -> dict[str, Any]:
    """Score every image of a table and compare with its labels.

    Args:
        detector: fitted on other images.
        table: rows with label, defect_type and mask_path; masks may be missing for all defects,
            then there are no pixel figures.
        stream: who scores the images, see :meth:`clsnf.detector.Detector.predict`.

    Returns:
        ``figures`` (name to value in [0, 1], see :data:`clsnf.metrics.METRICS`), ``counts`` of
        images by defect type, ``scores`` (one record an image), ``false_reject_rate`` and
        ``recall`` at the detector's threshold (None without normals or without defects).

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
    labels = np.array([row["label"] for row in rows])
    figures = metrics_of_maps(rows, prediction.maps, prediction.scores, detector.settings.image)
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["defect_type"]] = counts.get(row["defect_type"], 0) + 1

    def share(of: np.ndarray) -> float | None:
        return float(prediction.verdicts[of].mean()) if of.any() else None

    return {
        "figures": figures,
        "counts": counts,
        "false_reject_rate": share(labels == 0),
        "recall": share(labels == 1),
        "scores": [
            {
                "path": row["path"],
                "defect_type": row["defect_type"],
                "label": row["label"],
                "score": float(s),
                "verdict": bool(v),
            }
            for row, s, v in zip(rows, prediction.scores, prediction.verdicts, strict=True)
        ],
    }


def metrics_of_maps(
    rows: list[dict[str, Any]],
    maps: np.ndarray,
    scores: np.ndarray,
    settings: ImageSettings,
    names: Sequence[str] = tuple(METRICS),
) -> dict[str, float]:
    """Figures of score maps: none without defects, no pixel figures where masks are missing.

    Args:
        rows: of the images' table, with label, path and mask_path.
        maps: (N, H, W) on the network's canvas.
        scores: (N,) of the images.
        settings: how images came onto the canvas.
        names: the figures wanted; those that these images do not allow are left out.
    """
    labels = np.array([row["label"] for row in rows])
    if not labels.any():
        return {}
    samples = samples_of_maps(rows, maps, settings)
    has_normals = bool((labels == 0).any())
    allowed = [
        name
        for name in names
        if (samples is not None if METRICS[name].kind == "pixel" else has_normals)
        and (has_normals or name not in _NEEDS_NORMALS)
    ]
    return evaluate(scores, labels, samples, allowed)


def samples_of_maps(
    rows: list[dict[str, Any]], maps: np.ndarray, settings: ImageSettings
) -> LazySamples | None:
    """Maps (N, H, W) of the canvas at the masks' own size, each with its mask; None where a defect
    has no mask.
    """
    if any(row["mask_path"] is None for row in rows if row["label"]):
        return None

    def sample(index: int) -> PixelSample:
        # Read again whenever a figure passes over the images: full-size maps and masks of a whole
        # test set would not fit.
        row = rows[index]
        mask = (
            np.zeros(image_size(row["path"]), bool)
            if row["mask_path"] is None
            else read_mask(row["mask_path"])
        )
        return PixelSample(restore_map(maps[index], Placement.of(mask.shape, settings)), mask, None)

    return LazySamples(sample, len(rows))
