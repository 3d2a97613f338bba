"""What each depth of the flows is worth to a study, and what it costs.

    python benchmarks/flow_depths.py --data MVTEC --categories screw,tire,cookie \\
        --backbone resnet18 --weights resnet18.safetensors --size 128 --out /tmp/depths

Every pair of joint epochs and depth of the default space is trained, with depth 4 added, and every
fusion weight is swept, so chance picks nothing. For each choice of depths, the pair and the weight
that are best on validation defects are then judged on the test images. Artifacts stay in `--out`: a
second run is short, and says no seconds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from clsnf.core.config import BackboneSettings, DetectorSettings, ImageSettings
from clsnf.core.device import choose_device
from clsnf.data.layouts import read_category
from clsnf.data.splits import assign_splits
from clsnf.evaluation.evaluate import metrics_of_maps
from clsnf.evaluation.selection import (
    choose_score_weight,
    family_metrics,
    mean_over_families,
    scores_at,
)
from clsnf.evaluation.workbench import Workbench
from clsnf.model.score_maps import image_scores
from clsnf.study.space import FUSION_WEIGHTS
from clsnf.synthesis.validation_set import write_validation_set
from clsnf.training.artifacts import ArtifactStore
from clsnf.training.pipeline import PlacedImages, ScoreMaps
from clsnf.training.prepare import place_rows, prepare, rows_of

CHOICES = ((0,), (0, 2), (0, 2, 4))
EPOCHS = (0, 4, 8)


@dataclass(frozen=True)
class Point:
    """Score maps of a number of joint epochs and a depth, at their best fusion weight."""

    epochs: int
    depth: int
    weight: float
    validation: float  # pixel AP, mean over the defect families
    seconds: float  # that the depth added: training its flows, and their maps


def points_of(bench: Workbench) -> list[Point]:
    """All points, trained where they are not stored."""
    points = []
    for epochs in EPOCHS:
        bench.pipeline.finetuned(epochs, EPOCHS)
        for depth in CHOICES[-1]:
            started = time.process_time()
            maps = bench.maps(epochs, depth)
            seconds = time.process_time() - started
            values = {weight: validation_ap(bench, maps, weight) for weight in FUSION_WEIGHTS}
            best = max(values, key=values.__getitem__)
            points.append(Point(epochs, depth, best, values[best], seconds))
    return points


def validation_ap(bench: Workbench, maps: ScoreMaps, weight: float) -> float:
    """Pixel AP at a fusion weight, mean over the defect families."""
    answers = scores_at(maps, weight, bench.labels.valid)
    found = family_metrics(answers, bench.labels, ("pixel_ap",))
    return mean_over_families(found, "pixel_ap")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--categories", required=True)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--weights")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    settings = DetectorSettings(
        image=ImageSettings(height=given.size, width=given.size),
        backbone=BackboneSettings(name=given.backbone, weights=given.weights),
        seed=given.seed,
    )
    for category in given.categories.split(","):
        judge(given, category, settings)


def judge(given: argparse.Namespace, category: str, settings: DetectorSettings) -> None:
    """Print a category's table."""
    table = assign_splits(
        read_category(given.data, category), settings.validation.fraction, settings.seed
    )
    store = ArtifactStore(given.out / "stages")
    prepared = prepare(table, settings, None, store, choose_device("cpu"))
    validation = write_validation_set(
        table,
        given.out / "validation" / category,
        images_per_family=settings.validation.images_per_family,
        seed=settings.seed,
        mask_mode=prepared.mask_mode,
    )
    bench = Workbench.load(prepared, validation)
    started = time.process_time()
    points = points_of(bench)
    whole = time.process_time() - started
    test = rows_of(table, "test")
    shown = Table(title=f"{category}, {given.size} px: {whole:.0f} s", title_justify="left")
    for column in ("depths", "epochs", "depth", "weight", "validation AP", "pixel AP", "AUROC"):
        shown.add_column(column, justify="right")
    images = place_rows(test, settings)
    for depths in CHOICES:
        best = max((p for p in points if p.depth in depths), key=lambda p: p.validation)
        found = test_metrics(bench, best, test.to_pylist(), images, settings)
        shown.add_row(
            str(depths),
            str(best.epochs),
            str(best.depth),
            f"{best.weight:g}",
            f"{best.validation:.4f}",
            *(f"{value:.4f}" for value in found),
        )
    console = Console(highlight=False, width=100)
    console.print(shown)
    by_depth = {depth: sum(p.seconds for p in points if p.depth == depth) for depth in CHOICES[-1]}
    console.print(
        "seconds by depth:", {depth: round(value, 1) for depth, value in by_depth.items()}
    )
    for point in points:
        console.print(point)


def test_metrics(
    bench: Workbench,
    point: Point,
    rows: Sequence[dict[str, Any]],
    images: PlacedImages,
    settings: DetectorSettings,
) -> tuple[float, float]:
    """Pixel AP, and image AUROC at the weight that validation chooses for scores."""
    maps = bench.maps(point.epochs, point.depth, images)
    weight = choose_score_weight(
        bench.maps(point.epochs, point.depth), bench.labels, FUSION_WEIGHTS
    )
    scores = image_scores(maps.fused(weight), images.valid).numpy()
    fused = scores_at(maps, point.weight, images.valid).maps.numpy()
    names = ("pixel_ap", "image_auroc")
    found = metrics_of_maps(list(rows), fused, scores, settings.image, names)
    return found["pixel_ap"], found["image_auroc"]


if __name__ == "__main__":
    main()
