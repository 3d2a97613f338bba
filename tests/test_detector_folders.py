"""Whose detector a path means: its own, that of a category, or nobody knows."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from clsnf.cli import main
from clsnf.core.errors import SettingsError
from clsnf.data.images import write_image
from clsnf.detector_folders import find_detector, find_detectors, folder_of_detectors
from clsnf.serving.settings import ServingSettings
from tests.support.small_server import picture


def test_a_study_means_its_winners(winners: Path) -> None:
    study = winners.parent
    assert folder_of_detectors(study) == folder_of_detectors(winners) == winners
    assert folder_of_detectors(winners / "plate") == winners / "plate"
    assert sorted(find_detectors(study).places) == ["plate", "sheet"]
    served = [ServingSettings.from_args({"models": str(folder)}) for folder in (study, winners)]
    assert served[0] == served[1], "the thresholds lie in the same folder too"


def test_one_of_several_is_asked_for_by_category(winners: Path, tmp_path: Path) -> None:
    for folder in (winners, winners.parent):
        assert find_detector(folder, "sheet") == winners / "sheet"
        with pytest.raises(SettingsError, match=f"holds 2 saved detectors.*{winners / 'plate'}, "):
            find_detector(folder)
        with pytest.raises(SettingsError, match=r"no detector of 'shet'.*sheet"):
            find_detector(folder, "shet")
    (tmp_path / "winners").mkdir()
    (tmp_path / "winners" / "only").symlink_to(winners / "plate")
    assert find_detector(tmp_path) == tmp_path / "winners" / "only"
    assert find_detector(winners / "plate") == winners / "plate"
    with pytest.raises(SettingsError, match="no detector of 'sheet'"):
        find_detector(winners / "plate", "sheet")


def test_predict_finds_the_detector_of_a_study(winners: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", picture())
    ask = ["predict", str(winners.parent), str(tmp_path / "a.png"), "--json"]
    found = CliRunner().invoke(main, [*ask, "--category", "plate"])
    assert found.exit_code == 0, found.output
    direct = CliRunner().invoke(
        main, ["predict", str(winners / "plate"), str(tmp_path / "a.png"), "--json"]
    )
    assert found.stdout == direct.stdout
    ambiguous = CliRunner().invoke(main, ask)
    assert ambiguous.exit_code == 2
    assert ambiguous.stderr.count("\n") == 1
    assert f"{winners / 'plate'}, {winners / 'sheet'}" in ambiguous.stderr
