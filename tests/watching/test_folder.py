"""Pictures of a folder: real files, written slowly, moved in, half-written, on folders that go."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from watchdog.observers.api import BaseObserver

from clsnf.core.errors import DataError, ImageError
from clsnf.watching import folder as folder_module
from clsnf.watching.folder import FolderSettings, FolderSource, on_a_share
from clsnf.watching.pictures import FileChangedError, FilePicture, MissingPicture, Picture
from clsnf.watching.state import State
from tests.support.small_server import encoded, picture
from tests.support.watching import made_result

DATA = encoded(picture())


class Opened:
    """A source over a folder, with what it said."""

    def __init__(self, folder: Path, state: State, **settings: object) -> None:
        self.lines: list[str] = []
        self.state = state
        self.source = FolderSource(
            folder,
            FolderSettings(**settings),  # type: ignore[arg-type]
            state,
            self.lines.append,
        )
        self.source.open()

    def next(self, seconds: float = 20) -> Picture:
        """The next picture; it is judged."""
        found = self.source.take(seconds)
        assert found is not None, "no picture came"
        if found.version is not None:
            size, mtime_ns = found.version
            self.state.add(made_result(source=found.source, size=size, mtime_ns=mtime_ns))
        return found

    def names(self, number: int) -> list[str]:
        return [os.path.basename(self.next().source) for _ in range(number)]

    def nothing_comes(self) -> bool:
        return self.source.take(1.0) is None


@pytest.fixture
def incoming(tmp_path: Path) -> Path:
    folder = tmp_path / "incoming"
    folder.mkdir()
    return folder


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    state = State(tmp_path / "state", [], 100, lambda line: None)
    yield state
    state.close()


@pytest.fixture
def opened(incoming: Path, state: State) -> Iterator[Callable[..., Opened]]:
    sources: list[FolderSource] = []

    def open_source(folder: Path = incoming, **settings: object) -> Opened:
        made = Opened(folder, state, **settings)
        sources.append(made.source)
        return made

    yield open_source
    for source in sources:
        source.close()


both = pytest.mark.parametrize("polling", [False, True], ids=["events", "polling"])


@both
def test_files_that_were_there_come_first_in_the_order_of_their_time(
    incoming: Path, opened: Callable[..., Opened], polling: bool
) -> None:
    for age, name in ((3, "z.png"), (2, "a.png"), (1, "m.PNG")):
        (incoming / name).write_bytes(DATA)
        os.utime(incoming / name, (time.time() - age, time.time() - age))
    watched = opened(polling=polling, settle=0.2)
    assert watched.names(3) == ["z.png", "a.png", "m.PNG"]
    (incoming / "later.png").write_bytes(DATA)
    assert watched.names(1) == ["later.png"]
    assert watched.nothing_comes()


@both
def test_a_file_that_is_written_slowly_comes_once_and_whole(
    incoming: Path, opened: Callable[..., Opened], polling: bool
) -> None:
    watched = opened(polling=polling, settle=0.6)
    with (incoming / "slow.png").open("wb", buffering=0) as file:
        for start in range(0, len(DATA), len(DATA) // 4 + 1):
            file.write(DATA[start : start + len(DATA) // 4 + 1])
            assert watched.source.take(0.2) is None
    found = watched.next()
    assert found.version is not None
    assert found.version[0] == len(DATA)
    assert found.read().shape == picture().shape
    assert watched.nothing_comes()


@both
def test_files_that_are_moved_in_come_and_temporary_names_do_not(
    incoming: Path, tmp_path: Path, opened: Callable[..., Opened], polling: bool
) -> None:
    watched = opened(polling=polling, settle=0.2)
    (tmp_path / "outside.png").write_bytes(DATA)
    os.rename(tmp_path / "outside.png", incoming / "inside.png")
    for name in (".hidden.png", "~lock.png", "c.png.part", "notes.txt", "also.txt"):
        (incoming / name).write_bytes(DATA)
    (incoming / "b.png.part").write_bytes(DATA)
    os.rename(incoming / "b.png.part", incoming / "b.png")
    assert sorted(watched.names(2)) == ["b.png", "inside.png"]
    assert watched.nothing_comes()
    (line,) = [line for line in watched.lines if ".txt" in line]
    assert line.startswith(f"{incoming}: files that end in .txt are not judged; .png, .jpg, ")


def test_files_that_were_closed_or_moved_in_are_not_waited_for(
    incoming: Path, tmp_path: Path, opened: Callable[..., Opened]
) -> None:
    watched = opened(polling=False, settle=3600)
    (incoming / "closed.png").write_bytes(DATA)
    (tmp_path / "outside.png").write_bytes(DATA)
    os.rename(tmp_path / "outside.png", incoming / "from_outside.png")
    (incoming / "part").write_bytes(DATA)
    os.rename(incoming / "part", incoming / "renamed.png")
    assert watched.names(3) == ["closed.png", "from_outside.png", "renamed.png"]


def test_a_file_that_is_closed_half_written_is_given_again_when_it_is_whole(
    incoming: Path, opened: Callable[..., Opened]
) -> None:
    watched = opened(polling=False, settle=0.5)
    (incoming / "half.png").write_bytes(DATA[:500])
    first = watched.source.take(20)
    assert isinstance(first, FilePicture)
    assert first.may_change
    with pytest.raises(ImageError):
        first.read()
    watched.source.postpone(first)
    with (incoming / "half.png").open("ab") as file:
        file.write(DATA[500:])
    whole = watched.next()
    assert whole.read().shape == picture().shape


def test_a_file_that_stays_half_written_is_given_once_more_as_it_is(
    incoming: Path, opened: Callable[..., Opened]
) -> None:
    watched = opened(polling=False, settle=0.3)
    (incoming / "half.png").write_bytes(DATA[:500])
    first = watched.source.take(20)
    assert first is not None
    watched.source.postpone(first)
    second = watched.next()
    assert not second.may_change
    assert watched.nothing_comes()


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(DATA)
    with pytest.raises(FileChangedError):
        FilePicture(str(tmp_path / "a.png"), (len(DATA) - 1, 0)).read()


def test_a_file_that_is_taken_away_before_it_is_judged_is_said_to_be_missing(
    incoming: Path, opened: Callable[..., Opened]
) -> None:
    watched = opened(polling=False)
    (incoming / "a.png").write_bytes(DATA)
    first = watched.source.take(20)
    assert first is not None
    (incoming / "a.png").unlink()
    watched.source.postpone(first)
    missing = watched.next()
    assert isinstance(missing, MissingPicture)
    assert "is gone" in missing.reason


def test_a_file_that_never_stops_changing_is_said_to_be_not_ok(
    incoming: Path, opened: Callable[..., Opened], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_module, "_SLOWEST", 0.5)
    watched = opened(settle=5)
    with (incoming / "endless.png").open("wb", buffering=0) as file:
        file.write(DATA[:100])
        found = watched.next()
        assert isinstance(found, MissingPicture)
        assert "still being written" in found.reason
        file.write(DATA[100:])
    whole = watched.next()
    assert whole.read().shape == picture().shape


def test_a_file_that_is_written_anew_is_judged_again(
    incoming: Path, opened: Callable[..., Opened]
) -> None:
    watched = opened(settle=0.2)
    (incoming / "a.png").write_bytes(DATA)
    watched.names(1)
    (incoming / "a.png").write_bytes(encoded(picture(1)))
    assert watched.names(1) == ["a.png"]


def test_new_only_leaves_out_the_files_of_the_first_start_alone(
    incoming: Path, opened: Callable[..., Opened]
) -> None:
    (incoming / "old.png").write_bytes(DATA)
    watched = opened(new_only=True, settle=0.2)
    assert watched.nothing_comes()
    watched.source.close()
    (incoming / "meanwhile.png").write_bytes(DATA)  # while no watch runs
    assert opened(new_only=True, settle=0.2).names(1) == ["meanwhile.png"]


@both
def test_what_waits_is_bounded_and_nothing_is_lost(
    incoming: Path, opened: Callable[..., Opened], polling: bool
) -> None:
    watched = opened(polling=polling, settle=0.1, max_waiting=4)
    names = [f"{number:03d}.png" for number in range(30)]
    for name in names:
        (incoming / name).write_bytes(DATA)
    found = []
    for _ in names:
        found += watched.names(1)
        assert watched.source.waiting <= 4
    assert sorted(found) == names
    assert sum("--max-waiting" in line for line in watched.lines) >= 1
    assert watched.nothing_comes()
    assert not watched.source.overloaded


def test_folders_in_the_folder_are_watched_where_asked_for_and_outputs_are_not(
    incoming: Path, tmp_path: Path, opened: Callable[..., Opened]
) -> None:
    (incoming / "ok").mkdir()
    watched = opened(recursive=True, settle=0.2, left_out=(incoming / "ok",))
    (incoming / "ok" / "done.png").write_bytes(DATA)
    (tmp_path / "day").mkdir()
    (tmp_path / "day" / "moved.png").write_bytes(DATA)
    shutil.move(tmp_path / "day", incoming / "day")
    assert watched.names(1) == ["moved.png"]
    (incoming / "day" / "b.png").write_bytes(DATA)
    assert watched.names(1) == ["b.png"]
    assert watched.nothing_comes()


@both
def test_a_folder_that_goes_away_is_one_result_and_is_watched_again_when_it_is_back(
    incoming: Path, opened: Callable[..., Opened], polling: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_module, "_SCANS", {True: 0.2, False: 0.2})
    watched = opened(polling=polling, settle=0.2)
    shutil.rmtree(incoming)
    missing = watched.next()
    assert isinstance(missing, MissingPicture)
    assert watched.source.trouble
    assert watched.nothing_comes()
    incoming.mkdir()
    (incoming / "a.png").write_bytes(DATA)
    assert watched.names(1) == ["a.png"]
    assert not watched.source.trouble
    (incoming / "b.png").write_bytes(DATA)
    assert watched.names(1) == ["b.png"]
    assert any("is back" in line for line in watched.lines)


def test_without_events_the_folder_is_scanned(
    incoming: Path, opened: Callable[..., Opened], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: object) -> None:
        raise OSError(28, "inotify watch limit reached")

    monkeypatch.setattr(BaseObserver, "start", refuse)
    watched = opened(polling=False, settle=0.2)
    (incoming / "a.png").write_bytes(DATA)
    assert watched.names(1) == ["a.png"]
    assert any("inotify watch limit reached" in line for line in watched.lines)


def test_names_need_not_be_text(incoming: Path, opened: Callable[..., Opened]) -> None:
    watched = opened(settle=0.2)
    with open(os.fsencode(incoming) + b"/caf\xe9.png", "wb") as file:
        file.write(DATA)
    assert os.fsencode(watched.names(1)[0]) == b"caf\xe9.png"
    assert watched.nothing_comes()


def test_a_folder_that_is_not_there_is_one_clear_line(tmp_path: Path, state: State) -> None:
    with pytest.raises(DataError, match="There is no folder"):
        FolderSource(tmp_path / "no", FolderSettings(), state, print).open()


def test_the_systems_own_disk_is_no_share() -> None:
    assert not on_a_share(Path("/"))
