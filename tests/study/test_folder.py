"""A study's folder: who may claim it, what a trial may see, the ledger of the test images; and each
trial's share of a cluster.
"""

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray._private import services

from clsnf.core.config import DetectorSettings, StudySettings
from clsnf.core.errors import OutputError, SettingsError
from clsnf.data.layouts import read_category
from clsnf.data.splits import assign_splits
from clsnf.results import ThresholdReport, TrialResult, ValidationResult, WinnerResult
from clsnf.study.cluster import ray_session, share_out
from clsnf.study.context import StudyContext
from clsnf.study.folder import StudyFolder, check_folder, claim_folder
from tests.support.small_data import write_category

# ---- the folder ----


def test_a_new_or_empty_folder_is_claimed(tmp_path: Path) -> None:
    for folder in (tmp_path / "a" / "b", tmp_path / "empty", tmp_path / "locked"):
        if folder.name != "b":
            folder.mkdir()
        if (
            folder.name == "locked"
        ):  # left by a study that was refused or ended before it wrote anything
            (folder / ".lock").touch()
            (folder / "tracked.json").write_text("{}")
        claim_folder(folder, resume=False)
        assert folder.is_dir()


def test_looking_at_a_folder_leaves_no_trace(tmp_path: Path) -> None:
    check_folder(tmp_path / "a" / "b", resume=False)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"is in use: choose another --out, or say --resume"):
        claim_folder(tmp_path, resume=False)
    with pytest.raises(OutputError, match=r"holds no study to go on with: choose another --out"):
        claim_folder(tmp_path, resume=True)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_study_is_gone_on_with_only_when_that_is_said(tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text("{}")
    claim_folder(tmp_path, resume=True)
    with pytest.raises(OutputError, match="--resume"):
        claim_folder(tmp_path, resume=False)


@pytest.mark.parametrize("resume", [False, True])
def test_resuming_in_an_empty_or_new_folder_is_a_start(tmp_path: Path, resume: bool) -> None:
    claim_folder(tmp_path, resume)
    claim_folder(tmp_path / "new", resume)


@pytest.mark.parametrize("resume", [False, True])
def test_a_file_in_the_place_of_the_folder_is_named(tmp_path: Path, resume: bool) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"file is a file: give the name of a folder"):
        claim_folder(tmp_path / "file", resume)
    with pytest.raises(OutputError, match=r"file/out can't be made, because .*file is a file"):
        claim_folder(tmp_path / "file" / "out", resume)


# ---- tables and the ledger ----


def test_a_trial_sees_no_test_image_and_every_unlock_is_in_the_ledger(
    tmp_path: Path,
) -> None:
    write_category(tmp_path / "data" / "nut", defective=2, good=1)
    table = assign_splits(read_category(tmp_path / "data", "nut"), 0.2, 0)
    validation = table.filter(pc.equal(table["split"], "validation"))
    folder = StudyFolder(str(tmp_path / "out"))
    folder.write_train_table("nut", table)
    drawn: list[Path] = []

    def draw(out: Path) -> pa.Table:
        drawn.append(out)
        return validation

    for _ in range(2):
        folder.draw_validation_set("nut", draw)
    assert drawn == [tmp_path / "out" / "validation" / "nut"], "once for all processes"

    assert set(folder.train_table("nut")["split"].to_pylist()) == {"fit", "validation"}
    assert folder.validation_table("nut").equals(validation)
    ledger = tmp_path / "out" / "ledger.jsonl"
    with pytest.raises(FileNotFoundError):  # while trials run, no file says where they are
        folder.unlock_test_table("nut", "before selection")
    assert not ledger.exists()
    folder.write_test_table("nut", table)
    test = folder.unlock_test_table("nut", "evaluation of the winner")
    assert set(test["split"].to_pylist()) == {"test"}
    assert len(test) + len(folder.train_table("nut")) == len(table)
    (entry,) = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert (entry["category"], entry["opened"], entry["for"]) == (
        "nut",
        "test images",
        "evaluation of the winner",
    )
    folder.unlock_test_table("nut", "again")
    assert len(ledger.read_text().splitlines()) == 2

    folder.write_train_table("nut", table)  # the study is gone on with: trials run again
    assert not list((tmp_path / "out" / "tables").glob("*test*"))
    folder.draw_validation_set("nut", draw)
    assert len(drawn) == 2, "the set is looked at again: its folder may have been moved"


def test_without_test_images_nothing_is_written_to_the_ledger(tmp_path: Path) -> None:
    write_category(tmp_path / "data" / "nut", defective=0, good=0)
    table = assign_splits(read_category(tmp_path / "data", "nut"), 0.2, 0)
    folder = StudyFolder(str(tmp_path / "out"))
    folder.write_train_table("nut", table)
    folder.write_test_table("nut", table)
    assert len(folder.unlock_test_table("nut", "evaluation")) == 0
    assert not (tmp_path / "out" / "ledger.jsonl").exists()


def winner(folder: Path) -> WinnerResult:
    return WinnerResult(
        folder=str(folder),
        trial=2,
        settings=DetectorSettings(),
        chosen={},
        validation=ValidationResult({}, {}),
        threshold=ThresholdReport(0.5, 0.01, 0.01, 100, (0.0, 0.1)),
    )


def test_a_winner_is_kept_for_the_same_trials_and_the_same_selection_alone(tmp_path: Path) -> None:
    folder = StudyFolder(str(tmp_path))
    context = StudyContext(
        folder, DetectorSettings(), StudySettings(), (), (), (), None, "cpu", threads=1
    )
    trials = [TrialResult("nut", 0, "finished"), TrialResult("nut", 2, "finished")]
    key = context.selection_key(trials)
    assert folder.read_finished("nut", key, "t") is None
    folder.write_finished("nut", key, winner(tmp_path), "t")
    assert folder.read_finished("nut", key, "t") == winner(tmp_path)
    more = [*trials, TrialResult("nut", 3, "finished")]
    other_rule = dataclasses.replace(context, study=StudySettings(selection="worst"))
    assert folder.read_finished("nut", context.selection_key(more), "t") is None
    assert folder.read_finished("nut", other_rule.selection_key(trials), "t") is None
    assert folder.read_finished("bolt", key, "t") is None
    (tmp_path / "finished" / "nut.json").write_text("{")
    assert folder.read_finished("nut", key, "t") is None


# ---- the cluster ----


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1:1", "ray://127.0.0.1:1", "[::1]:1", "http://127.0.0.1:1", "no such host:6379"],
)
def test_an_address_where_no_cluster_is_is_said_at_once(address: str) -> None:
    said = rf"There is no Ray cluster at '{re.escape(address)}' \(.*\): say --address local"
    with pytest.raises(SettingsError, match=said), ray_session(address):
        pass


@pytest.mark.parametrize("known_by", ["the environment", "the file of the last cluster"])
def test_auto_is_refused_at_once_where_the_head_has_died(
    known_by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if known_by == "the environment":
        monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    else:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
        services._cached_find_gcs_addresses.cache_clear()
        # Other programs' Rays may run here.
        monkeypatch.setattr(services, "_find_address_from_flag", lambda flag: set())
    said = r"There is no Ray cluster at 'auto' \(127\.0\.0\.1:1: .*\): say --address local"
    with pytest.raises(SettingsError, match=said), ray_session("auto"):
        pass


@pytest.mark.slow
def test_a_program_that_is_no_ray_is_refused_within_a_minute() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        said = f"There is no Ray cluster at '{address}'"
        with pytest.raises(SettingsError, match=said), ray_session(address):
            pass


# A Ray whose raylet is stopped as soon as it is there: it never starts.
_STOPPED_RAY = """
import sys, threading, psutil
from clsnf.core.errors import SettingsError
from clsnf.study.cluster import ray_session

def stop() -> None:
    while True:
        for process in psutil.Process().children(recursive=True):
            try:
                if process.cmdline()[0].endswith("raylet/raylet"):
                    process.suspend()
                    threading.Timer(float(sys.argv[1]), process.resume).start()
                    return
            except (psutil.Error, IndexError):
                pass

threading.Thread(target=stop, daemon=True).start()
try:
    with ray_session(None):
        print("started")
except SettingsError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "started"),
        (
            {"RAY_raylet_start_wait_time_s": "5"},
            "Ray did not start within 30 s (The current node timed out during startup. ",
        ),
    ],
)
def test_a_ray_that_is_slow_to_start_is_waited_for_or_said(
    asked: dict[str, str], said: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _STOPPED_RAY, "45"],
        env={k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | asked,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.startswith(said), done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert ("RAY_raylet_start_wait_time_s=900" in done.stdout) == bool(asked)


# ---- shares of a cluster ----


def test_one_category_gets_all_cores_of_a_small_machine() -> None:
    shares = share_out(StudySettings(), 1, [{"CPU": 2.0}])
    assert (shares.cpus, shares.gpus, shares.concurrent) == (2, 0.0, 1)


def test_several_categories_run_side_by_side_on_a_core_each() -> None:
    shares = share_out(StudySettings(), 3, [{"CPU": 2.0}])
    assert (shares.cpus, shares.concurrent) == (1, 2)


def test_larger_nodes_hold_several_trials_of_four_cores() -> None:
    shares = share_out(StudySettings(), 2, [{"CPU": 16.0}, {"CPU": 6.0}, {"CPU": 2.0}])
    assert (shares.cpus, shares.concurrent) == (4, 5)


def test_concurrent_trials_are_a_bound_and_never_more_than_fit() -> None:
    nodes = [{"CPU": 16.0}]
    assert share_out(StudySettings(concurrent_trials=2), 1, nodes).concurrent == 2
    assert share_out(StudySettings(concurrent_trials=99), 1, nodes).concurrent == 4


def test_gpus_bound_the_trials_where_they_are_asked_for() -> None:
    nodes = [{"CPU": 16.0, "GPU": 1.0}, {"CPU": 64.0}]
    assert share_out(StudySettings(gpus_per_trial=0.25), 1, nodes).concurrent == 4
    assert share_out(StudySettings(gpus_per_trial=1), 1, nodes).concurrent == 1


def test_cores_are_counted_where_the_gpus_are() -> None:
    shares = share_out(
        StudySettings(gpus_per_trial=1), 1, [{"CPU": 2.0, "GPU": 1.0}, {"CPU": 64.0}]
    )
    assert (shares.cpus, shares.concurrent) == (2, 1)


@pytest.mark.parametrize(
    ("settings", "nodes", "said"),
    [
        (StudySettings(), [{"memory": 1.0}], "No node of the Ray cluster has a CPU"),
        (
            StudySettings(cpus_per_trial=4),
            [{"CPU": 2.0}],
            "cpus_per_trial is 4, but the largest node has 2",
        ),
        (StudySettings(gpus_per_trial=1), [{"CPU": 2.0}], "gpus_per_trial is 1, but .* 0 GPUs"),
        (
            StudySettings(gpus_per_trial=2),
            [{"CPU": 2.0, "GPU": 1.0}] * 2,
            "gpus_per_trial is 2, but .* at most 1 on one node",
        ),
        (
            StudySettings(gpus_per_trial=1),
            [{"GPU": 1.0}, {"CPU": 4.0}],
            "No node of the Ray cluster with such GPUs has a CPU",
        ),
    ],
)
def test_what_no_node_could_ever_hold_is_refused_instead_of_waited_for(
    settings: StudySettings, nodes: list[dict[str, float]], said: str
) -> None:
    with pytest.raises(SettingsError, match=said):
        share_out(settings, 1, nodes)


# ---- streams that are reserved with their trials ----


def test_a_trial_leaves_cores_for_its_stream() -> None:
    shares = share_out(StudySettings(), 1, [{"CPU": 2.0}], stream_cpus=1)
    assert (shares.cpus, shares.stream_cpus, shares.concurrent) == (1, 1, 1)
    assert shares.bundles == [{"CPU": 1}, {"CPU": 1}]
    shares = share_out(StudySettings(cpus_per_trial=2), 4, [{"CPU": 16.0}], stream_cpus=2)
    assert (shares.cpus, shares.concurrent) == (2, 4)
    assert share_out(StudySettings(), 1, [{"CPU": 2.0}]).bundles == [{"CPU": 2}]


def test_cpu_nodes_feed_gpu_nodes() -> None:
    nodes = [{"CPU": 4.0, "GPU": 4.0}, {"CPU": 12.0}]
    shares = share_out(StudySettings(gpus_per_trial=1, cpus_per_trial=1), 1, nodes, stream_cpus=3)
    assert shares.concurrent == 4, "their streams take the other node's twelve CPUs"
    assert shares.bundles == [{"CPU": 1, "GPU": 1}, {"CPU": 3}]


def test_a_stream_is_on_one_node() -> None:
    nodes = [{"CPU": 4.0}, {"CPU": 4.0}]
    assert share_out(StudySettings(cpus_per_trial=1), 1, nodes, stream_cpus=3).concurrent == 2


def test_a_stream_that_no_trial_leaves_cores_for_is_refused() -> None:
    for nodes in ([{"CPU": 1.0}], [{"CPU": 2.0}]):
        with pytest.raises(SettingsError, match="--stream local"):
            share_out(StudySettings(cpus_per_trial=int(nodes[0]["CPU"])), 1, nodes, stream_cpus=1)


@given(
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 2)), min_size=1, max_size=4),
    st.integers(1, 4),
    st.integers(0, 1),
    st.integers(1, 4),
)
def test_trials_with_streams_never_take_more_than_there_is(
    nodes: list[tuple[int, int]], cpus: int, gpus: int, stream_cpus: int
) -> None:
    resources = [{"CPU": float(c), "GPU": float(g)} for c, g in nodes]
    try:
        shares = share_out(
            StudySettings(cpus_per_trial=cpus, gpus_per_trial=gpus), 1, resources, stream_cpus
        )
    except SettingsError:
        return
    assert shares.concurrent >= 1
    assert shares.concurrent * (cpus + stream_cpus) <= sum(c for c, _ in nodes)
    assert shares.concurrent * gpus <= sum(g for _, g in nodes)
