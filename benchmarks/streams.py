"""What a stream costs: time of training, time of its batches, and memory.

    python benchmarks/streams.py                       # all tables; about ten minutes on two cores
    python benchmarks/streams.py training --steps 6
    python benchmarks/streams.py batches --images 320
    python benchmarks/streams.py memory --images 20000

`training`: steps of the finetuning stage with resnet18 (decoder and backbone together, batches of
32 at 256 x 256). The batches were made before, or come from images in memory, or from images that
threads decode while it trains. `batches`: an epoch without training: read, decode, resize, make
defects, stack. The workers of a torch DataLoader do the same work with the same functions.
`memory`: drawn images pass once through each stream in a process of its own, whose largest memory
is printed. For Ray it is printed of the driver and of its largest worker; the object store, which
they share, is counted in each.

Images are drawn, 512 x 512, as PNG and JPEG in turns. Rounds alternate between the rows. In
`training` a row's numbers are medians over the rounds, and its share is that of its speed in a
round to the speed of the ready batches in the same round. Elsewhere the numbers are those of the
fastest round.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clsnf.core.config import DefectSettings, DetectorSettings, FinetuneSettings, ImageSettings
from clsnf.core.memory import keep_freed_memory
from clsnf.data.images import load_images
from clsnf.model.backbone import empty_backbone
from clsnf.model.network import build_decoder
from clsnf.model.resolve import resolved
from clsnf.streams.stream import (
    DefectRecipe,
    ImageBatch,
    LocalStream,
    MemoryStream,
    Stream,
    TrainingBatch,
    load_timed,
)
from clsnf.synthesis.textures import draw_textures
from clsnf.synthesis.training_defects import DefectMaker, sample_key
from clsnf.training.finetune import Finetuner

SETTINGS = ImageSettings()
CPU = torch.device("cpu")
BATCH = 32


def draw(path: str) -> None:
    """A plate with stripes and noise, different for every name."""
    rng = np.random.default_rng(int(Path(path).stem))
    rows, columns = np.mgrid[:512, :512]
    grey = (
        110
        + 40 * np.sin(columns / rng.uniform(3, 30) + rows / rng.uniform(3, 30))
        + rng.normal(0, 4, (512, 512))
    )
    cv2.imwrite(path, cv2.cvtColor(np.clip(grey, 0, 255).astype(np.uint8), cv2.COLOR_GRAY2BGR))


def pictures(folder: Path, count: int, distinct: int = 400) -> list[str]:
    """Draw pictures; above `distinct` they are links to the same ones, as slow to read."""
    folder.mkdir(parents=True, exist_ok=True)
    made = [
        str(folder / f"{n:05d}.{'jpg' if n % 2 else 'png'}") for n in range(min(count, distinct))
    ]
    with ProcessPoolExecutor() as pool:
        list(pool.map(draw, made, chunksize=16))
    paths = list(made)
    for number in range(len(made), count):
        source = Path(made[number % len(made)])
        link = folder / f"{number:05d}{source.suffix}"
        link.symlink_to(source)
        paths.append(str(link))
    return paths


def plan(n: int, epoch: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """An epoch's batches and the keys of its samples."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(epoch))
    keys = torch.from_numpy(sample_key(0, epoch, order.numpy()))
    return list(order.split(BATCH)), list(keys.split(BATCH))


def recipe_for(donors: Tensor) -> DefectRecipe:
    return DefectRecipe(DefectMaker(DefectSettings(), draw_textures(64, SETTINGS.size, 0), donors))


def table(title: str, columns: list[str], rows: dict[str, list[str]]) -> None:
    print(f"\n{title}\n{'':40}" + "".join(f"{c:>16}" for c in columns))
    for name, values in rows.items():
        print(f"{name:40}" + "".join(f"{v:>16}" for v in values))


# ---- training ----


class ReadyStream(MemoryStream):
    """Batches with defects that were all made before."""

    kind = "ready"

    def __init__(self, stream: MemoryStream, made: list[TrainingBatch]) -> None:
        super().__init__(stream.images)
        self.made = made

    def _training_batches(self, *arguments: Any) -> Iterator[TrainingBatch]:
        yield from self.made


def measure_training(folder: Path, steps: int, rounds: int) -> None:
    """Print the speed of training steps from each source of batches."""
    torch.manual_seed(0)
    paths = pictures(folder, steps * BATCH)
    memory = MemoryStream(load_images(paths, SETTINGS).images)
    recipe = recipe_for(memory.images)
    made = list(memory.training_batches(recipe, *plan(len(memory)), CPU))
    settings = FinetuneSettings(frozen_epochs=0, joint_epochs=1, repeats=1, batch_size=BATCH)
    backbone = empty_backbone(resolved(DetectorSettings()).backbone, SETTINGS.size)
    decoder = build_decoder(backbone.info, SETTINGS, settings, seed=0)
    trainer = Finetuner(backbone, decoder, memory, recipe, settings, 0, CPU)
    rows: dict[str, Callable[[], Stream]] = {
        "batches that lie in memory": lambda: ReadyStream(memory, made),
        "local stream, images in memory": lambda: MemoryStream(memory.images),
        "local stream, decoded by threads": lambda: LocalStream(paths, SETTINGS),
    }
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    waited: dict[str, float] = {}
    trainer.stream = ReadyStream(memory, made[:1])
    trainer.run(1)  # warms up
    for _ in range(rounds):
        for name, open_stream in rows.items():
            trainer.stream, trainer.epoch = open_stream(), 0
            begin = time.perf_counter()
            trainer.run(1)
            seconds[name].append(time.perf_counter() - begin)
            waited[name] = trainer.stream.counters.waited
    ready = np.array(seconds["batches that lie in memory"])
    table(
        f"Training with resnet18 on {torch.get_num_threads()} threads, {steps} steps of {BATCH} "
        "images at 256 x 256",
        ["images/s", "share", "waited, last"],
        {
            name: [
                f"{steps * BATCH / np.median(found):.2f}",
                f"{np.median(ready / found):.1%}",
                f"{waited[name]:.2f} s",
            ]
            for name, found in seconds.items()
        },
    )


# ---- batches alone ----


class Loading(Dataset[tuple[Tensor, ...]]):
    """The same work as a stream's, batch by batch, for a DataLoader."""

    def __init__(
        self, paths: list[str], recipe: DefectRecipe, chosen: list[Tensor], keys: list[Tensor]
    ) -> None:
        self.paths, self.recipe, self.chosen, self.keys = paths, recipe, chosen, keys

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, number: int) -> tuple[Tensor, ...]:
        images = torch.stack(
            [load_timed(self.paths[index], SETTINGS)[0] for index in self.chosen[number].tolist()]
        )
        made = self.recipe.apply(
            ImageBatch(images, None, self.chosen[number]), self.keys[number], CPU
        )
        return made.defects.images, made.defects.regions, made.defects.clean


def measure_batches(folder: Path, count: int, rounds: int) -> None:
    """Print the milliseconds a batch of each source, without training."""
    from clsnf.streams.ray_stream import RayStream
    from clsnf.study.cluster import ray_session

    paths = pictures(folder, count)
    recipe = recipe_for(load_images(paths[:64], SETTINGS).images)
    workers = max(1, multiprocessing.cpu_count())
    chosen, keys = plan(count)
    data = Loading(paths, recipe, chosen, keys)
    loaders = [
        DataLoader(
            data,
            batch_size=None,
            num_workers=workers,
            persistent_workers=True,
            multiprocessing_context="spawn",
        )
    ]

    def passed(found: Iterator[Any]) -> None:
        for _ in found:
            pass

    with ray_session(None, 1 << 30):
        ray_stream = RayStream(paths, SETTINGS, workers)
        rows: dict[str, Callable[[], None]] = {
            f"DataLoader, {workers} workers": lambda: passed(iter(loaders[0])),
            f"Ray stream, {workers} workers": lambda: passed(
                ray_stream.training_batches(recipe, chosen, keys, CPU)
            ),
            "local stream": lambda: passed(
                LocalStream(paths, SETTINGS).training_batches(recipe, chosen, keys, CPU)
            ),
        }
        seconds: dict[str, list[float]] = {name: [] for name in rows}
        for turn in range(rounds + 1):
            for name, run in rows.items():
                begin = time.perf_counter()
                run()
                if turn:  # the first starts processes
                    seconds[name].append(time.perf_counter() - begin)
        rows.clear()
        loaders.clear()  # its workers end before Ray's processes are ended
    best = {name: min(found) for name, found in seconds.items()}
    first = next(iter(best.values()))
    table(
        f"Read, decode, resize, defects, stack: {len(chosen)} batches of {BATCH} at 256 x 256",
        ["ms/batch", "images/s", "cost"],
        {
            name: [f"{1000 * s / len(chosen):.0f}", f"{count / s:.0f}", f"{s / first:.2f}"]
            for name, s in best.items()
        },
    )


# ---- memory ----


def one_pass(kind: str, folder: Path, count: int) -> None:
    """Pass every image once through a stream, with defects; print this process's largest memory."""
    paths = sorted(str(path) for path in folder.iterdir())[:count]
    # As many donors as training keeps of so many images.
    from clsnf.training.pipeline import donor_indices

    donors, worker = donor_indices(count, SETTINGS.size), 0
    chosen, keys = plan(count)
    if kind == "ray":
        from clsnf.streams.ray_stream import RayStream
        from clsnf.study.cluster import ray_session

        with ray_session(None, 1 << 30):
            stream = RayStream(paths, SETTINGS, 2)
            recipe = recipe_for(stream.load_shared(donors, CPU))
            for number, _ in enumerate(stream.training_batches(recipe, chosen, keys, CPU)):
                if number % 20 == 0:
                    found = [
                        p
                        for p in psutil.Process().children(recursive=True)
                        if "MapBatches" in " ".join(p.cmdline())
                    ]
                    worker = max([worker, *(p.memory_info().rss for p in found)])
    else:
        local = LocalStream(paths, SETTINGS)
        recipe = recipe_for(local.load_shared(donors, CPU))
        for _ in local.training_batches(recipe, chosen, keys, CPU):
            pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"peak": peak, "worker": worker}))


def measure_memory(folder: Path, count: int) -> None:
    """Print the largest memory of a process while every image passes once."""
    pictures(folder, count)
    rows = {}
    for kind in ("local", "ray"):
        begin = time.perf_counter()
        options = ["--kind", kind, "--folder", str(folder), "--images", str(count)]
        command = [sys.executable, __file__, "one-pass", *options]
        ended = subprocess.run(command, check=True, capture_output=True, text=True)
        found = json.loads(ended.stdout.splitlines()[-1])
        took = time.perf_counter() - begin
        worker = f"{found['worker'] / 2**30:.2f} GiB" if found["worker"] else "-"
        rows[f"{kind} stream"] = [f"{found['peak'] / 2**30:.2f} GiB", worker, f"{count / took:.0f}"]
    table(
        f"{count} images once through a stream, with defects",
        ["this process", "largest worker", "images/s"],
        rows,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "what",
        nargs="?",
        choices=["all", "training", "batches", "memory", "one-pass"],
        default="all",
    )
    parser.add_argument("--steps", type=int, default=6, help="of training, each round")
    parser.add_argument("--images", type=int, help="of batches (320) and of memory (20000)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kind", default="local")
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    keep_freed_memory()  # as every command does
    if arguments.what == "one-pass":
        one_pass(arguments.kind, arguments.folder, arguments.images)
        return
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.what in ("all", "training"):
            measure_training(Path(scratch) / "training", arguments.steps, arguments.rounds)
        if arguments.what in ("all", "batches"):
            measure_batches(Path(scratch) / "batches", arguments.images or 320, arguments.rounds)
        if arguments.what in ("all", "memory"):
            measure_memory(Path(scratch) / "memory", arguments.images or 20_000)


if __name__ == "__main__":
    main()
