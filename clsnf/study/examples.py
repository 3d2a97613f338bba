"""A sheet of the winner's answers, for people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clsnf.data.images import read_image, read_mask, write_image
from clsnf.detector import Detector
from clsnf.evaluation.pictures import Image, outline, overlay, sheet

_IMAGES_PER_TYPE = 6
_GREEN = (0, 220, 0)


def write_examples(detector: Detector, rows: list[dict[str, Any]], path: Path) -> None:
    """Draw images of each defect type with the true defect outlined, above the detector's overlays.

    Args:
        detector: whose answers.
        rows: of the images' table.
        path: the sheet's file.
    """
    by_type: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_type.setdefault(row["defect_type"], []).append(row)
    lines: list[tuple[str, list[Image]]] = []
    for defect_type in sorted(by_type, key=lambda name: (name != "good", name)):
        chosen = by_type[defect_type][:_IMAGES_PER_TYPE]
        inputs, answers = [], []
        for row, (score_map, _, _) in zip(
            chosen, detector.predict_each([row["path"] for row in chosen]), strict=True
        ):
            image = read_image(row["path"])
            mask = None if row["mask_path"] is None else read_mask(row["mask_path"])
            inputs.append(image if mask is None else outline(image, mask, _GREEN))
            answers.append(overlay(image, score_map, detector.shown_from, detector.map_threshold))
        caption = "input" if defect_type == "good" else "input, true defect in green"
        lines.append((f"{defect_type}: {caption}", inputs))
        lines.append((f"{defect_type}: score map, above the threshold in cyan", answers))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, sheet(lines))
