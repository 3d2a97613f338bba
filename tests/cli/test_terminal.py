"""What is shown: results on standard output, all else on standard error, and names as they are."""

from collections.abc import Sequence
from typing import Any

import pytest

from clsnf.cli.terminal import Terminal
from clsnf.core.config import DetectorSettings, StudySettings, replaced
from clsnf.evaluation.predict_files import FilePrediction
from clsnf.results import (
    CategoryResult,
    FailedTrial,
    StudySummary,
    ThresholdReport,
    TrialResult,
    ValidationResult,
    WinnerResult,
)

NAMES = ["[bold]part.png", "a[/b].png", "[red]", "x [/] y", ":bug:.png", "ü", "a\\[b]"]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_pictures_are_shown_as_they_are(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Terminal().predictions([FilePrediction(name, 0.25, 0.5, "good", 0.1)], 0.5)
    shown = capsys.readouterr()
    assert name in shown.out
    assert "0.2500" in shown.out
    assert shown.err == ""


def study_summary(category: str, failed: Sequence[FailedTrial] = ()) -> StudySummary:
    """A study of one category without test images, with few validation normals."""
    settings = replaced(DetectorSettings(), {"fusion_weight": 0.25})
    threshold = ThresholdReport(0.5, 0.01, 0.2, 4, (0.0, 0.5))
    validation = ValidationResult({"pixel_ap": 0.5}, {})
    winner = WinnerResult("w", 0, settings, {}, validation, threshold)
    result = CategoryResult(1, 0, list(failed), winner=winner)
    return StudySummary("0.1.0", "", 1.0, {category: result}, settings, StudySettings())


@pytest.mark.parametrize("name", NAMES)
def test_names_of_categories_and_causes_are_shown_as_they_are(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    failed = FailedTrial(1, f"ImageError: {name} is damaged")
    Terminal().summary(study_summary(name, [failed]), tmp_path)
    shown = capsys.readouterr()
    assert name in shown.out
    assert f"{name}, trial 1 failed: ImageError: {name} is damaged" in shown.err


def test_what_is_left_out_and_what_a_threshold_cannot_stand_for_is_said(
    capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    Terminal().summary(study_summary("nut"), tmp_path)
    shown = capsys.readouterr()
    assert "nut has no labelled test pictures with defects: test metrics are left out" in shown.err
    assert "a false-reject rate of 0.200 at best, not for 0.01" in shown.err
    assert str(tmp_path / "winners") in shown.out


def test_long_work_without_a_terminal_says_nothing_at_first(
    capsys: pytest.CaptureFixture[str],
) -> None:
    terminal = Terminal()
    with terminal.live():
        for done in range(1, 101):
            terminal.progress("features", done, 100)
    assert capsys.readouterr() == ("", "")


def test_a_line_about_a_trial_has_its_number_and_how_many_ended(
    capsys: pytest.CaptureFixture[str],
) -> None:
    reporter = Terminal().reporter(DetectorSettings(), ["nut", "bolt"], StudySettings(trials=3))
    reporter.begun("nut")
    reporter.trial(TrialResult("nut", 2, "failed", cause="no", config={"flow_depth": 4}))
    said = capsys.readouterr().err
    assert said == "1 of 6 trials ended: nut, trial 2: flow_depth 4: failed: no\n"


@pytest.mark.parametrize(
    ("study", "begin"),
    [
        (StudySettings(trials=None), "1 trial ended: nut"),
        (StudySettings(trials=None, total_trials=5), "1 of 5 trials ended: nut"),
        (StudySettings(trials=2, total_trials=5), "1 of 4 trials ended: nut"),
    ],
)
def test_a_line_about_a_trial_knows_of_shared_budgets(
    study: StudySettings, begin: str, capsys: pytest.CaptureFixture[str]
) -> None:
    reporter = Terminal().reporter(DetectorSettings(), ["nut", "bolt"], study)
    reporter.begun("nut")
    reporter.trial(TrialResult("nut", 0, "failed", cause="no"))
    assert capsys.readouterr().err.startswith(begin)
