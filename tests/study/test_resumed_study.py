"""A real study is gone on with by its folder alone, with another product and more test pictures."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from clsnf.results import read_trials
from tests.support.running_study import ROOT, Study
from tests.support.small_data import write_category

pytestmark = pytest.mark.slow


def resume(study: Study, *arguments: str) -> str:
    """Standard error of the command without anything of what was said before."""
    done = subprocess.run(
        [study.python, str(ROOT / "tune" / "run_study.py"), *arguments],
        env=study.environment,
        cwd=study.folder,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_a_study_goes_on_by_its_folder_alone(tmp_path: Path, resnet18_weights: Path) -> None:
    study = Study(tmp_path, resnet18_weights)
    write_category(study.data / "alpha", 1)
    code, _, stderr = study.run("--trials", "2")
    assert code == 0, stderr
    before = study.summary()["categories"]["alpha"]
    opened = study.out / "ledger.jsonl"
    assert len(opened.read_text().splitlines()) == 1

    stderr = resume(study, "--resume", "out")
    assert "2 trials ended before: 0 are left" in stderr
    assert study.summary()["categories"]["alpha"] == before
    assert len(opened.read_text().splitlines()) == 1

    # Test pictures came, a product came, and the pictures have moved.
    write_category(study.data / "beta", 2)
    moved = study.data.rename(tmp_path / "moved")
    test = moved / "alpha" / "test" / "good"
    write_category(tmp_path / "more" / "alpha", 3)
    for file in (tmp_path / "more" / "alpha" / "test" / "good").iterdir():
        file.rename(test / f"new-{file.name}")
    stderr = resume(study, "--resume", "out", "--data", str(moved))
    assert "2 trials ended before: 2 are left" in stderr
    found = study.summary()["categories"]
    assert set(found) == {"alpha", "beta"}
    assert found["alpha"]["chosen"] == before["chosen"]
    assert found["alpha"]["threshold"] == before["threshold"]
    assert len(found["alpha"]["test"]["scores"]) == len(before["test"]["scores"]) + 3
    entries = [json.loads(line)["category"] for line in opened.read_text().splitlines()]
    assert sorted(entries) == ["alpha", "alpha", "beta"]
    assert sys.executable != study.python


def test_a_cleaned_study_goes_on_as_one_that_was_not_cleaned(
    tmp_path: Path, resnet18_weights: Path
) -> None:
    study = Study(tmp_path, resnet18_weights)
    write_category(study.data / "alpha", 1)
    code, _, stderr = study.run("--trials", "2")
    assert code == 0, stderr
    other = study.at(tmp_path / "other")
    shutil.copytree(study.out, other.out)
    cleaned = subprocess.run(
        [study.python, "-c", "from clsnf.cli import main; main()", "clean", "out"],
        env=study.environment | {"PYTHONPATH": str(ROOT)},
        cwd=study.folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert cleaned.returncode == 0, cleaned.stderr
    assert not list((study.out / "stages").glob("flows/*"))

    stderr = resume(study, "--resume", "out", "--trials", "4")
    assert "2 trials ended before: 2 are left" in stderr
    resume(study, "--resume", "other", "--trials", "4")
    ended, undisturbed = (
        [(trial.number, trial.status, trial.objective, trial.config) for trial in found]
        for found in (read_trials(one.out / "trials.parquet") for one in (study, other))
    )
    assert len(ended) == 4
    assert ended == undisturbed
    winners = [one.summary()["categories"]["alpha"] for one in (study, other)]
    assert winners[0]["chosen"] == winners[1]["chosen"]
    assert winners[0]["test"]["scores"] == winners[1]["test"]["scores"]
