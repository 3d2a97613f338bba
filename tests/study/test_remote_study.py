"""A study in an object store: killed, gone on with on another machine, refused where something else
lies.
"""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from optuna.storages.journal._storage import JournalOperation
from optuna.trial import TrialState

from clsnf.core.remote import RemoteFolder
from clsnf.detector import Detector
from tests.support.object_store import bucket
from tests.support.running_study import Study, wait_for_trial
from tests.support.small_data import write_category

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def end() -> Iterator[str]:
    with bucket() as end:
        yield end


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, resnet18_weights: Path, end: str) -> Study:
    made = Study(tmp_path_factory.mktemp("study"), resnet18_weights)
    write_category(made.data / "alpha", seed=1)
    return made


def at(machine: Path) -> dict[str, str]:
    """The environment of a machine with files of its own; Ray's sockets must lie below a short
    path.
    """
    return {"TMPDIR": str(machine), "RAY_TMPDIR": "/tmp"}


def journal(remote: RemoteFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (remote.read("optuna.journal") or b"").splitlines()]


def test_a_killed_study_goes_on_on_another_machine(study: Study, end: str, tmp_path: Path) -> None:
    out = f"s3://bucket/runs/night{end}"
    remote = RemoteFolder(out)
    machines = [tmp_path / "one", tmp_path / "two"]
    for machine in machines:
        machine.mkdir()

    process = study.start("--trials", "30", out=out, **at(machines[0]))
    wait_for_trial(process, 2)
    while not any(
        entry.get("state") == 1 for entry in journal(remote)
    ):  # a trial has ended and been passed on
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    known = journal(remote)
    begun = sum(entry["op_code"] == JournalOperation.CREATE_TRIAL for entry in known)
    ended = sum(
        entry.get("state") in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
        for entry in known
    )
    trials = str(begun + 2)

    process = study.start("--trials", trials, out=out, **at(machines[1]))
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 2
    assert f"{out} is in use: choose another --out, or say --resume" in stderr
    assert not list(machines[1].glob("clsnf-*")), "no copy is left"

    process = study.start("--trials", trials, "--resume", out=out, **at(machines[1]))
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert f"{ended} trials ended before: {begun + 2 - ended} are left" in stderr
    assert f"s3://bucket/runs/night/winners{end}" in stdout
    assert not list(machines[1].glob("clsnf-*")), "no copy is left"

    for name in (
        "winners/alpha",
        "trials.parquet",
        "summary.json",
        "ledger.jsonl",
        "examples/alpha.png",
    ):
        assert remote.pull(name, tmp_path / "got" / name), name
    table = pq.read_table(tmp_path / "got" / "trials.parquet").to_pylist()
    assert sorted(row["trial"] for row in table) == list(range(begun + 2))
    found = json.loads((tmp_path / "got" / "summary.json").read_text())["categories"]["alpha"]
    assert found["winner"] == f"s3://bucket/runs/night/winners/alpha{end}"
    detector = Detector.load(tmp_path / "got" / "winners" / "alpha")
    assert detector.threshold.value == found["threshold"]["value"]
    ledger = (tmp_path / "got" / "ledger.jsonl").read_text().splitlines()
    assert len(ledger) == 1, "the test images were opened once"


def test_a_place_that_holds_something_else_or_is_none_is_refused_before_the_work(
    study: Study, end: str
) -> None:
    RemoteFolder(f"s3://bucket/other{end}").write("notes.txt", b"mine")
    for out, said in (
        (f"s3://bucket/other{end}", "is in use, but holds no study to go on with"),
        (f"s3://nowhere/x{end}", "can't be used"),
        ("s4://bucket/x", "can't be used"),
    ):
        process = study.start("--trials", "1", out=out)
        stdout, stderr = process.communicate(timeout=120)
        assert process.returncode == 2, stderr
        assert stdout == ""
        assert said in stderr
        assert len([line for line in stderr.splitlines() if line]) == 1
