"""Whole studies whose MLflow server dies on the way, or that end without a winner."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.support.running_study import Study
from tests.support.small_data import write_category

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, resnet18_weights: Path) -> Study:
    """A product to study."""
    made = Study(tmp_path_factory.mktemp("tracked"), resnet18_weights)
    write_category(made.data / "nut", seed=1)
    return made


class Server(ThreadingHTTPServer):
    """Stands for an MLflow server that dies after its first run, and for who is notified."""

    def __init__(self, lives_for_runs: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.left, self.notices = lives_for_runs, list[Any]()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://user:SECRET@127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/notify":
            self.server.notices.append(json.loads(content))
        elif self.server.left <= 0:
            self.connection.close()
            return
        if self.path.endswith("runs/update"):
            self.server.left -= 1
        info = {"run_id": "1", "run_uuid": "1", "experiment_id": "1", "status": "RUNNING"}
        experiment = {"experiment_id": "1", "name": "out", "lifecycle_stage": "active"}
        answer = json.dumps({"experiment": experiment, "run": {"info": info, "data": {}}}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def do_GET(self) -> None:
        self.do_POST()

    def log_message(self, *_: Any) -> None:
        pass


def test_an_mlflow_server_that_dies_costs_no_trial_and_what_it_misses_is_said(
    study: Study,
) -> None:
    pytest.importorskip("mlflow")
    server = Server(lives_for_runs=1)
    code, _, stderr = study.run(
        *("--trials", "2", "--mlflow", server.url, "--notify", f"{server.url}/notify")
    )
    server.shutdown()
    assert code == 0, stderr
    assert {trial["status"] for trial in study.trials()} <= {"finished", "failed"}
    assert "winner" in study.summary()["categories"]["nut"]
    place = f"MLflow at http://127.0.0.1:{server.server_port}"
    assert f"{place} lacks 1 trial, 1 winner, 1 study, because " in stderr
    assert "with --resume sends them" in stderr
    assert "Traceback" not in stderr
    for shown in (stderr, *(file.read_text() for file in study.out.glob("*.json"))):
        assert "SECRET" not in shown
    assert [notice["status"] for notice in server.notices] == ["finished"]
    told = json.loads((study.out / "tracked.json").read_text())["sent"]
    assert told[place] == ["trial/nut/0"]
    assert sorted(path.name for path in (study.out / "tune" / "tensorboard").iterdir()) == [
        "nut-0",
        "nut-1",
        "nut-winner",
    ]


def test_a_study_in_which_a_category_has_no_winner_ends_with_status_3(
    study: Study, tmp_path: Path
) -> None:
    server = Server(lives_for_runs=0)
    code, _, stderr = study.at(tmp_path / "out").run(
        *("--trials", "1", "--set", "finetune.learning_rate=1e30"),
        *("--notify", f"{server.url}/notify"),
    )
    server.shutdown()
    assert code == 3, stderr
    assert "error: no winner for 1 of 1: nut" in stderr
    (notice,) = server.notices
    assert notice["status"] == "finished"
    assert notice["categories"]["nut"]["winner"] is False
    assert notice["categories"]["nut"]["failed_trials"] == 1
