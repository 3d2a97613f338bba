"""A study while its surroundings fail: full disks, locked databases, absent stores, hung workers.

Every test runs the real command on the real thing, and compares what comes out with what a study
without the fault would have: all of its trials, none of them failed.
"""

import os
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from clsnf.core.remote import RemoteFolder
from clsnf.study.driver_lease import DRIVER
from tests.support.object_store import bucket, stoppable_bucket
from tests.support.running_study import Study, wait_for_trial
from tests.support.small_data import write_category

pytestmark = pytest.mark.slow

_LONG = 240.0  # seconds; a test that waits longer has failed


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, resnet18_weights: Path) -> Study:
    made = Study(tmp_path_factory.mktemp("study"), resnet18_weights)
    (made.folder / "space.yaml").write_text(
        "finetune_epochs: {type: choice, values: [0, 1]}\n"
        "flow_depth: {type: choice, values: [0, 1, 2, 3]}\n"
    )
    write_category(made.data / "alpha", seed=1)
    return made


def until(found: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait until something is so, while the study runs."""
    end = time.monotonic() + _LONG
    while not found():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def until_said(process: subprocess.Popen[str], *words: str) -> list[str]:
    """Wait until a running study has said one of these; its lines until then."""
    said: list[str] = []
    assert process.stderr is not None
    while not any(word in line for line in said for word in words):
        said.append(process.stderr.readline())
        assert said[-1], "".join(said)
    return said


def ended_well(process: subprocess.Popen[str]) -> str:
    """What a study said that ended well."""
    _, stderr = process.communicate(timeout=_LONG)
    assert process.returncode == 0, stderr
    assert "Traceback" not in stderr
    return stderr


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A file system of its own, in memory."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    if os.name != "posix" or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """A file that takes all the room of a disk."""
    ballast = folder / "ballast"
    with ballast.open("wb") as file:
        try:
            while True:
                file.write(bytes(1 << 16))
                file.flush()
        except OSError:
            pass
    return ballast


def test_a_disk_that_fills_up_costs_no_trial(study: Study, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1500) as disk:
        study = study.at(disk / "out")
        process = study.start("--trials", "8")
        wait_for_trial(process, 1)
        ballast = fill(disk)
        said = until_said(process, "disk is full", "No space left")
        assert "at most 30 min" in said[-1], said
        ballast.unlink()
        ended_well(process)
        rows = study.trials()
        assert [row["status"] for row in rows] == ["finished"] * 8
        assert study.summary()["categories"]["alpha"]["winner"]


def test_a_disk_that_stays_full_ends_the_study_and_resume_goes_on(
    study: Study, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", 1500) as disk:
        study = study.at(disk / "out")
        process = study.start("--trials", "4", "--patience", "3")
        wait_for_trial(process, 1)
        ballast = fill(disk)
        _, stderr = process.communicate(timeout=_LONG)
        assert process.returncode == 2, stderr
        assert "Traceback" not in stderr
        ballast.unlink()
        code, _, stderr = study.run("--trials", "4", "--resume")
        assert code == 0, stderr
        assert [row["status"] for row in study.trials()] == ["finished"] * 4


def test_a_disk_without_room_for_a_trial_is_refused(study: Study, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 4) as disk:
        code, _, stderr = study.at(disk / "out").run("--trials", "8")
        assert code == 2, stderr
        assert "a single trial needs about" in stderr
        assert not (disk / "out").exists()


def test_a_database_that_is_locked_for_long_is_waited_for(study: Study, tmp_path: Path) -> None:
    study, database = study.at(tmp_path / "out"), tmp_path / "trials.db"
    process = study.start("--trials", "4", "--optuna-storage", f"sqlite:///{database}")
    wait_for_trial(process, 1)
    with sqlite3.connect(database, timeout=60) as other:
        other.execute("begin exclusive")
        until_said(process, "database is locked: waiting until it works again")
        other.rollback()
    assert "it works again after" in ended_well(process)
    assert [row["status"] for row in study.trials()] == ["finished"] * 4


def test_a_database_that_is_locked_when_a_study_opens_is_waited_for(
    study: Study, tmp_path: Path
) -> None:
    study, database = study.at(tmp_path / "out"), tmp_path / "trials.db"
    options = ("--trials", "1", "--optuna-storage", f"sqlite:///{database}")
    with sqlite3.connect(database) as other:
        other.execute("begin exclusive")
        code, _, stderr = study.run(*options, "--patience", "1")
        assert code == 2, stderr
        assert "database is locked" in stderr
        # What is left is no study: the same command begins it, without --resume.
        process = study.start(*options)
        until_said(process, "database is locked: waiting until it works again")
        other.rollback()
    assert "it works again after" in ended_well(process)
    assert [row["status"] for row in study.trials()] == ["finished"]


def workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes that run the study's trials."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if any("ray::ImplicitFunc" in part for part in child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found


def test_a_worker_that_hangs_is_ended_and_its_trial_begun_again(
    study: Study, tmp_path: Path
) -> None:
    study = study.at(tmp_path / "out")
    process = study.start("--trials", "4", "--trial-timeout", "15", "--concurrent-trials", "1")
    wait_for_trial(process, 1)
    until(lambda: bool(workers(process)), process)
    for worker in workers(process):
        os.kill(worker.pid, signal.SIGSTOP)
    said = ended_well(process)
    assert "made no progress for 15 s" in said
    assert [row["status"] for row in study.trials()] == ["finished"] * 4


def test_a_store_that_is_away_for_a_while_costs_no_trial(study: Study, tmp_path: Path) -> None:
    with stoppable_bucket() as store:
        out = f"s3://bucket/away{store.end}"
        process = study.start("--trials", "8", out=out, TMPDIR=str(tmp_path), RAY_TMPDIR="/tmp")
        wait_for_trial(process, 1)
        store.stop()
        said = until_said(process, "the study goes on, and its state is uploaded later")
        time.sleep(20)
        store.start()
        said.append(ended_well(process))
        assert any("answers again" in line for line in said)
        remote = RemoteFolder(out)
        assert remote.pull("trials.parquet", tmp_path / "trials.parquet")
        assert [row["status"] for row in Study.read_trials(tmp_path)] == ["finished"] * 8
        assert remote.read(DRIVER) is None, "nobody holds it any more"
        assert not list(tmp_path.glob("clsnf-*")), "no copy is left"


def test_a_store_that_stays_away_leaves_the_copy_and_resume_uploads_it(
    study: Study, tmp_path: Path
) -> None:
    machine = {"TMPDIR": str(tmp_path), "RAY_TMPDIR": "/tmp"}
    with stoppable_bucket() as store:
        out = f"s3://bucket/stays-away{store.end}"
        process = study.start("--trials", "4", "--patience", "5", out=out, **machine)
        wait_for_trial(process, 2)
        store.stop()
        _, stderr = process.communicate(timeout=_LONG)
        assert process.returncode == 2, stderr
        assert "Traceback" not in stderr
        (copy,) = tmp_path.glob("clsnf-*")
        assert f"lies in {copy}: --resume on this machine uploads it" in stderr
        store.start()
        process = study.start("--trials", "4", "--resume", out=out, **machine)
        stderr = ended_well(process)
        assert "trials ended before" in stderr
        assert RemoteFolder(out).pull("trials.parquet", tmp_path / "trials.parquet")
        assert [row["status"] for row in Study.read_trials(tmp_path)] == ["finished"] * 4
        assert not list(tmp_path.glob("clsnf-*")), "no copy is left"


def test_a_second_driver_of_a_remote_study_is_refused_and_harms_nothing(
    study: Study, tmp_path: Path
) -> None:
    machine = {"TMPDIR": str(tmp_path), "RAY_TMPDIR": "/tmp"}
    with bucket() as end:
        out = f"s3://bucket/two-drivers{end}"
        first = study.start("--trials", "6", out=out, **machine)
        wait_for_trial(first, 1)
        for more in ((), ("--resume",)):
            second = study.start("--trials", "6", *more, out=out, **machine)
            _, stderr = second.communicate(timeout=_LONG)
            assert second.returncode == 2, stderr
            assert "is in use" in stderr.splitlines()[-1]
            assert "Traceback" not in stderr
        ended_well(first)
        assert RemoteFolder(out).pull("trials.parquet", tmp_path / "trials.parquet")
        assert [row["status"] for row in Study.read_trials(tmp_path)] == ["finished"] * 6
