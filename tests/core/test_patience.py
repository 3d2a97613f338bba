"""Outages are waited for; anything else is raised at once."""

import errno
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import sqlalchemy

from clsnf.core.errors import DiskFullError, OutageError, SettingsError
from clsnf.core.files import atomic_write
from clsnf.core.patience import NEVER_TIRED, NO_PATIENCE, Patience, is_outage


def failing(times: int, error: Exception) -> Callable[[], int]:
    """Work that fails this often, and then returns how often it was tried."""
    tried = 0

    def work() -> int:
        nonlocal tried
        tried += 1
        if tried <= times:
            raise error
        return tried

    return work


def test_what_never_tires_names_no_end() -> None:
    said: list[str] = []
    work = failing(1, OSError(errno.EIO, "Input/output error"))
    assert Patience(NEVER_TIRED, said.append).wait_for(work) == 2
    assert said[0].endswith("Input/output error: waiting until it works again")


def test_an_outage_is_told_once_and_waited_for() -> None:
    said: list[str] = []
    mended: list[int] = []
    found = Patience(60, said.append).wait_for(
        failing(2, OSError(errno.EIO, "Input/output error")), lambda: mended.append(1)
    )
    assert found == 3
    assert len(mended) == 2, "before each new attempt"
    assert len(said) == 2
    assert "Input/output error: waiting until it works again, for at most 60 s" in said[0]
    assert said[1].startswith("it works again after")


def test_what_is_no_outage_is_raised_at_once() -> None:
    for error in (
        SettingsError("wrong"),
        OSError(errno.EACCES, "Permission denied"),
        FileNotFoundError(errno.ENOENT, "No such file"),
        ValueError(),
    ):
        assert not is_outage(error)
        with pytest.raises(type(error)):
            Patience(60).wait_for(failing(1, error))


@pytest.mark.parametrize("seconds", [0.0, 0.5])
def test_an_outage_that_lasts_too_long_is_one_line(seconds: float) -> None:
    with pytest.raises(OutageError, match=r"^\[Errno 110\] gone\.$"):
        Patience(seconds).wait_for(failing(1000, OSError(errno.ETIMEDOUT, "gone\nmore")))


def test_nothing_waits_when_patience_is_over() -> None:
    patience = Patience(3600)
    threading.Timer(0.2, patience.over.set).start()
    with pytest.raises(OutageError, match="away"):
        patience.wait_for(failing(1000, OutageError("away")))


def test_a_cause_counts() -> None:
    error = RuntimeError("can't be stored")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert is_outage(error)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    with sqlite3.connect(path) as other:
        other.execute("begin exclusive")
        yield
        other.rollback()


def test_a_database_that_is_locked_is_an_outage(tmp_path: Path) -> None:
    path = tmp_path / "trials.db"
    engine = sqlalchemy.create_engine(f"sqlite:///{path}", connect_args={"timeout": 0.05})

    def write() -> None:
        with engine.begin() as connection:
            connection.execute(sqlalchemy.text("create table if not exists t (x int)"))

    with locked(path), pytest.raises(OutageError, match="locked"):
        NO_PATIENCE.wait_for(write)
    Patience(5).wait_for(write)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_an_outage(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as caught:
        Path("/dev/full").write_text("x")
    assert is_outage(caught.value)
    with pytest.raises(DiskFullError) as reported, atomic_write(tmp_path / "x"):
        Path("/dev/full").write_text("x")
    assert is_outage(reported.value)
