"""What sharing stages saves: the same trials of one category with reuse and from scratch, and where
the time went.

    python benchmarks/study_reuse.py                                  # a product of the demo
    python benchmarks/study_reuse.py --data MVTEC --category screw --backbone resnet18 --weights
    resnet18.safetensors --size 128

Both studies have one seed and run one trial at a time. The searcher's suggestions depend on the
seed and on the figures of the trials before, so both run the same list of settings exactly if every
figure is the same; the benchmark checks all of them to the last bit.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from clsnf.core.config import (
    BackboneSettings,
    DetectorSettings,
    FinetuneSettings,
    ImageSettings,
    StudySettings,
    ValidationSettings,
)
from clsnf.data.layouts import read_category
from clsnf.datasets.demo import write_demo
from clsnf.study.run import Reporter, StudyRequest, run_study
from clsnf.study.space import read_space


def run(given: argparse.Namespace, data: Path, out: Path, reuse: bool) -> list[dict[str, Any]]:
    """Trials of one study, in the order in which they were suggested."""
    settings = DetectorSettings(
        image=ImageSettings(height=given.size, width=given.size),
        backbone=BackboneSettings(name=given.backbone, weights=given.weights),
        finetune=FinetuneSettings(
            frozen_epochs=16 if given.backbone == "demo" else FinetuneSettings().frozen_epochs
        ),
        validation=ValidationSettings(
            fraction=0.25 if given.backbone == "demo" else ValidationSettings().fraction
        ),
        seed=given.seed,
    )
    console = Console(stderr=True, highlight=False)
    done = 0

    def tell(record: dict[str, Any]) -> None:
        nonlocal done
        done += 1
        console.print(
            f"{'reuse' if reuse else 'from scratch'}: trial {done} of {given.trials}, "
            f"{record['seconds']:.1f} s"
        )

    request = StudyRequest(
        tables=[read_category(data, given.category)],
        out=out,
        settings=settings,
        study=StudySettings(
            trials=given.trials, concurrent_trials=1, cpus_per_trial=given.cpus, reuse=reuse
        ),
        space=read_space(given.space),
        textures=given.textures,
        device=given.device,
    )
    run_study(request, Reporter(trial=tell))
    return sorted(pq.read_table(out / "trials.parquet").to_pylist(), key=lambda row: row["trial"])


def differing(shared: list[dict[str, Any]], scratch: list[dict[str, Any]]) -> int:
    """Number of trials that differ in a setting or, to the last bit, in a figure."""
    compared = [
        name
        for name in shared[0]
        if name.startswith(("config/", "validation_", "family_")) or name == "objective"
    ]
    return sum(
        any(a[name] != b[name] for name in compared) for a, b in zip(shared, scratch, strict=True)
    )


def by_kind(trials: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds by kind of work."""
    sums: dict[str, float] = defaultdict(float)
    for trial in trials:
        kinds = {
            name.removeprefix("seconds_"): value or 0.0
            for name, value in trial.items()
            if name.startswith("seconds_")
        }
        for kind, value in kinds.items():
            sums[kind] += value
        sums["the rest of the trials"] += trial["seconds"] - sum(kinds.values())
        sums["Ray and Optuna"] += trial["wall_seconds"] - trial["seconds"]
    return sums


def show(
    given: argparse.Namespace, shared: list[dict[str, Any]], scratch: list[dict[str, Any]]
) -> None:
    """The tables."""
    console = Console(highlight=False, width=120)
    table = Table(
        title=f"{given.category}, {given.size} px, {len(shared)} trials: seconds by kind of work",
        title_justify="left",
    )
    for column in ("", "reuse", "from scratch", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    kinds = by_kind(shared), by_kind(scratch)
    for kind in sorted({*kinds[0], *kinds[1]}, key=lambda kind: -kinds[1].get(kind, 0.0)):
        a, b = (found.get(kind, 0.0) for found in kinds)
        table.add_row(kind, f"{a:.1f}", f"{b:.1f}", f"{b / a:.1f}" if a > 0.05 else "-")
    table.add_section()
    work = [sum(t["seconds"] for t in trials) for trials in (shared, scratch)]
    whole = [sum(t["wall_seconds"] for t in trials) for trials in (shared, scratch)]
    table.add_row("work", f"{work[0]:.1f}", f"{work[1]:.1f}", f"{work[1] / work[0]:.1f}")
    table.add_row(
        "from suggestion to result",
        f"{whole[0]:.1f}",
        f"{whole[1]:.1f}",
        f"{whole[1] / whole[0]:.1f}",
    )
    console.print(table)
    wrong = differing(shared, scratch)
    console.print(
        "figures: the same in every trial, to the last bit"
        if not wrong
        else f"figures: {wrong} trials DIFFER"
    )
    known = [t["wall_seconds"] for t in shared if t["stages_computed"] == 0]
    if known:
        console.print(
            f"{len(known)} trials needed only a new fusion weight: {statistics.median(known):.2f} "
            "s from suggestion to result at the "
            f"median, {max(known):.2f} s at most"
        )
    overhead = sorted(t["wall_seconds"] - t["seconds"] for t in shared)
    console.print(
        f"engine: {statistics.median(overhead):.2f} s a trial at the median, "
        f"{statistics.mean(overhead):.2f} s at the mean, "
        f"{overhead[-1]:.2f} s at most (the first, which starts the worker)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="default: the demo's products")
    parser.add_argument("--category", default="gear")
    parser.add_argument("--backbone", default="demo")
    parser.add_argument("--weights")
    parser.add_argument("--textures", type=Path)
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--cpus", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--space", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--out", type=Path, help="where the studies stay; default: a folder that is removed"
    )
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        out = given.out or Path(temporary)
        data = given.data or Path(temporary) / "demo"
        if given.data is None:
            write_demo(data)
        shared = run(given, data, out / "reuse", reuse=True)
        scratch = run(given, data, out / "scratch", reuse=False)
    show(given, shared, scratch)


if __name__ == "__main__":
    main()
