"""Commands of the documentation, run as they stand: a folder in which every path that they name
exists, on small data.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np

ROOT = Path(__file__).parents[2]

# What makes the commands small; everything else in them stays as it is.
SMALL = """
image: {height: 64, width: 64}
backbone: {levels: [1, 2]}
finetune: {frozen_epochs: 1, joint_epochs: 0, decay_epochs: 1}
flow: {depth: 0, passes: 0.1}
validation: {images_per_family: 1}
"""


def commands_of(text: str, language: str = "bash") -> list[str]:
    """The lines of a page's shell blocks, in order."""
    return [line for block in blocks_of(text, language) for line in block.splitlines()]


def blocks_of(text: str, language: str) -> list[str]:
    """The contents of a page's blocks in a language."""
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def make_example_folder(folder: Path) -> Path:
    """Fill a folder with everything that the commands name."""
    import timm
    from safetensors.torch import save_file

    rng = np.random.default_rng(0)

    def draw(path: Path, defect: bool = False) -> None:
        image = np.full((80, 80, 3), 128, np.uint8) + rng.integers(
            0, 20, (80, 80, 3), dtype=np.uint8
        )
        if defect:
            image[30:50, 30:50] = 255
        path.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), image)

    for i in range(12):
        draw(folder / "pictures" / "good" / f"{i}.png")
        draw(folder / "pictures" / "new-good" / f"{i}.png")
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
    save_file(
        timm.create_model("resnet18", pretrained=False).state_dict(),
        folder / "resnet18.safetensors",
    )
    (folder / "small.yaml").write_text(SMALL)
    (folder / "tune").symlink_to(ROOT / "tune")
    (folder / "space.yaml").write_text("fusion_weight: {type: float, low: 0, high: 1}\n")
    return folder


def run(command: str, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    words = shlex.split(command)
    programs = {
        "python": [sys.executable],
        "clsnf": [sys.executable, "-c", "from clsnf.cli import main; main(prog_name='clsnf')"],
    }
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
