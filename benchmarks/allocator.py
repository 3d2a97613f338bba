"""What keeping freed memory is worth on CPUs: training and looking, each in processes with the C
library's habits and with ours.

    python benchmarks/allocator.py                    # about two minutes on two cores

`training`: steps of stage one (ResNet-18, batches of 32). `features`: the backbone alone, batches
    of 16. All at 256 x 256 on random
weights. Processes alternate between the rows; a row's figures are its fastest round's.
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

from clsnf.core.config import DefectSettings, FinetuneSettings, ImageSettings
from clsnf.core.memory import keep_freed_memory
from clsnf.model.backbone import empty_backbone
from clsnf.model.network import build_decoder
from clsnf.streams.stream import DefectRecipe, MemoryStream
from clsnf.synthesis.textures import draw_textures
from clsnf.synthesis.training_defects import DefectMaker
from clsnf.training.finetune import Finetuner

ROWS = {"as the C library does": False, "freed memory kept": True}
IMAGES = 64


def seconds_of(work: Callable[[], object], times: int) -> float:
    """Of the fastest of some calls, after one that warms up."""
    work()
    taken = []
    for _ in range(times):
        begin = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begin)
    return min(taken)


def measure() -> dict[str, float]:
    settings, image = (
        FinetuneSettings(frozen_epochs=0, joint_epochs=1, repeats=1, batch_size=32),
        ImageSettings(),
    )
    images = draw_textures(IMAGES, image.size, 0)
    backbone = empty_backbone("resnet18", (1, 2, 3), image.size)
    decoder = build_decoder(backbone.info, image, settings, seed=0)
    recipe = DefectRecipe(DefectMaker(DefectSettings(), images, images))
    trainer = Finetuner(
        backbone, decoder, MemoryStream(images), recipe, settings, 0, torch.device("cpu")
    )

    def train() -> None:
        trainer.epoch = 0
        trainer.run(1)

    floats = images[:16].float() / 255

    def look() -> None:
        with torch.inference_mode():
            backbone.eval()(floats)

    return {
        "training": IMAGES / seconds_of(train, 3),
        "features": len(floats) / seconds_of(look, 12),
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
            results.append(
                json.loads(
                    subprocess.run(command, check=True, capture_output=True, text=True).stdout
                )
            )
    print(
        f"{torch.get_num_threads()} threads\n{'':24}{'training, images/s':>20}{'features, images/s':>20}{'largest memory':>16}"
    )
    for name, results in found.items():
        training, features = (
            max(result[what] for result in results) for what in ("training", "features")
        )
        print(
            f"{name:24}{training:20.1f}{features:20.1f}{min(result['GiB'] for result in results):12.2f} GiB"
        )


if __name__ == "__main__":
    main()
