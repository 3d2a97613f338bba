"""Files and folders that appear whole or not at all."""

import errno
import json
import os
import stat
from pathlib import Path

import pytest
import torch

from clsnf.core.errors import OutputError
from clsnf.core.files import atomic_write, read_json, write_json
from clsnf.detector import Detector
from clsnf.training.artifacts import Artifact, ArtifactStore


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "down" / "file.txt"
    with atomic_write(path) as draft:
        draft.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert names(path.parent) == ["file.txt"]


def test_a_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with atomic_write(path) as draft:
        draft.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names(tmp_path) == ["file.txt"]


def test_a_folder_is_replaced_with_all_that_it_held(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old.txt").write_text("old")
    with atomic_write(path) as draft:
        draft.mkdir()
        (draft / "new.txt").write_text("new")
        assert names(path) == ["old.txt"]
    assert names(path) == ["new.txt"]
    assert names(tmp_path) == ["folder"]


def write_half_a_file(path: Path, error: type[BaseException]) -> None:
    with atomic_write(path) as draft:
        draft.write_text("half")
        raise error


def write_half_a_folder(path: Path) -> None:
    with atomic_write(path) as draft:
        draft.mkdir()
        (draft / "half.txt").write_text("half")
        raise RuntimeError


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("there_before", [True, False])
def test_an_error_leaves_no_half_written_file(
    tmp_path: Path, error: type[BaseException], there_before: bool
) -> None:
    path = tmp_path / "file.txt"
    if there_before:
        path.write_text("old")
    with pytest.raises(error):
        write_half_a_file(path, error)
    assert names(tmp_path) == (["file.txt"] if there_before else [])
    assert not there_before or path.read_text() == "old"


@pytest.mark.parametrize("there_before", [True, False])
def test_an_error_leaves_no_half_written_folder(tmp_path: Path, there_before: bool) -> None:
    path = tmp_path / "folder"
    if there_before:
        path.mkdir()
        (path / "old.txt").write_text("old")
    with pytest.raises(RuntimeError):
        write_half_a_folder(path)
    assert names(tmp_path) == (["folder"] if there_before else [])
    assert not there_before or (path / "old.txt").read_text() == "old"


def test_a_folder_whose_successor_can_t_take_its_place_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old.txt").write_text("old")
    rename = Path.rename

    def fail_for_drafts(self: Path, target: Path) -> Path:
        if self.name.endswith(".part"):
            raise OSError("no room")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_drafts)
    with pytest.raises(OSError, match="no room"), atomic_write(path) as draft:
        draft.mkdir()
    assert names(tmp_path) == ["folder"]
    assert (path / "old.txt").read_text() == "old"


def test_a_file_does_not_take_the_place_of_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    with pytest.raises(OSError, match="folder"), atomic_write(path) as draft:
        draft.write_text("text")
    assert path.is_dir()
    assert names(tmp_path) == ["folder"]


def test_json_comes_back_and_ends_with_a_line_break(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    write_json(path, {"name": "Größe", "values": [1, 0.5]})
    assert json.loads(path.read_text()) == {"name": "Größe", "values": [1, 0.5]}
    assert path.read_bytes().endswith(os.linesep.encode())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_leave_no_file(value: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "facts.json", {"a": value})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "no"),
        RuntimeError(f"IoError: {os.strerror(errno.ENOSPC)} (os error 28)"),
    ],
)
def test_a_full_disk_is_named_and_leaves_what_was_there(tmp_path: Path, error: Exception) -> None:
    path = tmp_path / "kept"
    path.write_text("before")

    def write() -> None:
        with atomic_write(path) as draft:
            draft.write_text("half")
            raise error

    with pytest.raises(OutputError, match="the disk is full"):
        write()
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), atomic_write(tmp_path / "x"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="rights of POSIX")
def test_others_may_read_what_a_library_kept_to_its_owner(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with atomic_write(tmp_path / "file") as draft:
            draft.touch(0o600)
        with atomic_write(tmp_path / "folder") as draft:
            draft.mkdir(0o700)
            (draft / "inside").touch(0o600)
        os.umask(0o077)
        with atomic_write(tmp_path / "private") as draft:
            draft.touch(0o600)
    finally:
        os.umask(before)
    modes = {
        path.name: stat.S_IMODE(path.stat().st_mode)
        for path in (*tmp_path.iterdir(), tmp_path / "folder" / "inside")
    }
    assert modes == {"file": 0o644, "folder": 0o755, "inside": 0o644, "private": 0o600}


def test_another_user_reads_a_saved_detector_and_a_stored_stage(
    winners: Path, tmp_path: Path
) -> None:
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("only root may become another user")
    saved = tmp_path / "model"
    before = os.umask(0o022)
    try:
        Detector.load(winners / "plate", device="cpu").save(saved)
        stage = Artifact({"t": torch.zeros(2)}, {})
        ArtifactStore(tmp_path / "work").get("kind", {"a": 1}, lambda: stage)
    finally:
        os.umask(before)
    files = [p for p in tmp_path.rglob("*") if p.is_file() and not p.name.endswith(".lock")]
    assert len(files) >= 4
    tmp_path.chmod(0o755)
    child = os.fork()
    if child == 0:  # nothing but system calls: no thread of torch's lives here
        os.chdir(tmp_path)
        os.setgid(65534)
        os.setuid(65534)
        try:
            for file in files:
                with open(file.relative_to(tmp_path), "rb") as opened:
                    opened.read(1)
        except OSError:
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ("[" * 200_000, "nested"),
        ('{"a": [1, NaN]}', r"a\[1\] is nan"),
        ('{"a": 1e999}', "finite"),
        ('{"a": {"b": "\\\\ud800"}}', "a.b is no valid text"),
        ('{"\\\\ud800": 1}', "no valid text"),
        ('{"a": 99999999999999999999}', "digits"),
    ],
)
def test_json_that_anybody_may_have_written_is_checked(
    tmp_path: Path, raw: str, words: str
) -> None:
    (tmp_path / "a.json").write_text(raw.replace("\\\\", "\\"))
    with pytest.raises(ValueError, match=words):
        read_json(tmp_path / "a.json")
