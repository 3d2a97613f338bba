"""``clsnf watch`` as a process: over kill -9, signals, and what a user gets wrong."""

from __future__ import annotations

import json
import signal
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import cv2
import pytest
from click.testing import CliRunner

from clsnf.cli import main
from tests.support.small_server import encoded, picture
from tests.support.watching import (
    Subscriber,
    WatchProcess,
    broker,
    needs_mosquitto,
    wait_until,
)


@pytest.fixture
def incoming(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    return folder


def put(folder: Path, numbers: Iterator[int] | range) -> list[str]:
    data = encoded(picture())
    names = []
    for number in numbers:
        part = folder / f"{number:04d}.png.part"
        part.write_bytes(data)
        part.rename(folder / f"{number:04d}.png")
        names.append(f"{number:04d}.png")
    return names


def results(file: Path) -> list[dict[str, object]]:
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]]


def sources(file: Path) -> list[str]:
    return [Path(str(result["source"])).name for result in results(file)]


@pytest.mark.slow
def test_a_watch_that_is_killed_judges_nothing_twice_and_loses_nothing(
    winners: Path, incoming: Path, tmp_path: Path
) -> None:
    out = tmp_path / "results.jsonl"
    names = put(incoming, range(60))
    arguments = (winners / "plate", incoming, "--out", out, "--max-waiting", 5, "--settle", 0.1)
    for round_number in range(3):
        process = WatchProcess(*arguments, folder=tmp_path)
        wait_until(lambda n=round_number: len(sources(out)) > 4 + 10 * n, 60)  # type: ignore[misc]
        process.end(signal.SIGKILL)
    names += put(incoming, range(100, 110))  # while no watch runs
    process = WatchProcess(*arguments, folder=tmp_path)
    wait_until(lambda: len(sources(out)) >= 70, 60)
    assert process.end(signal.SIGINT) == 0
    assert sorted(sources(out)) == names
    with sqlite3.connect(tmp_path / ".clsnf-watch" / "watch.sqlite") as database:
        assert database.execute("SELECT COUNT(*) FROM judged").fetchone() == (70,)
        assert database.execute("SELECT COUNT(*) FROM waiting").fetchone() == (0,)


@needs_mosquitto
@pytest.mark.slow
def test_kills_and_a_broker_that_goes_away_lose_nothing_on_any_way(
    winners: Path, incoming: Path, tmp_path: Path
) -> None:
    out, sorted_files = tmp_path / "results.jsonl", tmp_path / "sorted"
    with broker(tmp_path) as running:
        heard = Subscriber(running.port, "line")
        assert heard.subscribed.wait(20)
        arguments = (
            winners / "plate", incoming, "--out", out, "--sort", sorted_files,
            "--mqtt", f"mqtt://127.0.0.1:{running.port}/line/1", "--max-waiting", 3,
        )  # fmt: skip
        names: list[str] = []
        for start in (0, 30):
            names += put(incoming, range(start, start + 30))
            process = WatchProcess(*arguments, folder=tmp_path)
            wait_until(lambda n=start: len(sources(out)) > n + 5, 60)  # type: ignore[misc]
            running.stop()
            wait_until(lambda n=start: len(sources(out)) > n + 15, 60)  # type: ignore[misc]
            process.end(signal.SIGKILL)
            running.start()
        process = WatchProcess(*arguments, folder=tmp_path)
        wait_until(lambda: len(sources(out)) == 60 and not list(incoming.iterdir()), 60)
        ids = [str(result["id"]) for result in results(out)]
        wait_until(lambda: ids[-1] in str(heard.on("line/1")[-1]), 60)
        assert process.end() == 0
        published = [json.loads(text)["id"] for text in heard.on("line/1")]
        heard.close()
    assert list(dict.fromkeys(published)) == ids
    assert sorted(sources(out)) == names
    assert sorted(path.name for path in sorted_files.rglob("*.png")) == names


def test_sorted_pictures_damaged_ones_and_a_clean_end(
    winners: Path, incoming: Path, tmp_path: Path
) -> None:
    put(incoming, range(3))
    (incoming / "bad.png").write_bytes(encoded(picture())[:400])
    process = WatchProcess(
        winners / "plate", incoming, "--out", "results.csv", "--overlays", "overlays",
        "--sort", "in/sorted", "--heartbeat", 0.3, "--settle", 0.1, "--recursive",
        folder=tmp_path,
    )  # fmt: skip
    wait_until(lambda: process.said("4 judged"), 60)
    put(incoming, range(0, 1))  # a name that was there before is a new picture
    wait_until(lambda: process.said("5 judged"), 60)
    assert process.end() == 0
    moved = sorted(p.name for p in (incoming / "sorted").rglob("*.png"))
    # The same content under the same name is the same picture.
    assert moved == ["0000.png", "0001.png", "0002.png", "bad.png"]
    assert (incoming / "sorted" / "ng" / "bad.png").exists()
    assert list(incoming.glob("*.png")) == []
    lines = (tmp_path / "results.csv").read_text().splitlines()
    assert len(lines) == 6
    assert sum(",ng," in line and "cut short" in line for line in lines) == 1
    assert len(list((tmp_path / "overlays").glob("*.png"))) == 4
    assert "ended: 5 judged" in process.errors.read_text()


def test_a_video_is_judged_to_its_end(winners: Path, tmp_path: Path) -> None:
    writer = cv2.VideoWriter(
        str(tmp_path / "line.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 10, (60, 72)
    )
    for number in range(6):
        writer.write(picture(number)[:, :, ::-1])
    writer.release()
    study = tmp_path / "study"
    (study / "winners").mkdir(parents=True)
    (study / "winners" / "plate").symlink_to(winners / "plate")
    process = WatchProcess(study, "line.avi", "--fps", 5, "--out", "results.jsonl", folder=tmp_path)
    assert process.wait() == 0, process.errors.read_text()
    assert process.said("ended: 3 judged")
    found = results(tmp_path / "results.jsonl")
    assert [result["frame"] for result in found] == [0, 2, 4]
    assert all(result["score"] is not None for result in found)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["no-model", "in"], "no-model"),
        (["WINNERS", "in"], "holds 2 saved detectors"),
        (["MODEL", "no-folder"], "There is no folder no-folder"),
        (["MODEL", "77"], "camera 77 gives no pictures"),
        (["MODEL", "rtsp://me:hush@127.0.0.1/live"], "CLSNF_CAMERA_PASSWORD"),
        (["MODEL", "in", "--out", "results.txt"], ".jsonl or .csv"),
        (["MODEL", "in", "--sort", "in"], "is watched itself"),
        (["MODEL", "in", "--every", "1", "--fps", "2"], "--every or --fps"),
        (["MODEL", "in", "--mqtt", "mqtt://host"], "mqtt://USER@HOST:1883/TOPIC"),
    ],
)
def test_what_a_user_gets_wrong_is_one_clear_line(
    winners: Path,
    incoming: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    line: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    named = {"MODEL": str(winners / "plate"), "WINNERS": str(winners)}
    given = [named.get(part, part) for part in arguments]
    ended = CliRunner().invoke(main, ["watch", *given, "--device", "cpu"])
    assert ended.exit_code == 2
    said = ended.stderr.splitlines()
    assert len(said) == 1
    assert said[0].startswith("error: ")
    assert line in said[0]
    assert "hush" not in said[0]
