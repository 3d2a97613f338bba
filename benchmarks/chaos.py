"""A study on a small cluster whose machines, disk and files are disturbed at random.

    python benchmarks/chaos.py --minutes 15 --seed 0
    python benchmarks/chaos.py --minutes 2 --faults kill_driver,tear_journal --storage journal

A cluster of a head and two workers, each in processes of its own, first runs a study undisturbed.
Then the same study runs again and again, with its trials in a journal and in sqlite by turns, while
a seeded script disturbs it: see `FAULTS`. In a study each kind of fault comes once before one comes
again. After `--minutes` the last study ends undisturbed.

Meanwhile a witness reads the study's files. For each study it must hold:

- A trial that the storage ever called complete is in trials.parquet, with the same value. It never
  ran again, unless a fault tore it out of the journal.
- No artifact was computed anew, unless a fault damaged it.
- Trials and winners are those of the undisturbed study, to the last bit.
- No command ended with a traceback, and none stood still.

The script prints what was survived and what was not, and keeps its folder. The exit status is 1
where something did not hold. Filling the disk needs a small file system of its own: root on Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import psutil
from optuna import load_study
from optuna.storages import JournalStorage
from optuna.trial import TrialState
from rich.console import Console
from rich.table import Table

from clsnf.core.journal import WholeRecords
from clsnf.results import read_trials
from clsnf.training.finetune import STABLE_PHASE

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the cluster and the small pictures are the tests'

from tests.support.ray_cluster import Cluster  # noqa: E402
from tests.support.running_study import Study  # noqa: E402
from tests.support.small_data import TINY, write_category  # noqa: E402

SPACE = """
fusion_weight: {type: float, low: 0.0, high: 1.0}
finetune_epochs: {type: choice, values: [0, 2, 4]}
flow_depth: {type: choice, values: [0, 1, 2]}
"""
SETTINGS = TINY | {"finetune.frozen_epochs": 4, "finetune.joint_epochs": 2, "flow.passes": 1}
DISK_MIB = 1024
# Trials that end between two kills of workers: the engine gives a trial up that was killed thrice.
TRIALS_BETWEEN = 2
STILL = 240.0  # seconds without a sign of progress after which a study counts as hanging
LAST = 1800.0  # seconds for a study to end once it is left alone
SAME = ("chosen", "settings", "validation", "threshold", "sweeps", "rules", "test", "regret")

TrialKey = tuple[str, int]  # category and number


@dataclass(frozen=True)
class Completed:
    """What a storage says of a trial that is complete."""

    value: float
    at: str


# ---- the witness ----


@dataclass
class Witness:
    """Reads a running study's files, and remembers what was finished.

    Attributes:
        out: the study's folder.
        storage: an sqlite file, or the study's journal.
        completed: trials that the storage called complete, as it did last.
        artifacts: artifact -> when its facts were written, in nanoseconds.
        damaged: artifacts that a fault damaged.
        problems: what must not happen.
    """

    out: Path
    storage: Path
    completed: dict[TrialKey, Completed] = field(default_factory=dict)
    artifacts: dict[str, int] = field(default_factory=dict)
    damaged: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)

    def look(self) -> None:
        """Read what is there now."""
        for trial, found in self.read_completed().items():
            before = self.completed.get(trial, found)
            if before != found:
                self.problems.append(f"{trial} ran again: {before}, then {found}")
            self.completed[trial] = found
        for facts in self.out.glob("stages/*/*/facts.json"):
            name = facts.parent.relative_to(self.out / "stages").as_posix()
            with suppress(FileNotFoundError):
                written = facts.stat().st_mtime_ns
                known = self.artifacts.get(name, written)
                # A point of the stable phase is dropped when a later one has taken its place.
                if known != written and name not in self.damaged and STABLE_PHASE not in name:
                    self.problems.append(f"the artifact {name} was computed again")
                self.artifacts[name] = written

    def read_completed(self) -> dict[TrialKey, Completed]:
        """The complete trials in the storage; none where it can't be read now."""
        with suppress(OSError, sqlite3.Error, KeyError):
            return self._in_journal() if self.storage.suffix == ".journal" else self._in_sqlite()
        return {}

    def _in_journal(self) -> dict[TrialKey, Completed]:
        storage = JournalStorage(WholeRecords(self.storage))
        return {
            (name, trial.number): Completed(trial.values[0], str(trial.datetime_complete))
            for name in (study.study_name for study in storage.get_all_studies())
            for trial in load_study(study_name=name, storage=storage).get_trials(
                False, (TrialState.COMPLETE,)
            )
        }

    def _in_sqlite(self) -> dict[TrialKey, Completed]:
        query = (
            "select study_name, number, value, datetime_complete from trials "
            "join studies using (study_id) join trial_values using (trial_id) "
            "where state = 'COMPLETE'"
        )
        with closing(sqlite3.connect(f"file:{self.storage}?mode=ro", uri=True, timeout=1)) as base:
            rows = base.execute(query).fetchall()
        return {
            (name.rpartition("/")[2], number): Completed(value, at)
            for name, number, value, at in rows
        }

    def forget_torn(self) -> None:
        """Leave out trials that are not in the storage any more: a fault tore them out."""
        self.completed = self.read_completed()


# ---- a disturbed study ----


class Run:
    """One study, from its first command to its last.

    Args:
        study: data, options and interpreter.
        cluster: where it runs.
        out: its folder.
        storage: ``journal`` or ``sqlite``.
        trials: number of trials of each category.
    """

    def __init__(
        self, study: Study, cluster: Cluster, out: Path, storage: str, trials: int
    ) -> None:
        self.study, self.cluster, self.out, self.kind = study, cluster, out, storage
        self.trials = trials
        file = out / "optuna.journal" if storage == "journal" else out.with_suffix(".db")
        self.witness = Witness(out, file)
        self.log = study.folder / f"{out.name}.log"
        self.driver: subprocess.Popen[bytes] | None = None
        self._killed_with = (0, 0)  # trials complete and artifacts at the last kill

    def start(self) -> None:
        """Run the command, which goes on with what is there."""
        resume = ["--resume"] if (self.out / "study.json").exists() else []
        where = [] if self.kind == "journal" else ["--optuna-storage", f"sqlite:///{self.file}"]
        command = [self.study.python, str(ROOT / "tune" / "run_study.py"), *self.study.options]
        command += ["--data", str(self.study.data), "--out", str(self.out), *resume, *where]
        command += ["--trials", str(self.trials), "--address", f"127.0.0.1:{self.cluster.port}"]
        with self.log.open("ab") as log:
            self.driver = subprocess.Popen(
                command,
                env=self.cluster.environment,
                cwd=self.study.folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def file(self) -> Path:
        """The storage's file."""
        return self.witness.storage

    def has_advanced(self, trials: int = 0, artifacts: int = 0) -> bool:
        """Whether so much was finished since the last kill; without it a study would never end."""
        done = len(self.witness.completed), len(self.witness.artifacts)
        before = self._killed_with
        return done[0] >= before[0] + trials and done[1] >= before[1] + artifacts

    def note_kill(self) -> None:
        """Processes are killed now: see :meth:`has_advanced`."""
        self._killed_with = len(self.witness.completed), len(self.witness.artifacts)

    def kill(self) -> None:
        """End the driver as `kill -9` does; its processes on the cluster end with its job."""
        assert self.driver is not None
        self.note_kill()
        self.driver.kill()
        self.driver.wait()

    def wait(self, seconds: float) -> None:
        """Let time pass, watching."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.witness.look()
            time.sleep(0.5)


# ---- faults: each returns what it did, or None where it can do nothing now ----


def kill_driver(run: Run, rng: random.Random) -> str | None:
    """kill -9 of the command, and --resume."""
    if not run.has_advanced(artifacts=1):
        return None
    run.kill()
    run.start()
    return "the driver"


def busy_workers(run: Run) -> list[psutil.Process]:
    """The processes that run trials, by Ray's name for them."""
    processes = [
        process
        for number in range(1, len(run.cluster.nodes))
        if run.cluster.is_there(number)
        for process in run.cluster.processes(number)
    ]
    found = []
    for process in processes:
        with suppress(psutil.Error):
            if "ImplicitFunc" in " ".join(process.cmdline()):
                found.append(process)
    return sorted(found, key=lambda process: process.pid)


def kill_worker(run: Run, rng: random.Random) -> str | None:
    """kill -9 of a process that runs a trial."""
    busy = busy_workers(run)
    if not busy or not run.has_advanced(trials=TRIALS_BETWEEN):
        return None
    run.note_kill()
    victim = rng.choice(busy)
    with suppress(psutil.Error):
        victim.kill()
    return f"process {victim.pid}"


@contextmanager
def stopped(processes: Sequence[psutil.Process]) -> Iterator[None]:
    """SIGSTOP while the block runs."""
    for process in processes:
        with suppress(psutil.Error):
            process.suspend()
    try:
        yield
    finally:
        for process in processes:
            with suppress(psutil.Error):
                process.resume()


def stop_worker(run: Run, rng: random.Random) -> str | None:
    """SIGSTOP of a process that runs a trial, for some seconds."""
    busy = busy_workers(run)
    if not busy:
        return None
    seconds = rng.uniform(3, 12)
    with stopped([rng.choice(busy)]):
        run.wait(seconds)
    return f"for {seconds:.0f} s"


def freeze_node(run: Run, rng: random.Random) -> str | None:
    """Every process of a worker node stands still, as behind a network that is gone."""
    number = rng.choice(workers(run.cluster))
    seconds = rng.uniform(3, 12)
    with stopped(run.cluster.processes(number)):
        run.wait(seconds)
    return f"node {number} for {seconds:.0f} s"


def workers(cluster: Cluster) -> list[int]:
    return [number for number in range(1, len(cluster.nodes)) if cluster.is_there(number)]


def replace_node(run: Run, rng: random.Random) -> str | None:
    """kill -9 of a whole node; another one comes later."""
    if not run.has_advanced(trials=TRIALS_BETWEEN):
        return None
    run.note_kill()
    number = rng.choice(workers(run.cluster))
    run.cluster.remove(number)
    run.wait(rng.uniform(0, 5))
    return f"node {number}, then node {run.cluster.add_worker()}"


def fill_disk(run: Run, rng: random.Random) -> str | None:
    """No byte is free on the study's disk for some seconds."""
    if not os.path.ismount(run.out.parent):
        return None
    filler, seconds = run.out.parent / "filler", rng.uniform(4, 12)
    try:
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 20))
        run.wait(seconds)
    finally:
        filler.unlink()
    return f"for {seconds:.0f} s"


def tear_journal(run: Run, rng: random.Random) -> str | None:
    """The power goes while a record is written: the journal's last line is cut short."""
    if not run.has_advanced(artifacts=1):
        return None
    run.kill()
    run.witness.look()
    content = run.file.read_bytes()
    last = content.rstrip(b"\n").rpartition(b"\n")[2]
    cut = rng.randrange(1, len(last))
    os.truncate(run.file, len(content) - cut)
    run.witness.forget_torn()
    run.start()
    return f"{cut} bytes"


def cut_short(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def tear_artifact(run: Run, rng: random.Random) -> str | None:
    """The tensors of a stored artifact are cut short."""
    found = sorted(run.out.glob("stages/*/*/tensors.safetensors"))
    if not found:
        return None
    victim = rng.choice(found)
    name = victim.parent.relative_to(run.out / "stages").as_posix()
    run.witness.damaged.add(name)
    with suppress(FileNotFoundError):
        cut_short(victim, rng)
    return name


def tear_lease(run: Run, rng: random.Random) -> str | None:
    """A lease's file is cut short while its holder works."""
    for _ in range(50):
        leases = sorted(run.out.glob("stages/.leases/*"))
        if leases:
            victim = rng.choice(leases)
            with suppress(FileNotFoundError, ValueError):
                cut_short(victim, rng)
                return victim.name
        run.wait(0.2)
    return None


def tear_result(run: Run, rng: random.Random) -> str | None:
    """The power goes while results are written: a file of the study is cut short."""
    if not run.has_advanced(artifacts=1):
        return None
    run.kill()
    names = ("trials.parquet", "summary.json", "finished/*.json", "tables/*.parquet")
    found = sorted(path for name in names for path in run.out.glob(name))
    victim = rng.choice(found) if found else None
    if victim is not None:
        cut_short(victim, rng)
    run.start()
    return "nothing to tear yet" if victim is None else victim.name


def lock_storage(run: Run, rng: random.Random) -> str | None:
    """Another program locks the sqlite file for some seconds."""
    if not run.file.exists():
        return None
    seconds = rng.uniform(5, 25)
    with closing(sqlite3.connect(run.file, timeout=20, isolation_level=None)) as base:
        try:
            base.execute("begin exclusive")
        except sqlite3.OperationalError:  # the study itself is writing
            return None
        time.sleep(seconds)
        base.execute("rollback")
    return f"for {seconds:.0f} s"


FAULTS: dict[str, Callable[[Run, random.Random], str | None]] = {
    fault.__name__: fault
    for fault in (
        kill_driver,
        kill_worker,
        stop_worker,
        freeze_node,
        replace_node,
        fill_disk,
        tear_journal,
        tear_artifact,
        tear_lease,
        tear_result,
        lock_storage,
    )
}


ONLY = {"tear_journal": "journal", "lock_storage": "sqlite"}  # what needs this storage


class Deck:
    """Kinds of faults in a random order, each once before one comes again."""

    def __init__(self, names: Sequence[str], rng: random.Random) -> None:
        self._names, self._rng = list(names), rng
        self._left: list[str] = []

    def play(self, run: Run) -> tuple[str, str] | None:
        """Do the next fault that can be done now; its name and what it did."""
        if not self._left:
            self._left = self._rng.sample(self._names, len(self._names))
        for name in list(self._left):
            did = FAULTS[name](run, self._rng)
            if did is not None:
                self._left.remove(name)
                return name, did
        return None


# ---- rounds ----


def disturb(run: Run, deck: Deck | None, until: float, gap: float, rng: random.Random) -> Counter:
    """Run a study to its end; returns the faults by kind.

    Args:
        run: the study.
        deck: of faults; None to leave it alone.
        until: when the faults end, by :func:`time.monotonic`.
        gap: seconds between two faults, on average.
        rng: of the gaps.
    """
    done: Counter[str] = Counter()
    run.start()
    following = time.monotonic() + rng.uniform(0.5, 1.5) * gap
    latest = max(until, time.monotonic()) + LAST
    moved, moved_at = -1, time.monotonic()
    try:
        while True:
            run.wait(1)
            now = time.monotonic()
            signs = len(run.witness.completed) + len(run.witness.artifacts) + run.log.stat().st_size
            if signs != moved:
                moved, moved_at = signs, now
            assert run.driver is not None
            code = run.driver.poll()
            if code == 0:
                break
            if code is not None:
                say(f"  the command ended with {code}: {last_line(run.log)}")
                done[f"(ended by itself with {code})"] += 1
                if sum(n for name, n in done.items() if name.startswith("(")) > 8:
                    run.witness.problems.append("it ends by itself again and again")
                    break
                run.start()
            elif now - moved_at > STILL or now > latest:
                run.witness.problems.append(f"no end; it stood still for {now - moved_at:.0f} s")
                break
            elif deck is not None and following <= now < until:
                fault = deck.play(run)
                if fault is not None:
                    done[fault[0]] += 1
                    moved_at = time.monotonic()
                    say(f"  {len(run.witness.completed)} trials complete: {': '.join(fault)}")
                following = time.monotonic() + rng.uniform(0.5, 1.5) * gap
    finally:
        if run.driver is not None and run.driver.poll() is None:
            run.kill()
    run.witness.look()
    return done


def check(run: Run, reference: Run | None) -> list[str]:
    """What was lost, run twice, or found otherwise than in the undisturbed study."""
    problems = list(run.witness.problems)
    if "Traceback (most recent call last)" in run.log.read_text(errors="replace"):
        problems.append(f"a traceback in {run.log}")
    if not (run.out / "summary.json").is_file():
        return [*problems, "no summary.json"]
    rows = read_trials(run.out / "trials.parquet")
    trials = {(row.category, row.number): row for row in rows}
    if len(trials) != len(rows):
        problems.append(f"{len(rows) - len(trials)} trials stand twice in trials.parquet")
    for key, found in run.witness.completed.items():
        if key not in trials or trials[key].objective != found.value:
            problems.append(f"{key} was lost: it was complete with {found.value}")
    problems += [f"{key}: {row.cause}" for key, row in trials.items() if row.status == "failed"]
    if reference is None:
        return problems
    expected = read_trials(reference.out / "trials.parquet")
    for row in expected:
        own = trials.get((row.category, row.number))
        if own is None or (own.config, own.objective) != (row.config, row.objective):
            problems.append(f"{row.category}, trial {row.number} is another one")
    winners, others = summary(run), summary(reference)
    for category in others:
        for name in SAME:
            if winners.get(category, {}).get(name) != others[category].get(name):
                problems.append(f"{category}: another winner ({name})")
    return problems


def summary(run: Run) -> dict[str, Any]:
    categories: dict[str, Any] = json.loads((run.out / "summary.json").read_text())["categories"]
    return categories


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A file system of its own at `folder` while the block runs; whether there is one.

    What lies on it is copied to the folder at the end.
    """
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            kept = folder.with_name("kept")
            shutil.copytree(folder, kept, symlinks=True)
            subprocess.run(["umount", "-l", str(folder)], check=True)
            folder.rmdir()
            kept.rename(folder)


def make_study(folder: Path, categories: int) -> Study:
    study = Study(folder, Path("demo"))
    for number in range(categories):
        write_category(study.data / f"product{number}", seed=number, size=(64, 64), train=12)
    (folder / "space.yaml").write_text(SPACE)
    study.options = ["--backbone", "demo", "--image-size", "64", "--device", "cpu"]
    study.options += ["--cpus-per-trial", "1", "--space", str(folder / "space.yaml")]
    study.options += [p for name, value in SETTINGS.items() for p in ("--set", f"{name}={value}")]
    return study


def run_chaos(given: argparse.Namespace, folder: Path) -> tuple[Counter[str], list[str]]:
    """All rounds; faults by kind and problems."""
    rng = random.Random(given.seed)
    study = make_study(folder, given.categories)
    study.options += given.options
    cluster = Cluster(study.folder, study.python, study.environment)
    faults: Counter[str] = Counter()
    problems: list[str] = []
    with small_disk(folder / "disk") as own_disk:
        names = [name for name in given.faults if own_disk or name != "fill_disk"]
        if len(names) < len(given.faults):
            say("fill_disk is left out: a small disk needs root on Linux")
        try:
            cluster.start()
            reference = Run(
                study, cluster, folder / "disk" / "undisturbed", "journal", given.trials
            )
            say("the undisturbed study")
            disturb(reference, None, time.monotonic(), 0, rng)
            problems += [f"undisturbed: {problem}" for problem in check(reference, None)]
            end = time.monotonic() + 60 * given.minutes
            for number, storage in enumerate(cycle(given.storage)):
                if problems or (number >= len(given.storage) and time.monotonic() > end):
                    break
                run = Run(study, cluster, folder / "disk" / f"round{number}", storage, given.trials)
                say(f"round {number}, trials in {storage}")
                left = max(1, len(given.storage) - number)
                until = time.monotonic() + max(0.0, end - time.monotonic()) / left
                deck = Deck([name for name in names if ONLY.get(name, storage) == storage], rng)
                faults += disturb(run, deck, until, given.gap, rng)
                found = check(run, reference)
                problems += [f"round {number}: {problem}" for problem in found]
                if not found:
                    shutil.rmtree(run.out)  # the disk is small
        finally:
            cluster.stop()
    return faults, problems


def names_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    """Reads names with commas."""

    def read(text: str) -> list[str]:
        unknown = [name for name in text.split(",") if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
        return text.split(",")

    return read


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=5.0, help="how long to disturb")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--categories", type=int, default=3)
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--gap", type=float, default=8.0, help="seconds between faults, on average")
    parser.add_argument("--faults", type=names_of(list(FAULTS)), default=list(FAULTS))
    kinds = ["journal", "sqlite"]
    parser.add_argument("--storage", type=names_of(kinds), default=kinds)
    parser.add_argument("--out", type=Path, help="a short path; default: a new folder in /tmp")
    parser.add_argument("options", nargs="*", help="more options of `clsnf study`, after --")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the cluster and the disk are cleared
    folder = (given.out or Path(tempfile.mkdtemp(prefix="chaos-", dir="/tmp"))).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    faults, problems = run_chaos(given, folder)
    table = Table(title=f"Faults, seed {given.seed}", title_justify="left")
    table.add_column("fault")
    table.add_column("times", justify="right")
    for name, times in sorted(faults.items()):
        table.add_row(name, str(times))
    table.add_row("all", str(sum(n for name, n in faults.items() if name in FAULTS)))
    Console(highlight=False, width=100).print(table)
    for problem in problems:
        print(f"LOST: {problem}")
    print(f"{'something was lost' if problems else 'nothing was lost'}; the files: {folder}")
    raise SystemExit(bool(problems))


if __name__ == "__main__":
    main()
