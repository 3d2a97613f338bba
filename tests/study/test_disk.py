"""What a study says about the disk before it begins."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from clsnf.core.config import DetectorSettings, StudySettings, replaced
from clsnf.core.errors import DiskFullError
from clsnf.study.disk import DiskNeed, check_room, estimate_disk, free_room, size
from clsnf.study.space import DEFAULT_SPACE, Space
from tests.support.small_data import TINY

SETTINGS = replaced(
    DetectorSettings(), {**TINY, "image.height": 64, "image.width": 64, "backbone.levels": (1, 2)}
)


def need(
    study: StudySettings | None = None,
    space: dict[str, Any] | None = None,
    settings: DetectorSettings = SETTINGS,
    categories: int = 1,
) -> DiskNeed:
    splits = ["fit"] * 8 + ["validation"] * 2 + ["test"] * 5
    tables = {str(n): pa.table({"split": splits}) for n in range(categories)}
    found = Space(DEFAULT_SPACE if space is None else space)
    return estimate_disk(settings, study or StudySettings(), found, tables)


def test_more_categories_trials_and_pixels_need_more_room() -> None:
    one = need()
    assert need(categories=3).study == 3 * one.study
    assert need(StudySettings(trials=1)).study < one.study
    larger = replaced(SETTINGS, {"image.height": 128, "image.width": 128})
    assert need(settings=larger).study > one.study
    assert one.trial < one.study


def test_what_trials_share_is_counted_once() -> None:
    many = StudySettings(trials=1000)
    assert need(many).study == need(StudySettings(trials=100)).study
    own: dict[str, Any] = {
        **DEFAULT_SPACE,
        "finetune.learning_rate": {"type": "float", "low": 1e-4, "high": 1e-3},
    }
    assert need(many, own).study > 50 * need(many).study
    scratch = StudySettings(trials=1000, reuse=False)
    assert need(scratch).study < need().study, "they delete their artifacts"


def test_of_several_backbones_the_one_that_needs_most_counts() -> None:
    sizes = [
        {"backbone.name": "resnet18", "image.height": 96, "image.width": 96},
        {"backbone.name": "resnet34", "flow.depth": 4},
    ]
    alone = [need(settings=replaced(SETTINGS, size), space=_DEPTHS).trial for size in sizes]
    joint = {"network": {"type": "choice", "values": sizes}}
    assert need(space=joint).trial == max(alone)


_DEPTHS: dict[str, Any] = {"finetune_epochs": {"type": "choice", "values": [1]}}


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
