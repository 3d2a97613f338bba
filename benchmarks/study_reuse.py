"""What sharing artifacts saves: the same trials of one category with reuse and from scratch.

    python benchmarks/study_reuse.py                                  # a product of the demo
    python benchmarks/study_reuse.py --data MVTEC --category screw \\
        --backbone resnet18 --weights resnet18.safetensors --size 128

Both studies have one seed and run one trial at a time. The suggestions depend on the seed and on
the metrics of the trials before, so both studies run the same list of settings only if every metric
is the same. The benchmark checks all of them to the last bit.

The default space has nine points, because each trial sweeps the fusion weight. A tuner that draws
the weight as well spends a trial on each weight. The last line compares with so many trials
(`--drawn`), each at the measured mean cost of a trial from scratch.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

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
from clsnf.results import TrialResult, read_trials
from clsnf.study.request import Reporter, StudyRequest
from clsnf.study.run import run_study
from clsnf.study.space import read_space


def run(given: argparse.Namespace, data: Path, out: Path, reuse: bool) -> list[TrialResult]:
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

    def say(trial: TrialResult) -> None:
        nonlocal done
        done += 1
        console.print(
            f"{'reuse' if reuse else 'from scratch'}: trial {done} of {given.trials}, "
            f"{trial.seconds:.1f} s"
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
    run_study(request, Reporter(trial=say))
    return sorted(read_trials(out / "trials.parquet"), key=lambda trial: trial.number)


def differing(shared: Sequence[TrialResult], scratch: Sequence[TrialResult]) -> int:
    """Number of trials that differ in a setting or, to the last bit, in a metric."""

    def compared(trial: TrialResult) -> tuple[object, ...]:
        measured = trial.measured
        return trial.config, trial.objective, measured.validation, measured.families

    return sum(compared(a) != compared(b) for a, b in zip(shared, scratch, strict=True))


def by_kind(trials: Sequence[TrialResult]) -> dict[str, float]:
    """Seconds by kind of work."""
    sums: dict[str, float] = defaultdict(float)
    for trial in trials:
        kinds = trial.measured.seconds_by_kind
        for kind, value in kinds.items():
            sums[kind] += value
        sums["the rest of the trials"] += trial.seconds - sum(kinds.values())
        sums["Ray and Optuna"] += overhead(trial)
    return sums


def elapsed(trial: TrialResult) -> float:
    """Seconds from suggestion to result."""
    return trial.wall_seconds or 0.0


def overhead(trial: TrialResult) -> float:
    """Seconds that were no work of the trial's own."""
    return elapsed(trial) - trial.seconds


def show(
    given: argparse.Namespace, shared: Sequence[TrialResult], scratch: Sequence[TrialResult]
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
    work = [sum(trial.seconds for trial in trials) for trials in (shared, scratch)]
    whole = [sum(map(elapsed, trials)) for trials in (shared, scratch)]
    for name, (a, b) in (("work", work), ("from suggestion to result", whole)):
        table.add_row(name, f"{a:.1f}", f"{b:.1f}", f"{b / a:.1f}")
    console.print(table)
    wrong = differing(shared, scratch)
    console.print(
        "metrics: the same in every trial, to the last bit"
        if not wrong
        else f"metrics: {wrong} trials DIFFER"
    )
    drawn = given.drawn * whole[1] / len(scratch)
    console.print(
        f"{given.drawn} trials from scratch that draw a weight each: {drawn:.0f} s, "
        f"{drawn / whole[0]:.1f} times the study with reuse"
    )
    overheads = sorted(map(overhead, shared))
    console.print(
        f"engine: {statistics.median(overheads):.2f} s a trial at the median, "
        f"{statistics.mean(overheads):.2f} s at the mean, {overheads[-1]:.2f} s at most (the "
        "first, which starts the worker)"
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
    parser.add_argument("--trials", type=int, default=9)
    parser.add_argument(
        "--drawn", type=int, default=24, help="trials of a tuner that draws weights"
    )
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
