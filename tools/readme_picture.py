"""Make the README's picture from a finished study of the demo.

python tools/readme_picture.py runs/NAME docs/images/demo.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from clsnf import Detector
from clsnf.data.images import read_image, read_mask, write_image
from clsnf.data.layouts import read_category
from clsnf.evaluation.pictures import Image, outline, overlay, sheet


def main(run: Path, picture: Path) -> None:
    """Write one row of inputs and one of overlays for each category.

    It shows a good picture, then two of each defect type.
    """
    summary = json.loads((run / "summary.json").read_text())
    rows: list[tuple[str, list[Image]]] = []
    for category, found in summary["categories"].items():
        detector = Detector.load(found["winner"])
        test = [
            row
            for row in read_category(summary["origin"], category).to_pylist()
            if row["split"] == "test"
        ]
        kinds = sorted(
            {row["defect_type"] for row in test}, key=lambda kind: (kind != "good", kind)
        )
        chosen = [
            row
            for kind in kinds
            for row in [r for r in test if r["defect_type"] == kind][: 1 if kind == "good" else 2]
        ]
        inputs, answers = [], []
        for row, (score_map, _, _) in zip(
            chosen, detector.predict_each([row["path"] for row in chosen]), strict=True
        ):
            image = read_image(row["path"])
            inputs.append(
                image
                if row["mask_path"] is None
                else outline(image, read_mask(row["mask_path"]), (0, 220, 0))
            )
            answers.append(overlay(image, score_map, detector.shown_from, detector.map_threshold))
        rows += [(f"{category}: {', '.join(kinds)}", inputs), ("", answers)]
    write_image(picture, sheet(rows, cell=150))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
