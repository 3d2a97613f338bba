"""What a comparison says of studies."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clsnf.reporting.compare import build_comparison
from clsnf.reporting.study_files import read_study
from tests.support.made_up_study import change, write_study


def stored(run: Path, name: str) -> dict[str, Any]:
    """A category's part of the summary, as the file has it."""
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())["categories"][name]
    return found


def test_a_comparison_says_category_by_category_what_changed(tmp_path: Path) -> None:
    before = write_study(tmp_path / "before", ["gone", "same", "moved"])
    now = write_study(tmp_path / "now", ["same", "moved", "new"])
    metrics = stored(before, "same")["test"]["figures"]
    for run, lower in ((before, 0.0), (now, 0.2)):
        for product in read_study(run).products:
            less = lower if product.name == "moved" else 0.0
            test = stored(run, product.name)["test"]
            figures = {name: value - less for name, value in metrics.items()}
            change(run, product.name, test=test | {"figures": figures})
    settings = stored(now, "moved")["settings"]
    change(now, "moved", settings=settings | {"fusion_weight": 0.9})
    built = build_comparison([before, now], tmp_path / "out")
    with (built.tables / "changes.csv").open() as file:
        found = {row["category"]: row for row in csv.DictReader(file)}
    assert {name: row["change"] for name, row in found.items()} == {
        "gone": "gone",
        "new": "new",
        "same": "about the same",
        "moved": "worse",
    }
    assert float(found["moved"]["pixel_ap_change"]) == pytest.approx(-0.2)
    with (built.tables / "settings.csv").open() as file:
        differing = {row["category"]: row["difference"] for row in csv.DictReader(file)}
    assert differing == {"moved": "fusion_weight was 0.25, is 0.9", "same": "nothing"}
    assert built.page.is_file()


def test_a_change_of_image_auroc_is_paired_on_the_same_test_images(tmp_path: Path) -> None:
    before, now = (write_study(tmp_path / name, ["alpha"]) for name in ("before", "now"))
    path = before / "evidence" / "alpha" / "images.parquet"
    rows = pq.read_table(path).to_pylist()
    for (
        row
    ) in rows:  # in the earlier study every other defect was missed, and its data lay elsewhere
        row["path"] = "/elsewhere" + row["path"]
        if row["label"] and row["path"].endswith(("0.png", "2.png", "4.png")):
            row["score"] = 0.0
    pq.write_table(pa.Table.from_pylist(rows), path)
    built = build_comparison([before, now], tmp_path / "out")
    with (built.tables / "changes.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row["significance"] == "significantly better"
    assert 0 < float(row["low"]) < float(row["high"])
    pq.write_table(pa.Table.from_pylist(rows[:-3]), path)
    built = build_comparison([before, now], tmp_path / "out")
    assert "not the same test images" in (built.tables / "changes.md").read_text()
