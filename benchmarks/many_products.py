"""What a study of many products costs: memory, disk, and the engine's own time.

    python benchmarks/many_products.py                          # 10, 30, 100 and 200 products
    python benchmarks/many_products.py --categories 4,10 --out /tmp/many

Products are drawn, a few pictures of 32 x 32 each, and networks are tiny, so that the engine is
what is measured. Each study runs in processes of its own: its memory is read twice a second from
outside, everything else from the files that it leaves. Its report is built afterwards.

A quantity grows faster than linearly where a product costs more between the two largest studies
than between the two smallest. The last table compares these costs. The exit status is 1 where one
of them grew by more than half, or the driver took more than 1.5 GiB.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from optuna import load_study
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from rich.console import Console
from rich.table import Table

from clsnf.results import read_trials

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the small pictures are the tests'

from tests.support.small_data import TINY, write_category  # noqa: E402

MIB = 1024**2
MOST_DRIVER_MIB = 1536.0
MOST_GROWTH = 1.5
SETTINGS = TINY | {"finetune.frozen_epochs": 1, "finetune.joint_epochs": 1}
SPACE = """
fusion_weight: {type: float, low: 0.0, high: 1.0}
flow_depth: {type: choice, values: [0, 1]}
"""


@dataclass(frozen=True)
class Cost:
    """What one study took.

    Attributes:
        categories: number of products.
        trials: number of trials, all products together.
        driver: MiB, at most.
        driver_cpu: core-seconds of the driver alone.
        processes: MiB of all processes that ran at once, at most; pages that they share count once
            for each.
        first_trial: seconds from the command to the first trial.
        search: seconds from the first trial's beginning to the last one's end.
        engine: seconds of the search that were no work of trials, summed over the places for
            trials.
        one_trial: seconds of the same for one trial from its suggestion to its result, the median.
        finish: seconds from the last trial's end to the command's.
        report: seconds that `clsnf report` took.
        folders: the study's entry -> MiB.
    """

    categories: int
    trials: int
    driver: float
    driver_cpu: float
    processes: float
    first_trial: float
    search: float
    engine: float
    one_trial: float
    finish: float
    report: float
    folders: Mapping[str, float]

    @property
    def folder(self) -> float:
        """MiB of the study's folder."""
        return sum(self.folders.values())


class ProcessWatch:
    """Reads the memory of a process and its children, and its own time, while the block runs."""

    def __init__(self, pid: int, every: float = 0.5) -> None:
        self.driver = self.processes = 0.0  # MiB
        self.cpu = 0.0  # core-seconds of the process alone
        self._root, self._every = psutil.Process(pid), every
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> ProcessWatch:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(self._every):
            with suppress(psutil.Error):
                children = self._root.children(recursive=True)
                driver = self._root.memory_info().rss / MIB
                self.cpu = sum(self._root.cpu_times()[:2])
                self.driver = max(self.driver, driver)
                self.processes = max(self.processes, driver + sum(map(resident, children)))


def resident(process: psutil.Process) -> float:
    """MiB; 0 where the process has ended."""
    with suppress(psutil.Error):
        return process.memory_info().rss / MIB
    return 0.0


def folder_sizes(out: Path) -> dict[str, float]:
    """MiB of each entry of a study's folder, and of each kind of artifact."""
    sizes: dict[str, float] = {}
    for path in out.rglob("*"):
        if path.is_file() and not path.is_symlink():
            parts = path.relative_to(out).parts
            name = "/".join(parts[:2]) if parts[0] == "stages" else parts[0]
            sizes[name] = sizes.get(name, 0.0) + path.stat().st_size / MIB
    return sizes


def run_command(script: str, arguments: Sequence[str], log: Path) -> tuple[float, ProcessWatch]:
    """Run one of the doors; its seconds, and what it took.

    Raises:
        SystemExit: it failed; the log says why.
    """
    command = [sys.executable, str(ROOT / script), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    started = time.monotonic()
    with log.open("w") as lines:
        process = subprocess.Popen(command, stdout=lines, stderr=lines, env=environment)
        with ProcessWatch(process.pid) as watch:
            process.wait()
    if process.returncode:
        raise SystemExit(f"{script} ended with {process.returncode}:\n{log.read_text()[-3000:]}")
    return time.monotonic() - started, watch


def study_arguments(given: argparse.Namespace, data: Path, out: Path) -> list[str]:
    space = out.parent / "space.yaml"
    space.write_text(SPACE)
    arguments = ["--data", str(data), "--out", str(out), "--trials", str(given.trials)]
    arguments += ["--backbone", "demo", "--image-size", "32", "--device", "cpu"]
    arguments += ["--cpus-per-trial", "1", "--space", str(space)]
    if given.concurrent is not None:
        arguments += ["--concurrent-trials", str(given.concurrent)]
    return arguments + [p for name, value in SETTINGS.items() for p in ("--set", f"{name}={value}")]


def measure(given: argparse.Namespace, categories: int, folder: Path) -> Cost:
    """Draw the products, run the study, build its report."""
    data, out = folder / "data", folder / "out"
    for number in range(categories):
        name = data / f"product{number:04d}"
        write_category(name, number, train=8, good=2, defective=1, size=(32, 32))
    begun = time.time()
    arguments = study_arguments(given, data, out)
    seconds, watch = run_command("tune/run_study.py", arguments, folder / "study.log")
    sizes = folder_sizes(out)
    report, _ = run_command("reports/build.py", [str(out)], folder / "report.log")
    trials = read_trials(out / "trials.parquet")
    starts, ends = trial_times(out)
    places = min(given.concurrent or os.cpu_count() or 1, os.cpu_count() or 1, categories)
    search = max(ends) - min(starts)
    return Cost(
        categories=categories,
        trials=len(trials),
        driver=watch.driver,
        driver_cpu=watch.cpu,
        processes=watch.processes,
        first_trial=min(starts) - begun,
        search=search,
        engine=search * places - sum(trial.seconds for trial in trials),
        one_trial=statistics.median((t.wall_seconds or 0.0) - t.seconds for t in trials),
        finish=begun + seconds - max(ends),
        report=report,
        folders=sizes,
    )


def trial_times(out: Path) -> tuple[list[float], list[float]]:
    """When each trial began and ended, in seconds since the epoch."""
    storage: BaseStorage = JournalStorage(JournalFileBackend(str(out / "optuna.journal")))
    trials = [
        trial
        for study in storage.get_all_studies()
        for trial in load_study(study_name=study.study_name, storage=storage).get_trials(False)
    ]
    starts = [trial.datetime_start for trial in trials]
    ends = [trial.datetime_complete for trial in trials]
    return [t.timestamp() for t in starts if t], [t.timestamp() for t in ends if t]


# ---- tables ----

ROWS = {
    "driver, MiB": lambda cost: cost.driver,
    "driver, core-s": lambda cost: cost.driver_cpu,
    "all processes, MiB": lambda cost: cost.processes,
    "to the first trial, s": lambda cost: cost.first_trial,
    "search, s": lambda cost: cost.search,
    "engine's part of the search, core-s": lambda cost: cost.engine,
    "from the last trial to the end, s": lambda cost: cost.finish,
    "report, s": lambda cost: cost.report,
    "folder, MiB": lambda cost: cost.folder,
}


def growth(costs: Sequence[Cost], row: str) -> float | None:
    """A product's cost between the two largest studies, as a multiple of that between the smallest.

    None where fewer than three studies say, or the smallest differ by nothing.
    """
    if len(costs) < 3:
        return None

    def slope(a: Cost, b: Cost) -> float:
        return (ROWS[row](b) - ROWS[row](a)) / (b.categories - a.categories)

    first = slope(costs[0], costs[1])
    return slope(costs[-2], costs[-1]) / first if first > 0 else None


def show(costs: Sequence[Cost]) -> None:
    """The tables."""
    console = Console(highlight=False, width=120)
    table = Table(title="Cost of a study", title_justify="left")
    table.add_column("products")
    for cost in costs:
        table.add_column(str(cost.categories), justify="right")
    table.add_column("growth", justify="right")
    for row, value in ROWS.items():
        found = growth(costs, row)
        cells = [f"{value(cost):.1f}" for cost in costs]
        table.add_row(row, *cells, "-" if found is None else f"{found:.2f}")
    table.add_section()
    each = {
        "driver, core-s a trial": lambda cost: cost.driver_cpu / cost.trials,
        "engine, core-s a trial": lambda cost: cost.engine / cost.trials,
        "one trial's wait, s (median)": lambda cost: cost.one_trial,
        "folder, MiB a product": lambda cost: cost.folder / cost.categories,
    }
    for row, value in each.items():
        table.add_row(row, *(f"{value(cost):.2f}" for cost in costs), "")
    console.print(table)
    sizes = Table(title="The folder, kB a product", title_justify="left")
    sizes.add_column("entry")
    for cost in costs:
        sizes.add_column(str(cost.categories), justify="right")
    last = costs[-1].folders
    for name in sorted(last, key=lambda name: -last[name]):
        cells = [f"{c.folders.get(name, 0.0) * 1024 / c.categories:.1f}" for c in costs]
        sizes.add_row(name, *cells)
    console.print(sizes)


def faults(costs: Sequence[Cost]) -> list[str]:
    """What grew faster than linearly or passed its bound."""
    found = [
        f"{row} grows faster than linearly ({ratio:.2f})"
        for row in ROWS
        if (ratio := growth(costs, row)) is not None and ratio > MOST_GROWTH
    ]
    driver = max(cost.driver for cost in costs)
    if driver > MOST_DRIVER_MIB:
        found.append(f"the driver took {driver:.0f} MiB, more than {MOST_DRIVER_MIB:.0f}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--categories", default="10,30,100,200", help="numbers, with commas")
    parser.add_argument("--trials", type=int, default=2)
    parser.add_argument("--concurrent", type=int, help="trials at once; default: one a core")
    parser.add_argument(
        "--out", type=Path, help="where the studies stay; default: a folder that is removed"
    )
    given = parser.parse_args()
    costs = []
    with tempfile.TemporaryDirectory() as temporary:
        out = given.out or Path(temporary)
        for categories in sorted(int(part) for part in given.categories.split(",")):
            folder = out / str(categories)
            folder.mkdir(parents=True)
            costs.append(measure(given, categories, folder))
            show(costs)
    wrong = faults(costs)
    print("\n".join(wrong) or "nothing grows faster than linearly")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
