"""Categories that a worker process keeps loaded."""

from pathlib import Path
from typing import Any

import pytest

from clsnf.core.config import DetectorSettings, StudySettings, replaced
from clsnf.study import worker
from clsnf.study.context import StudyContext
from clsnf.study.folder import StudyFolder

SETTINGS = DetectorSettings()


def context(out: Path) -> StudyContext:
    folder = StudyFolder(str(out))
    return StudyContext(folder, SETTINGS, StudySettings(), (), (), (), None, "cpu", threads=1)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the categories, each time that one is loaded."""
    names: list[str] = []

    def load(context: StudyContext, category: str, *_: Any) -> object:
        names.append(category)
        return object()

    monkeypatch.setattr(worker, "load_workbench", load)
    return names


def test_settings_that_each_call_of_the_pipeline_gets_share_a_workbench(
    loaded: list[str], tmp_path: Path
) -> None:
    benches, study = worker.LoadedWorkbenches(), context(tmp_path)
    first = benches.get(study, "nut", SETTINGS)
    given_anew = {
        "fusion_weight": 0.9,
        "score_weight": 0.1,
        "finetune.joint_epochs": 1,
        "flow.depth": 1,
    }
    for name, value in given_anew.items():
        assert benches.get(study, "nut", replaced(SETTINGS, {name: value})) is first
    assert benches.get(study, "nut", replaced(SETTINGS, {"finetune.loss": "focal"})) is not first
    assert benches.get(context(tmp_path / "other"), "nut", SETTINGS) is not first
    assert loaded == ["nut"] * 3


def test_the_least_recently_used_workbench_goes_first(loaded: list[str], tmp_path: Path) -> None:
    benches, study = worker.LoadedWorkbenches(most=2), context(tmp_path)
    for category in ("nut", "bolt", "nut", "gear", "nut", "bolt"):
        benches.get(study, category, SETTINGS)
    assert loaded == ["nut", "bolt", "gear", "bolt"]
    benches.clear()
    benches.get(study, "nut", SETTINGS)
    assert loaded[-1] == "nut"
