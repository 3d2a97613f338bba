"""The README's commands are run as they stand, on small data; its settings page and its files are what the project holds."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from clsnf.settings_text import settings_text

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()

# What makes the README's commands small; everything else in them stays as it is.
SMALL = """
image: {height: 64, width: 64}
backbone: {levels: [1, 2]}
finetune: {frozen_epochs: 1, joint_epochs: 0, decay_epochs: 1}
flow: {depth: 0, passes: 0.1}
validation: {images_per_family: 1}
"""


def commands(start: str) -> list[str]:
    """The README's shell commands that start so."""
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.startswith(start)]


def test_every_file_that_the_readme_names_is_there() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_the_settings_page_is_what_the_command_prints() -> None:
    page = (ROOT / "docs" / "settings.md").read_text()
    assert settings_text() in page, "run: clsnf settings, and put its output into docs/settings.md"


def test_the_test_command_is_what_ci_runs() -> None:
    (command,) = [c for c in commands("python -m venv") if c.endswith("&& pytest")]
    assert "pip install -c constraints.txt -e '.[test]'" in command
    assert "pytest" in (ROOT / ".ci" / "run").read_text().splitlines()


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every path that the README's commands name exists."""
    import timm
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("shop")
    rng = np.random.default_rng(0)

    def draw(path: Path, defect: bool = False) -> None:
        image = np.full((80, 80, 3), 128, np.uint8) + rng.integers(0, 20, (80, 80, 3), dtype=np.uint8)
        if defect:
            image[30:50, 30:50] = 255
        path.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), image)

    for i in range(12):
        draw(folder / "pictures" / "good" / f"{i}.png")
        draw(folder / "DATA" / "CATEGORY" / "train" / "good" / f"{i}.png")
    for i in range(3):
        draw(folder / "new-pictures" / f"{i}.png")
        draw(folder / "DTD" / "images" / "banded" / f"{i}.png")
        draw(folder / "DATA" / "CATEGORY" / "test" / "good" / f"{i}.png")
        draw(folder / "DATA" / "CATEGORY" / "test" / "dent" / f"{i}.png", defect=True)
        mask = np.zeros((80, 80), np.uint8)
        mask[30:50, 30:50] = 255
        truth = folder / "DATA" / "CATEGORY" / "ground_truth" / "dent" / f"{i}_mask.png"
        truth.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(truth), mask)
    save_file(timm.create_model("resnet18", pretrained=False).state_dict(), folder / "resnet18.safetensors")
    (folder / "small.yaml").write_text(SMALL)
    (folder / "tune").symlink_to(ROOT / "tune")
    (folder / "space.yaml").write_text("fusion_weight: {type: float, low: 0, high: 1}\n")
    return folder


def run(command: str, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    words = shlex.split(command)
    programs = {"python": [sys.executable], "clsnf": [sys.executable, "-c", "from clsnf.cli import main; main(prog_name='clsnf')"]}
    environment = {**os.environ, "HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    (folder / "home").mkdir(exist_ok=True)
    done = subprocess.run(
        [*programs[words[0]], *words[1:], *more],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,  # a net for what hangs; a busy machine is no failure
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_your_own_product_from_good_pictures_to_heat_maps(shop: Path) -> None:
    (train,) = commands("clsnf train")
    (predict,) = commands("clsnf predict")
    assert "threshold" in run(train, shop, "--config", "small.yaml").stdout
    assert "verdict" in run(predict, shop).stdout
    assert len(list((shop / "heatmaps").glob("*_overlay.png"))) == 3


@pytest.mark.slow
def test_a_study_on_a_folder_of_categories_and_the_evaluation_of_its_winner(shop: Path) -> None:
    (study,) = commands("python tune/run_study.py --data")
    (evaluate,) = commands("clsnf evaluate")
    printed = run(study, shop, "--config", "small.yaml", "--trials", "2", "--space", "space.yaml", "--out", "runs/NAME").stdout
    assert "CATEGORY" in printed
    assert "image_auroc" in run(evaluate, shop).stdout
    assert (shop / "figures.json").is_file()


@pytest.mark.slow
def test_the_benchmark_of_all_systems(shop: Path) -> None:
    (benchmark,) = commands("clsnf benchmark")
    assert "fused_unshared" in run(benchmark, shop, "--config", "small.yaml", "--seeds", "2").stdout
    assert (shop / "runs" / "five" / "tables" / "fused.md").is_file()


@pytest.mark.slow
def test_the_demo_finds_its_defects(tmp_path: Path) -> None:
    import json

    (command,) = [c.split("&& ")[-1] for c in commands("python -m venv") if c.endswith("run_study.py")]
    (tmp_path / "tune").symlink_to(ROOT / "tune")
    printed = run(command, tmp_path).stdout
    (summary,) = (tmp_path / "runs").glob("*/summary.json")
    found = json.loads(summary.read_text())["categories"]
    assert len(found) >= 3
    assert np.mean([c["test"]["figures"]["image_auroc"] for c in found.values()]) >= 0.95
    assert str(summary.parent / "winners") in printed
