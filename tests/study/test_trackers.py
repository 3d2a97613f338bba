"""Trackers hear of everything once, and never cost a study anything."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from clsnf.core.config import DetectorSettings, StudySettings
from clsnf.core.errors import SettingsError
from clsnf.core.uris import bare_uri, hide_secrets
from clsnf.results import Measurements, TrackedRuns, TrialResult, read_result
from clsnf.study import trackers
from clsnf.study.folder import StudyFolder
from clsnf.study.mlflow_tracker import MlflowTracker, check_mlflow
from clsnf.study.request import Reporter, StudyRequest
from clsnf.study.space import Space
from clsnf.study.tracked_run import TrackedRun, run_of_trial
from clsnf.study.trackers import Outbox, Sent, tell_trackers
from clsnf.study.wandb_tracker import WandbTracker, check_wandb
from tests.support.web_server import serving

FINISHED = TrialResult(
    "nut",
    0,
    "finished",
    objective=0.5,
    wall_seconds=3.0,
    config={"flow_depth": 2, "backbone.levels": [1, 2]},
    measured=Measurements(validation={"pixel_ap": 0.5}, seconds=2.0),
)
FAILED = TrialResult("nut", 1, "failed", cause="TrainingError: loss is nan", wall_seconds=1.0)
STOPPED = TrialResult("nut", 2, "stopped", wall_seconds=1.0)
TRIALS = [FINISHED, FAILED, STOPPED]


def request_for(out: Path, **options: Any) -> StudyRequest:
    return StudyRequest(
        tables=[],
        out=out,
        settings=DetectorSettings(),
        study=StudySettings(),
        space=Space({"flow_depth": {"type": "choice", "values": [0, 2]}}),
        **options,
    )


def tell(
    out: Path,
    trials: Sequence[TrialResult],
    error: BaseException | None = None,
    **options: Any,
) -> list[str]:
    """Tell the trackers of trials as a study does, which `error` ends; the lines that were said."""
    said: list[str] = []
    request = request_for(out, **options)
    with tell_trackers(request, StudyFolder(str(out)), Reporter(say=said.append)) as reporter:
        for trial in trials:
            reporter.trial(trial)
        if error is not None:
            raise error
    return said


# ---- TensorBoard ----


def events(folder: Path) -> dict[str, Any]:
    """Tag -> value of TensorBoard's files in a folder, read as TensorBoard reads them."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, Any] = {}
    for file in folder.iterdir():
        content = file.read_bytes()
        while content:
            (length,) = struct.unpack("Q", content[:8])
            for value in Event.FromString(content[12 : 12 + length]).summary.value:
                text = [part.decode() for part in value.tensor.string_val]
                found[value.tag] = text[0] if text else value.simple_value
            content = content[16 + length :]
    return found


def test_tensorboard_has_every_trial_and_failed_ones_with_their_cause(tmp_path: Path) -> None:
    assert tell(tmp_path / "night", TRIALS) == []
    folder = tmp_path / "night" / "tune" / "tensorboard"
    finished, failed, stopped = (events(folder / f"nut-{number}") for number in range(3))
    assert finished["objective"] == finished["validation_pixel_ap"] == 0.5
    assert finished["status/text_summary"] == "finished"
    assert failed["cause/text_summary"] == FAILED.cause
    assert failed["status/text_summary"] == "failed"
    assert stopped["status/text_summary"] == "stopped"
    assert "objective" not in failed
    assert "objective" not in stopped


def test_an_interrupt_loses_no_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "_PATIENCE_INTERRUPTED", 60.0)  # also on a busy machine
    with pytest.raises(KeyboardInterrupt):
        tell(tmp_path, [replace(FINISHED, number=n) for n in range(352)], KeyboardInterrupt())
    written = {folder.name for folder in (tmp_path / "tune" / "tensorboard").iterdir()}
    told = read_result(TrackedRuns, tmp_path / "tracked.json")
    assert written == {f"nut-{number}" for number in range(352)}
    assert len(told.sent["TensorBoard"]) == 352


# ---- the queue ----


class Flaky:
    """A tracker that fails for as long as it is told to."""

    place, batch = "the tracker", 2

    def __init__(self) -> None:
        self.down, self.got, self.tries = True, list[str](), 0

    def send(self, runs: Sequence[TrackedRun]) -> None:
        self.tries += 1
        if self.down:
            raise OSError("gone")
        self.got += [run.key for run in runs]


def test_what_a_tracker_missed_is_sent_when_it_is_back(tmp_path: Path) -> None:
    tracker, said = Flaky(), list[str]()
    outbox = Outbox(tracker, Sent(tmp_path, said.append), said.append)
    for trial in TRIALS:
        outbox.put(run_of_trial(trial, at=None))
    while not said:
        time.sleep(0.01)
    assert said == [
        "the tracker: OSError: gone; the study goes on, and what is missed there is sent later"
    ]
    tracker.down = False
    outbox.start_to_close()
    outbox.close(time.monotonic(), 60.0)
    assert sorted(tracker.got) == ["trial/nut/0", "trial/nut/1", "trial/nut/2"]
    assert len(said) == 1


def test_what_a_tracker_never_got_is_said_at_the_end_and_sent_by_a_resumed_study(
    tmp_path: Path,
) -> None:
    tracker, said = Flaky(), list[str]()
    outbox = Outbox(tracker, Sent(tmp_path, said.append), said.append)
    for trial in TRIALS:
        outbox.put(run_of_trial(trial, at=None))
    outbox.start_to_close()
    outbox.close(time.monotonic(), 0.5)
    assert said[-1] == (
        "the tracker lacks 3 trials, because OSError: gone: the same command with --resume sends "
        "them"
    )
    tracker.down = False
    for _ in range(2):  # the second time there is nothing to send
        again = Outbox(tracker, Sent(tmp_path, said.append), said.append)
        for trial in TRIALS:
            again.put(run_of_trial(trial, at=None))
        again.start_to_close()
        again.close(time.monotonic(), 60.0)
    assert sorted(tracker.got) == ["trial/nut/0", "trial/nut/1", "trial/nut/2"]


def test_a_damaged_list_of_what_was_sent_is_said_and_made_anew(tmp_path: Path) -> None:
    (tmp_path / "tracked.json").write_text("{")
    said: list[str] = []
    sent = Sent(tmp_path, said.append)
    assert len(said) == 1
    assert said[0].startswith("trackers may show trials twice: ")
    assert read_result(TrackedRuns, tmp_path / "tracked.json").study == sent.study


# ---- MLflow ----


@pytest.fixture
def database(tmp_path: Path) -> str:
    pytest.importorskip("mlflow")
    return f"sqlite:///{tmp_path}/mlflow.db"


def runs_of(uri: str, experiment: str) -> dict[str, Any]:
    """Name of a run -> run."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    runs = client.search_runs([found.experiment_id])
    by_name = {run.info.run_name: run for run in runs}
    assert len(runs) == len(by_name)
    return by_name


def test_mlflow_has_every_trial_once_and_failed_ones_with_their_cause(
    tmp_path: Path, database: str
) -> None:
    out = tmp_path / "night"
    assert tell(out, TRIALS[:2], mlflow=database) == []
    # What a killed driver leaves: the run is there, and no file says so.
    told = read_result(TrackedRuns, out / "tracked.json")
    (out / "tracked.json").write_text(
        (out / "tracked.json").read_text().replace("trial/nut/0", "trial/nut/9")
    )
    assert tell(out, TRIALS, mlflow=database) == []
    assert read_result(TrackedRuns, out / "tracked.json").study == told.study
    found = runs_of(database, "night")
    assert sorted(found) == ["nut-0", "nut-1", "nut-2"]
    finished, failed, stopped = (found[f"nut-{number}"] for number in range(3))
    assert finished.info.status == "FINISHED"
    assert finished.data.metrics["objective"] == 0.5
    assert finished.data.params == {"flow_depth": "2", "backbone.levels": "[1, 2]"}
    assert failed.info.status == "FAILED"
    assert failed.data.tags["cause"] == FAILED.cause
    assert "objective" not in failed.data.metrics | stopped.data.metrics
    assert stopped.data.tags["status"] == "stopped"


def test_a_run_carries_its_files_as_artifacts(tmp_path: Path, database: str) -> None:
    from mlflow import MlflowClient

    out = tmp_path / "night"
    (out / "winners" / "nut").mkdir(parents=True)
    (out / "winners" / "nut" / "detector.json").write_text("{}")
    (out / "summary.json").write_text("{}")
    client = MlflowClient(database)
    client.create_experiment("night", artifact_location=f"file://{tmp_path}/artifacts")
    tracker = MlflowTracker(database, "night", "night-1", False, StudyFolder(str(out)))
    files = ("winners/nut", "summary.json", "examples/nut.png")
    tracker.send([TrackedRun("winner", "winner/nut/1", "nut-winner", files=files)])
    run = runs_of(database, "night")["nut-winner"].info.run_id
    assert [file.path for file in client.list_artifacts(run)] == ["summary.json", "winners"]
    assert [file.path for file in client.list_artifacts(run, "winners")] == [
        "winners/detector.json"
    ]


@contextmanager
def misbehaving_server(answers: int) -> Iterator[tuple[str, threading.Event]]:
    """Stands for an MLflow server: after so many answers it hangs until the event is set."""
    go_on, counted = threading.Event(), iter(range(10**6))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if next(counted) >= answers:
                go_on.wait(60)
            self.send_response(404)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(b'{"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no"}')

        def do_POST(self) -> None:
            self.do_GET()

        def log_message(self, *_: Any) -> None:
            pass

    with serving(Handler) as port:
        try:
            yield f"http://user:SECRET@127.0.0.1:{port}", go_on
        finally:
            go_on.set()


def test_an_mlflow_server_that_hangs_costs_a_bounded_time_and_shows_no_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setattr(trackers, "_PATIENCE", 1.0)
    with misbehaving_server(answers=1) as (uri, _):
        check_mlflow(uri, "night")
        said = tell(tmp_path / "night", TRIALS, mlflow=uri)
    assert said == [
        f"MLflow at {bare_uri(uri)} lacks 3 trials, because it is too slow: the same command with "
        "--resume sends them"
    ]
    assert "SECRET" not in (tmp_path / "night" / "tracked.json").read_text()


def test_an_mlflow_that_cant_be_used_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        for uri, message in {
            f"file://{tmp_path}/mlruns": "give a database such as sqlite:///",
            f"{tmp_path}/mlruns": "give a database such as sqlite:///",
            "localhost:5000": "is no URI that MLflow knows: give http://HOST:PORT",
            "htp://host": "is no URI that MLflow knows",
            "http:///x": "No MLflow answers at http:///x",
            f"http://user:SECRET@{address}": f"No MLflow answers at http://{address} ",
            "postgresql://user:SECRET@localhost/db": "No MLflow answers at postgresql://localhost",
            f"sqlite:///{tmp_path}": "No MLflow answers at sqlite:///",
        }.items():
            with pytest.raises(SettingsError, match=message) as caught:
                check_mlflow(uri, "night")
            assert "SECRET" not in str(caught.value)
            assert "\n" not in str(caught.value)


def test_what_is_secret_in_a_uri_is_left_out_of_texts() -> None:
    uri = "https://user:pass@host:1/path?token=abc"
    assert bare_uri(uri) == "https://host:1/path"
    assert hide_secrets(f"{uri}: user:pass, pass, token=abc", uri) == (
        "https://host:1/path: ..., ..., ..."
    )


# ---- Weights & Biases ----


def test_wandb_without_a_key_or_with_an_odd_project_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SettingsError, match=r"--wandb has no key: say wandb login"):
        check_wandb("screws")
    with pytest.raises(SettingsError, match="is no project: give PROJECT or ENTITY/PROJECT"):
        check_wandb("a/b/c")
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_wandb("team/screws")


def test_wandb_offline_leaves_a_run_for_each_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for _ in range(2):
        assert tell(tmp_path / "night", TRIALS, wandb="screws") == []
    runs = list((tmp_path / "night" / "wandb").glob("offline-run-*"))
    assert len(runs) == 3


def test_what_wandb_did_not_get_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("clsnf.study.wandb_tracker._TIMEOUT", 5.0)
    monkeypatch.setattr(trackers, "_PATIENCE", 15.0)
    said = tell(tmp_path / "night", TRIALS, wandb="screws")
    assert said[-1].startswith("Weights & Biases (screws) lacks 3 trials, because ")
    assert len(list((tmp_path / "night" / "wandb").glob("offline-run-*"))) == 3
    assert WandbTracker.batch >= 3
