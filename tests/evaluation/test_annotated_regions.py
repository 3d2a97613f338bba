"""Metrics of MVTec LOCO AD's annotated regions, from a folder and from a pack."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clsnf.core.config import DetectorSettings, ImageSettings
from clsnf.data.images import read_mask, read_regions
from clsnf.data.layouts import read_category
from clsnf.data.packs import write_pack
from clsnf.data.sets import read_category as read_set
from clsnf.evaluation.compare import Comparison
from clsnf.evaluation.evaluate import metrics_of_maps
from clsnf.metrics import METRICS
from clsnf.model.score_maps import Scores
from clsnf.training.prepare import rows_of
from tests.support.small_data import write_category, write_loco

IMAGE = ImageSettings(height=64, width=64)


@pytest.fixture
def pins(tmp_path: Path) -> Path:
    return write_loco(tmp_path / "loco" / "pins", size=(64, 64))


def rows_to_test(location: Path, category: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = rows_of(read_set(location, category), "test").to_pylist()
    return rows


def halves(rows: list[dict[str, Any]]) -> np.ndarray:
    """Maps that are 1 on the first pixels of each region, as many as are enough, 0 elsewhere."""
    maps = np.zeros((len(rows), 64, 64), np.float32)
    for score_map, row in zip(maps, rows, strict=True):
        for region in read_regions(row["mask_path"]) if row["mask_path"] else ():
            score_map.flat[np.flatnonzero(region.mask)[: region.saturation]] = 1
    return maps


def test_enough_of_each_region_is_all_of_it_for_the_saturated_overlap_alone(
    pins: Path, tmp_path: Path
) -> None:
    rows = rows_to_test(pins.parent, "pins")
    maps = halves(rows)
    scores = maps.max(axis=(1, 2))
    metrics = metrics_of_maps(rows, maps, scores, IMAGE)
    assert list(metrics) == list(METRICS)
    assert (metrics["au_spro"], metrics["au_spro_05"]) == pytest.approx((1, 1))
    assert metrics["au_pro_05"] < 0.9

    write_pack([("pins", partial(read_category, pins.parent, "pins"))], tmp_path / "pack")
    packed = rows_to_test(tmp_path / "pack", "pins")
    assert metrics_of_maps(packed, maps, scores, IMAGE) == metrics


def test_pictures_without_annotated_regions_have_no_saturated_overlap(tmp_path: Path) -> None:
    write_category(tmp_path / "nut")
    rows = rows_to_test(tmp_path, "nut")
    maps = np.stack(
        [
            read_mask(row["mask_path"]).astype(np.float32)
            if row["mask_path"]
            else np.zeros((64, 64), np.float32)
            for row in rows
        ]
    )
    without = [name for name, metric in METRICS.items() if not metric.regions]
    assert list(metrics_of_maps(rows, maps, maps.max(axis=(1, 2)), IMAGE)) == without


def test_replicates_are_of_the_metrics_that_the_pictures_have(pins: Path, tmp_path: Path) -> None:
    write_category(tmp_path / "nut")
    for location, category in ((pins.parent, "pins"), (tmp_path, "nut")):
        rows = rows_to_test(location, category)
        maps = torch.rand(len(rows), 64, 64)
        system = Scores(maps, maps.amax(dim=(1, 2)))
        comparison = Comparison(rows, DetectorSettings(image=IMAGE))
        assert set(comparison.replicate(system).values) == set(comparison.metrics(system))
