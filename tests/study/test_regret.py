"""When a regret is computed."""

from pathlib import Path

import pytest

from clsnf.core.config import DetectorSettings, StudySettings, replaced
from clsnf.results import TrialResult
from clsnf.study.context import StudyContext
from clsnf.study.folder import StudyFolder
from clsnf.study.regret import wants_regret


def context(tmp_path: Path, size: int, regret: bool | None) -> StudyContext:
    settings = replaced(DetectorSettings(), {"image.height": size, "image.width": size})
    folder = StudyFolder(str(tmp_path))
    return StudyContext(
        folder, settings, StudySettings(regret=regret), (), (), (), None, "cpu", threads=1
    )


def trials(depths: int, weights: int) -> list[TrialResult]:
    return [
        TrialResult("nut", n, "finished", config={"flow_depth": depth, "fusion_weight": n / 100})
        for n, depth in enumerate(list(range(depths)) * weights)
    ]


@pytest.mark.parametrize(
    ("size", "depths", "images", "cheap"),
    [(256, 10, 100, True), (256, 10, 110, False), (256, 11, 100, False), (128, 11, 300, True)],
)
def test_by_default_where_networks_and_test_images_are_few(
    tmp_path: Path, size: int, depths: int, images: int, cheap: bool
) -> None:
    tried = trials(depths, weights=3)  # another weight needs no other network
    assert wants_regret(context(tmp_path, size, None), tried, images) is cheap
    assert wants_regret(context(tmp_path, size, True), tried, images)
    assert not wants_regret(context(tmp_path, size, False), tried, images)
