"""How much faster training and feature extraction on CPUs are when freed memory is kept.

    python benchmarks/allocator.py                    # about two minutes on two cores

Each row runs in processes of its own: one with the C library's default, one with
:func:`clsnf.core.memory.keep_freed_memory`. `training` is stage one (ResNet-18, batches of 32),
`features` the backbone alone (batches of 16), both at 256 x 256 with random weights. The rows take
turns; each shows its fastest round.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from clsnf.core.config import DefectSettings, DetectorSettings, FinetuneSettings, ImageSettings
from clsnf.core.memory import keep_freed_memory
from clsnf.core.pixels import to_floats
from clsnf.model.backbone import empty_backbone
from clsnf.model.network import build_decoder
from clsnf.model.resolve import resolved
from clsnf.streams.stream import DefectRecipe, MemoryStream
from clsnf.synthesis.textures import draw_textures
from clsnf.synthesis.training_defects import DefectMaker
from clsnf.training.finetune import Finetuner

ROWS = {"C library's default": False, "freed memory kept": True}
IMAGES = 64


def seconds_of(work: Callable[[], object], times: int) -> float:
    """Seconds of the fastest of several calls, after one to warm up."""
    work()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def measure() -> dict[str, float]:
    """Images per second of training and of feature extraction, and the peak memory in GiB."""
    settings = FinetuneSettings(frozen_epochs=0, joint_epochs=1, repeats=1, batch_size=32)
    image = ImageSettings()
    images = draw_textures(IMAGES, image.size, 0)
    backbone = empty_backbone(resolved(DetectorSettings()).backbone, image.size)
    decoder = build_decoder(backbone.info, image, settings, seed=0)
    recipe = DefectRecipe(DefectMaker(DefectSettings(), images, images))
    trainer = Finetuner(
        backbone, decoder, MemoryStream(images), recipe, settings, 0, torch.device("cpu")
    )

    def train() -> None:
        trainer.epoch = 0
        trainer.run(1)

    batch = to_floats(images[:16])

    def extract() -> None:
        with torch.inference_mode():
            backbone.eval()(batch)

    return {
        "training": IMAGES / seconds_of(train, 3),
        "features": len(batch) / seconds_of(extract, 12),
        "GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--row", choices=ROWS)
    arguments = parser.parse_args()
    if arguments.row:
        if ROWS[arguments.row]:
            keep_freed_memory()
        print(json.dumps(measure()))
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ROWS}
    for _ in range(arguments.rounds):
        for name, results in found.items():
            command = [sys.executable, __file__, "--row", name]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            results.append(json.loads(done.stdout))
    print(f"{torch.get_num_threads()} threads")
    print(f"{'':24}{'training, images/s':>20}{'features, images/s':>20}{'peak memory':>16}")
    for name, results in found.items():
        training = max(result["training"] for result in results)
        features = max(result["features"] for result in results)
        memory = min(result["GiB"] for result in results)
        print(f"{name:24}{training:20.1f}{features:20.1f}{memory:12.2f} GiB")


if __name__ == "__main__":
    main()
