"""The work of a watch from within: what it says while something is wrong."""

from __future__ import annotations

import threading
from pathlib import Path

import cv2
import pytest

from clsnf.watching import run as run_module
from clsnf.watching.judge import Judge
from clsnf.watching.output import Output
from clsnf.watching.outputs import OUTPUTS
from clsnf.watching.pictures import Picture
from clsnf.watching.result import Judgement, Result
from clsnf.watching.run import WatchRequest, watch
from clsnf.watching.status import Status
from tests.support.small_server import free_port, picture
from tests.support.watching import wait_until


class Recorder(Output):
    """Keeps what an output is called with, and fails where it is asked to."""

    judgements: list[Judgement]
    statuses: list[Status]

    def __init__(self, target: str, context: object) -> None:
        self.judgements, self.statuses = RECORDED[target]

    def show(self, judgement: Judgement) -> None:
        self.judgements.append(judgement)
        raise RuntimeError("an output that breaks")

    def tell(self, status: Status) -> None:
        self.statuses.append(status)


RECORDED: dict[str, tuple[list[Judgement], list[Status]]] = {}


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Judgement], list[Status]]:
    RECORDED["here"] = ([], [])
    monkeypatch.setitem(OUTPUTS, "recorder", Recorder)
    return RECORDED["here"]


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("video") / "line.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (60, 72))
    for number in range(4):
        writer.write(picture(number)[:, :, ::-1])
    writer.release()
    return path


def run(
    winners: Path, video: Path, state: Path, targets: dict[str, str]
) -> tuple[list[str], list[Result]]:
    """What a watch over the video said, and its results."""
    lines: list[str] = []
    results: list[Result] = []
    request = WatchRequest(
        winners / "plate", str(video), targets, state, device="cpu", heartbeat=0.05
    )
    watch(request, lines.append, results.append)
    return lines, results


def test_a_picture_that_takes_too_long_is_said_by_the_heartbeat(
    winners: Path,
    video: Path,
    tmp_path: Path,
    recorded: tuple[list[Judgement], list[Status]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    statuses, judge = recorded[1], Judge.judge

    def slow(self: Judge, picture: Picture) -> Judgement:
        if picture.frame == 2:
            wait_until(lambda: statuses[-1].condition == "stalled")
        return judge(self, picture)

    monkeypatch.setattr(run_module, "_STALLED", 0.3)
    monkeypatch.setattr(Judge, "judge", slow)
    lines, results = run(winners, video, tmp_path / "state", {"recorder": "here"})
    assert len(results) == 4
    assert any("heartbeat: stalled (nothing was judged or stored" in line for line in lines)
    assert statuses[-1].condition == "ready"


def test_a_model_that_fails_is_a_condition_that_is_told_before_the_verdict(
    winners: Path,
    video: Path,
    tmp_path: Path,
    recorded: tuple[list[Judgement], list[Status]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    judgements, statuses = recorded
    score, calls = Judge._score, []

    def broken(self: Judge, image: object) -> object:
        calls.append(image)
        if len(calls) in (2, 3):
            raise RuntimeError("CUDA error")
        return score(self, image)  # type: ignore[arg-type]

    monkeypatch.setattr(Judge, "_score", broken)
    lines, results = run(winners, video, tmp_path / "state", {"recorder": "here"})
    assert [result.reason for result in results[1:3]] == ["the model failed: CUDA error"] * 2
    assert [result.verdict for result in results[1:3]] == ["ng", "ng"]
    assert results[3].reason is None
    conditions = [status.condition for status in statuses]
    assert "failing" in conditions
    assert conditions[-1] == "ready"
    assert len(judgements) == 4  # although the output broke each time
    assert any("an output that breaks" in line for line in lines)
    assert any("ended: 4 judged" in line and "(2 could not be judged)" in line for line in lines)


def test_what_was_not_delivered_is_said_at_the_end_and_delivered_by_the_next_start(
    winners: Path, video: Path, tmp_path: Path
) -> None:
    targets = {"webhook": f"http://127.0.0.1:{free_port()}/", "out": str(tmp_path / "a.jsonl")}
    lines, _ = run(winners, video, tmp_path / "state", targets)
    assert any(line.startswith("webhook: 4 results wait in ") for line in lines)
    # A start without the output keeps them, and counts them.
    lines, results = run(winners, video, tmp_path / "state", {"out": str(tmp_path / "a.jsonl")})
    assert any("4 waiting for webhook" in line for line in lines)
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 8
    assert results[0].id.endswith("-000000005")


def test_off_the_main_thread_a_watch_leaves_signals_alone(
    winners: Path, video: Path, tmp_path: Path
) -> None:
    found: list[Result] = []
    thread = threading.Thread(
        target=lambda: found.extend(run(winners, video, tmp_path / "state", {})[1])
    )
    thread.start()
    thread.join(60)
    assert len(found) == 4
