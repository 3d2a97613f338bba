"""Trials whose notes stop changing are ended; others are left alone."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from clsnf.study import hang_watch
from clsnf.study.hang_watch import HangWatch
from clsnf.study.progress_notes import (
    FileNotes,
    NotedProgress,
    TrialProcess,
    note_process,
    trial_signs,
)


class Search:
    """A searcher that knows its running trials."""

    def __init__(self, *running: str) -> None:
        self.running, self.is_paused = set(running), False
        self.hung: dict[str, float] = {}

    def on_trial_hung(self, trial_id: str, seconds: float) -> None:
        self.hung[trial_id] = seconds


class Watched:
    """A watch with a clock that a test sets, on notes in a folder."""

    def __init__(self, folder: Path, *running: str) -> None:
        self.notes, self.search, self.now = FileNotes(folder), Search(*running), 0.0
        self.ended: list[TrialProcess] = []
        self.killed: list[str] = []
        self.actor_of = dict.fromkeys(running, "an actor")
        self._watch = HangWatch(self.search, self.notes, 60.0, self._end, lambda: self.now)

    def _end(self, process: TrialProcess | None, actor: str) -> None:
        if process is None:
            self.killed.append(actor)
        else:
            self.ended.append(process)

    def look(self, now: float) -> None:
        self.now = now
        self._watch.look(self.actor_of)


def test_a_trial_without_a_new_note_for_too_long_is_ended(tmp_path: Path) -> None:
    watched = Watched(tmp_path, "t1")
    note_process(watched.notes, "t1", "node")
    for now in (10, 60):
        watched.look(now)
    assert not watched.ended
    watched.look(75)
    assert [process.pid for process in watched.ended] == [os.getpid()]
    assert watched.search.hung == {"t1": 65.0}
    watched.look(200)
    assert len(watched.ended) == 1


def test_progress_keeps_a_trial_alive(tmp_path: Path) -> None:
    watched = Watched(tmp_path, "t1")
    note_process(watched.notes, "t1", "node")
    for step in range(10):
        NotedProgress(watched.notes, "nut")("flow", step, 20)
        watched.look(40.0 * (step + 1))
    assert not watched.ended


def test_a_trial_that_waits_for_its_place_or_for_an_outage_is_left_alone(tmp_path: Path) -> None:
    watched = Watched(tmp_path, "pending", "waiting")
    del watched.actor_of["pending"]
    note_process(watched.notes, "waiting", "node")
    watched.search.is_paused = True
    for now in (10, 100, 200):
        watched.look(now)
    assert not watched.ended


def test_notes_of_trials_that_ended_are_removed(tmp_path: Path) -> None:
    watched = Watched(tmp_path, "t1")
    note_process(watched.notes, "t1", "node")
    note_process(watched.notes, "of a killed driver", "node")
    watched.look(10)
    assert set(trial_signs(watched.notes)) == {"t1"}


def test_an_actor_that_hangs_before_it_notes_its_trial_is_ended(tmp_path: Path) -> None:
    watched = Watched(tmp_path, "t1")
    for now in (10, 60, 75):
        watched.look(now)
    assert watched.killed == ["an actor"], "its process is not known"
    watched = Watched(tmp_path, "t1")
    note_process(watched.notes, "t1", "node")
    watched.look(10)
    watched.search.running, watched.actor_of = {"t2"}, {"t2": "an actor"}
    for now in (20, 60, 90):
        watched.look(now)
    assert [process.pid for process in watched.ended] == [os.getpid()], "known from before"


@pytest.mark.parametrize("text", ["", "{", "[1]", json.dumps({"pid": 1})])
def test_damaged_notes_are_left_out(tmp_path: Path, text: str) -> None:
    watched = Watched(tmp_path, "t1")
    watched.notes.write("trial.t1", text)
    watched.look(100)
    assert trial_signs(watched.notes) == {}


def test_only_a_ray_worker_is_killed() -> None:
    code = "import time; time.sleep(600)"
    for name, is_killed in (("ray::run_trial", True), ("other", False)):
        with subprocess.Popen([name, "-c", code], executable=sys.executable) as process:
            os.kill(process.pid, signal.SIGSTOP)
            hang_watch._kill(process.pid)
            if not is_killed:
                assert process.poll() is None
                process.kill()
            assert process.wait(60) == -signal.SIGKILL
