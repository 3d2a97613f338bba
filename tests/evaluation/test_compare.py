"""Systems compared on the same labelled images."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clsnf.core.config import DetectorSettings, ImageSettings
from clsnf.data.images import write_image, write_mask
from clsnf.evaluation import compare as compare_module
from clsnf.evaluation.compare import Comparison
from clsnf.metrics import image_auroc
from clsnf.model.score_maps import Scores

SIZE = 32
SETTINGS = DetectorSettings(image=ImageSettings(SIZE, SIZE))


@pytest.fixture(autouse=True)
def few_replicates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_module, "REPLICATES", 50)


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, Any]]:
    """Four normals and four defects, with masks."""
    result = []
    for index in range(8):
        image, mask = tmp_path / f"{index}.png", tmp_path / f"{index}_mask.png"
        write_image(image, np.full((SIZE, SIZE, 3), 90, np.uint8))
        marked = np.zeros((SIZE, SIZE), bool)
        marked[4 : 6 + index, 8:16] = True
        write_mask(mask, marked)
        label = int(index >= 4)
        result.append(
            {"path": str(image), "label": label, "mask_path": str(mask) if label else None}
        )
    return result


def system(rows: list[dict[str, Any]], strength: float, seed: int) -> Scores:
    """Random maps; those of defects are higher by `strength`."""
    maps = torch.rand(len(rows), SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    maps += strength * torch.tensor([row["label"] for row in rows])[:, None, None]
    return Scores(maps, maps.amax(dim=(1, 2)))


def test_a_system_is_ahead_of_a_worse_one_and_level_with_itself(rows: list[dict[str, Any]]) -> None:
    comparison = Comparison(rows, SETTINGS)
    good, bad = system(rows, 2.0, 0), system(rows, -2.0, 1)
    replicated, other = comparison.replicate(good), comparison.replicate(bad)
    gain = replicated.gain_over(other)["image_auroc"]
    assert (gain.low, gain.high, gain.ahead) == (1.0, 1.0, 1.0)
    for found in replicated.gain_over(comparison.replicate(good)).values():
        assert (found.low, found.high, found.ahead) == (0.0, 0.0, 0.5)


def test_intervals_lie_around_the_metrics(rows: list[dict[str, Any]]) -> None:
    comparison = Comparison(rows, SETTINGS)
    found = system(rows, 0.001, 2)
    metrics, intervals = comparison.metrics(found), comparison.replicate(found).intervals
    assert set(metrics) == set(intervals)
    assert metrics["image_auroc"] == image_auroc(found.scores.numpy(), comparison.labels)
    low, high = intervals["image_auroc"]
    assert low <= metrics["image_auroc"] <= high


def test_only_the_metrics_asked_for_are_computed(rows: list[dict[str, Any]]) -> None:
    found = Comparison(rows, SETTINGS).metrics(system(rows, 1.0, 3), ("pixel_ap",))
    assert list(found) == ["pixel_ap"]


def test_without_masks_only_image_metrics_are_compared(rows: list[dict[str, Any]]) -> None:
    rows[5]["mask_path"] = None
    comparison = Comparison(rows, SETTINGS)
    replicated = comparison.replicate(system(rows, 1.0, 4))
    assert set(replicated.values) == {"image_auroc", "image_ap", "image_f1_max"}
