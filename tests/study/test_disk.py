"""What a study says about the disk before it begins."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from clsnf.core.config import DetectorSettings, StudySettings, replaced
from clsnf.core.errors import DiskFullError
from clsnf.model.backbone import Backbone, empty_backbone
from clsnf.study.disk import DiskNeed, check_room, estimate_disk, free_room, size
from clsnf.study.space import DEFAULT_SPACE, Space
from tests.support.small_data import TINY

SETTINGS = replaced(
    DetectorSettings(), {**TINY, "image.height": 64, "image.width": 64, "backbone.levels": (1, 2)}
)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return empty_backbone("resnet18", (1, 2), (64, 64))


def need(
    backbone: Backbone,
    study: StudySettings | None = None,
    space: dict[str, Any] | None = None,
    settings: DetectorSettings = SETTINGS,
    categories: int = 1,
) -> DiskNeed:
    splits = ["fit"] * 8 + ["validation"] * 2 + ["test"] * 5
    tables = {str(n): pa.table({"split": splits}) for n in range(categories)}
    found = Space(DEFAULT_SPACE if space is None else space)
    return estimate_disk(settings, study or StudySettings(), found, tables, backbone)


def test_more_categories_trials_and_pixels_need_more_room(backbone: Backbone) -> None:
    one = need(backbone)
    assert need(backbone, categories=3).study == 3 * one.study
    assert need(backbone, StudySettings(trials=1)).study < one.study
    larger = replaced(SETTINGS, {"image.height": 128, "image.width": 128})
    assert need(backbone, settings=larger).study > one.study
    assert one.trial < one.study


def test_what_trials_share_is_counted_once(backbone: Backbone) -> None:
    many = StudySettings(trials=1000)
    assert need(backbone, many).study == need(backbone, StudySettings(trials=100)).study
    own: dict[str, Any] = {
        **DEFAULT_SPACE,
        "finetune.learning_rate": {"type": "float", "low": 1e-4, "high": 1e-3},
    }
    assert need(backbone, many, own).study > 50 * need(backbone, many).study
    scratch = StudySettings(trials=1000, reuse=False)
    assert need(backbone, scratch).study < need(backbone).study, "they delete their artifacts"


def test_a_disk_without_room_for_a_trial_is_refused(tmp_path: Path) -> None:
    free = free_room(tmp_path / "not" / "there")
    line = check_room(tmp_path, DiskNeed(free // 2, 1))
    assert line.startswith(f"disk: up to {size(free // 2)} for the artifacts")
    assert "trials wait" not in line
    assert "trials wait when the disk is full" in check_room(tmp_path, DiskNeed(2 * free, 1))
    with pytest.raises(DiskFullError, match="a single trial needs about"):
        check_room(tmp_path, DiskNeed(4 * free, 2 * free))


@pytest.mark.parametrize(
    ("count", "text"), [(1.44e9, "1.4 GB"), (23.2e9, "24 GB"), (870e6, "870 MB"), (2e6, "2.0 MB")]
)
def test_sizes_read_well(count: float, text: str) -> None:
    assert size(count) == text
