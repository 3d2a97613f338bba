"""The README's commands are run as they stand, on small data; its settings page and its files are
what the project holds.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from clsnf.core.settings_yaml import settings_yaml
from tests.support.documented_commands import commands_of, make_example_folder, run

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def commands(start: str) -> list[str]:
    """The README's shell commands that start so."""
    return [line for line in commands_of(README) if line.startswith(start)]


def test_every_file_that_the_readme_names_is_there() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_the_settings_page_is_what_the_command_prints() -> None:
    page = (ROOT / "docs" / "settings.md").read_text()
    assert settings_yaml() in page, "run: clsnf settings, and put its output into docs/settings.md"


def test_the_test_command_is_what_ci_runs() -> None:
    (command,) = [c for c in commands("python -m venv") if "&& pytest" in c]
    assert "pip install -c constraints.txt -e '.[test]'" in command
    _, _, tests = command.rpartition("&& ")
    assert tests in (ROOT / ".ci" / "run").read_text().splitlines()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every path that the README's commands name exists."""
    return make_example_folder(tmp_path_factory.mktemp("folder"))


def test_your_own_product_from_good_pictures_to_heat_maps(folder: Path) -> None:
    (train,) = commands("clsnf train")
    (predict,) = commands("clsnf predict")
    assert "threshold" in run(train, folder, "--config", "small.yaml").stdout
    assert "verdict" in run(predict, folder).stdout
    assert len(list((folder / "heatmaps").glob("*_overlay.png"))) == 3


@pytest.mark.slow
def test_a_study_on_a_folder_of_categories_and_the_evaluation_of_its_winner(folder: Path) -> None:
    (study,) = commands("python tune/run_study.py --data")
    (evaluate,) = commands("clsnf evaluate")
    printed = run(
        study,
        folder,
        "--config",
        "small.yaml",
        "--trials",
        "2",
        "--space",
        "space.yaml",
        "--out",
        "runs/NAME",
    ).stdout
    assert "CATEGORY" in printed
    assert "image_auroc" in run(evaluate, folder).stdout
    assert (folder / "metrics.json").is_file()


@pytest.mark.slow
def test_the_benchmark_of_all_systems(folder: Path) -> None:
    (benchmark,) = commands("clsnf benchmark")
    assert (
        "fused_unshared" in run(benchmark, folder, "--config", "small.yaml", "--seeds", "2").stdout
    )
    assert (folder / "runs" / "five" / "tables" / "fused.md").is_file()


@pytest.mark.slow
def test_the_demo_finds_its_defects(tmp_path: Path) -> None:
    import json

    (command,) = [
        c.split("&& ")[-1] for c in commands("python -m venv") if c.endswith("run_study.py")
    ]
    (tmp_path / "tune").symlink_to(ROOT / "tune")
    printed = run(command, tmp_path).stdout
    (summary,) = (tmp_path / "runs").glob("*/summary.json")
    found = json.loads(summary.read_text())["categories"]
    assert len(found) >= 3
    assert np.mean([c["test"]["figures"]["image_auroc"] for c in found.values()]) >= 0.95
    assert str(summary.parent / "winners") in printed
