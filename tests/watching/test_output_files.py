"""Results files, and pictures moved by verdict: over crashes, collisions and full disks."""

from __future__ import annotations

import csv
import errno
import json
import os
from pathlib import Path

import pytest

from clsnf.core.errors import OutageError
from clsnf.watching import output_files
from clsnf.watching.output_files import Overlays, ResultsFile, Sorted, move_into
from clsnf.watching.pictures import version_of
from clsnf.watching.result import FIELDS, Judgement, Result
from tests.support.watching import made_context, made_result


def opened(path: Path, lines: list[str] | None = None) -> ResultsFile:
    output = ResultsFile(str(path), made_context(lines))
    output.open()
    return output


def ids(path: Path) -> list[str]:
    if path.suffix == ".csv":
        return [row["id"] for row in csv.DictReader(path.open(newline=""))]
    return [json.loads(line)["id"] for line in path.read_text().splitlines()]


both = pytest.mark.parametrize("suffix", [".jsonl", ".csv"])


@both
def test_results_are_appended_over_restarts_and_none_comes_twice(
    tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"results{suffix}"
    results = [made_result(number) for number in range(6)]
    opened(path).deliver(results[:3])
    # A crash came between the file and the confirmation: some results come again.
    again = opened(path)
    again.deliver(results[1:4])
    again.deliver(results[4:])
    assert ids(path) == [result.id for result in results]


@both
def test_a_torn_last_line_is_cut_off_and_its_result_comes_again(
    tmp_path: Path, suffix: str
) -> None:
    path, lines = tmp_path / f"results{suffix}", list[str]()
    results = [made_result(number) for number in range(3)]
    opened(path).deliver(results)
    path.write_bytes(path.read_bytes()[:-20])
    opened(path, lines).deliver(results[2:])
    assert ids(path) == [result.id for result in results]
    assert any("torn" in line for line in lines)


def test_a_file_of_another_memory_gets_all_results(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    opened(path).deliver([made_result(500)])
    other = made_result(1, id="ffffffff-000000001")
    output = ResultsFile(str(path), made_context())
    output.open()
    output.deliver([other])
    lower = ResultsFile(str(path), made_context())
    lower.open()
    lower.deliver([made_result(2)])
    assert ids(path)[-2:] == [other.id, made_result(2).id]


def test_a_file_that_was_rotated_away_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    output = opened(path)
    output.deliver([made_result(1)])
    path.rename(tmp_path / "results.csv.1")
    output.deliver([made_result(2)])
    assert path.read_text().splitlines()[0] == ",".join(FIELDS)
    assert ids(path) == [made_result(2).id]


def test_a_spreadsheet_takes_no_cell_for_a_formula(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    name = '=HYPERLINK("http://x","a")\n.png'
    opened(path).deliver([made_result(1, source=name, reason='a, "b"')])
    (row,) = csv.DictReader(path.open(newline=""))
    assert row["source"].startswith("'=")
    assert row["reason"] == 'a, "b"'
    assert row["frame"] == ""
    assert len(path.read_text().splitlines()) == 2


@both
def test_a_name_that_is_no_text_can_be_written(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"results{suffix}"
    opened(path).deliver([made_result(1, source=os.fsdecode(b"caf\xe9.png"))])
    assert len(ids(path)) == 1


def test_a_full_disk_is_an_outage_and_leaves_no_half_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.jsonl"
    output = opened(path)
    output.deliver([made_result(1)])

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(output_files.os, "fsync", full)
        with pytest.raises(OutageError):
            output.deliver([made_result(2)])
    output.deliver([made_result(2)])
    assert ids(path) == [made_result(1).id, made_result(2).id]


def test_an_overlay_that_can_not_be_written_is_said_once(tmp_path: Path) -> None:
    import numpy as np

    lines: list[str] = []
    output = Overlays(str(tmp_path / "overlays"), made_context(lines))
    image, score_map = np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.float32)
    output.show(Judgement(made_result(1), image, score_map))
    assert [p.name for p in (tmp_path / "overlays").iterdir()] == ["a_0123abcd-000000001_ok.png"]
    (tmp_path / "overlays" / "a_0123abcd-000000001_ok.png").unlink()
    (tmp_path / "overlays").rmdir()
    (tmp_path / "overlays").touch()
    for number in (2, 3):
        output.show(Judgement(made_result(number), image, score_map))
    assert len(lines) == 1


# ---- sort ----


def of_file(file: Path, number: int = 1, verdict: str = "ok") -> Result:
    version = version_of(file)
    assert version is not None
    return made_result(number, verdict, str(file), size=version[0], mtime_ns=version[1])


@pytest.fixture
def sort(tmp_path: Path) -> Sorted:
    output = Sorted(str(tmp_path / "sorted"), made_context())
    output.open()
    return output


def test_files_are_moved_by_verdict_and_replace_none(tmp_path: Path, sort: Sorted) -> None:
    for number, (verdict, content) in enumerate((("ok", "1"), ("ng", "2"), ("ok", "3"))):
        file = tmp_path / "a.png"
        file.write_text(content)
        sort.deliver([of_file(file, number, verdict)])
        assert not file.exists()
    contents = {
        p.relative_to(tmp_path / "sorted").as_posix(): p.read_text()
        for p in (tmp_path / "sorted").rglob("*.png")
    }
    assert contents == {"ok/a.png": "1", "ng/a.png": "2", "ok/a-1.png": "3"}


def test_a_move_that_comes_twice_moves_once(tmp_path: Path, sort: Sorted) -> None:
    file = tmp_path / "a.png"
    file.write_text("1")
    result = of_file(file)
    os.link(file, tmp_path / "sorted" / "ok" / "a.png")  # a crash between both of its steps
    sort.deliver([result])
    sort.deliver([result])
    assert [p.name for p in (tmp_path / "sorted" / "ok").iterdir()] == ["a.png"]
    assert not file.exists()


def test_a_file_that_changed_since_it_was_judged_stays(tmp_path: Path, sort: Sorted) -> None:
    file = tmp_path / "a.png"
    file.write_text("1")
    result = of_file(file)
    file.write_text("another")
    sort.deliver([result])
    assert file.exists()


def test_frames_are_not_moved(sort: Sorted) -> None:
    sort.deliver([made_result(source="camera 0", frame=3)])


@pytest.mark.skipif(
    not Path("/dev/shm").is_dir() or os.stat("/dev/shm").st_dev == os.stat("/tmp").st_dev,
    reason="there is no second file system here",
)
def test_a_move_to_another_file_system_replaces_none_and_is_whole(
    tmp_path: Path,
) -> None:
    import tempfile

    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        folder = Path(other)
        for content in ("1", "2", "2"):  # the last as after a crash between copy and removal
            file = tmp_path / "a.png"
            file.write_text(content)
            move_into(file, folder)
            assert not file.exists()
        assert {p.name: p.read_text() for p in folder.iterdir()} == {"a.png": "1", "a-1.png": "2"}


def test_a_file_system_without_hard_links_is_no_obstacle(
    tmp_path: Path, sort: Sorted, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(output_files.os, "link", no_links)
    for number, content in enumerate("12"):
        (tmp_path / "a.png").write_text(content)
        sort.deliver([of_file(tmp_path / "a.png", number)])
    found = {p.name: p.read_text() for p in (tmp_path / "sorted" / "ok").iterdir()}
    assert found == {"a.png": "1", "a-1.png": "2"}
