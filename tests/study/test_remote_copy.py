"""The driver's copy of a remote study: deleted when it was uploaded, and no sooner."""

import json
import tempfile
from pathlib import Path

import pytest

from clsnf.core.errors import OutageError, OutputError
from clsnf.core.patience import NO_PATIENCE
from clsnf.core.remote import RemoteFolder
from clsnf.study.driver_lease import DRIVER
from clsnf.study.remote_copy import DriverCopy, driver_copy, upload_state


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder of a machine, where copies lie."""
    folder = tmp_path / "machine"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return f"file://{tmp_path}/remote"


def silent(line: str) -> None:
    """Nobody hears it."""


def begin(copy: DriverCopy, trials: int = 1) -> None:
    """What a study writes when it begins, and after some trials."""
    (copy.path / "study.json").write_text(json.dumps({"copy": copy.path.name}))
    (copy.path / "optuna.journal").write_text("{}\n" * trials)


def test_a_copy_that_was_uploaded_is_deleted(uri: str, machine: Path) -> None:
    with driver_copy(uri, False, NO_PATIENCE, silent) as copy:
        with upload_state(copy, silent):
            begin(copy)
        assert copy.path.is_dir()
    remote = RemoteFolder(uri)
    assert remote.read("optuna.journal") == b"{}\n"
    assert remote.read(DRIVER) is None
    assert list(machine.iterdir()) == []


def test_a_copy_that_could_not_be_uploaded_stays_and_is_gone_on_with(
    uri: str, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> None:
        raise OutageError("nobody answers")

    with driver_copy(uri, False, NO_PATIENCE, silent) as copy, upload_state(copy, silent):
        begin(copy)
    said = "nobody answers. What the study knows lies in .*: --resume on this machine uploads it"

    def go_on() -> None:
        with driver_copy(uri, True, NO_PATIENCE, silent) as copy, upload_state(copy, silent):
            begin(copy, trials=3)
            monkeypatch.setattr(RemoteFolder, "push", away)

    with pytest.raises(OutageError, match=said):
        go_on()
    monkeypatch.undo()
    monkeypatch.setattr(tempfile, "tempdir", str(machine))
    assert (RemoteFolder(uri).read("optuna.journal") or b"").count(b"\n") == 1
    with driver_copy(uri, True, NO_PATIENCE, silent) as copy, upload_state(copy, silent):
        assert (copy.path / "optuna.journal").read_text().count("\n") == 3, "what was left here"
    assert (RemoteFolder(uri).read("optuna.journal") or b"").count(b"\n") == 3
    assert list(machine.iterdir()) == []


def test_a_copy_behind_what_another_machine_did_is_fetched_anew(uri: str, machine: Path) -> None:
    with driver_copy(uri, False, NO_PATIENCE, silent) as copy, upload_state(copy, silent):
        begin(copy)
    left = machine / copy.path.name
    left.mkdir()
    (left / "study.json").write_text("{}")
    (left / "optuna.journal").write_text('{"other": 1}\n{}\n{}\n')
    with driver_copy(uri, True, NO_PATIENCE, silent) as copy:
        assert (copy.path / "optuna.journal").read_text() == "{}\n"


def test_a_study_is_refused_before_anything_is_written(uri: str, machine: Path) -> None:
    RemoteFolder(uri).write("notes.txt", b"mine")
    with (
        pytest.raises(OutputError, match="holds no study"),
        driver_copy(uri, False, NO_PATIENCE, silent),
    ):
        pytest.fail("not refused")
    assert RemoteFolder(uri).names() == ["notes.txt"]
    assert list(machine.iterdir()) == []


def test_a_copy_that_another_process_of_this_machine_uses_is_left_alone(
    uri: str, machine: Path
) -> None:
    with driver_copy(uri, False, NO_PATIENCE, silent) as copy, upload_state(copy, silent):
        begin(copy)
        copy.upload()
        RemoteFolder(uri).delete(DRIVER)  # as if this driver had been silent for long
        with (
            pytest.raises(OutputError, match="in use by another study right now, on this machine"),
            driver_copy(uri, True, NO_PATIENCE, silent),
        ):
            pytest.fail("not refused")
        assert copy.path.is_dir()
