"""A backbone from training to export, in a process of its own: what it breaks, breaks alone.

python -m tests.support.one_backbone repvgg_a0 128 FOLDER
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from clsnf.core.config import DetectorSettings, replaced
from clsnf.data.images import read_image
from clsnf.data.layouts import read_category
from clsnf.data.splits import assign_splits
from clsnf.detector import Detector
from clsnf.serving.export import export_detector
from tests.conftest import random_state
from tests.support.small_data import TINY, write_category


def try_backbone(architecture: str, size: int, folder: Path) -> None:
    """Train with a joint epoch, save, load, pickle and export; raises what goes wrong."""
    # Some CPUs would train in bfloat16, for which oneDNN has other code than for float32.
    torch.cpu._is_avx512_bf16_supported = lambda: False
    weights = folder / "weights.safetensors"
    save_file({name: t.clone() for name, t in random_state(architecture).items()}, weights)
    write_category(folder / "plate", train=10, size=(size, size))
    table = assign_splits(read_category(folder, "plate"), 0.2, 0)
    values = TINY | {
        "backbone.name": architecture,
        "backbone.levels": [1, 2],
        "backbone.weights": str(weights),
        "image.height": size,
        "image.width": size,
    }
    detector = Detector.fit(table, replaced(DetectorSettings(), values), device="cpu")
    pictures = np.stack([read_image(path) for path in table["path"].to_pylist()[:2]])
    expected = detector.predict(pictures)
    detector.save(folder / "model")
    for again in (Detector.load(folder / "model", "cpu"), pickle.loads(pickle.dumps(detector))):
        answers = again.predict(pictures)
        assert np.array_equal(answers.maps, expected.maps), "other maps after loading"
        assert np.array_equal(answers.scores, expected.scores), "other scores after loading"
    export_detector(Detector.load(folder / "model", "cpu"), folder / "model.pt2", "torch")


if __name__ == "__main__":
    try_backbone(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
