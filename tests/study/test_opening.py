"""A study that opens while its storage is away: it waits, and leaves nothing in the way of another
start.
"""

from __future__ import annotations

import errno
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from optuna.storages import RDBStorage
from sqlalchemy.exc import OperationalError

from clsnf.core.errors import OutageError, OutputError
from clsnf.core.patience import NO_PATIENCE, Patience
from clsnf.study import database as database_module
from clsnf.study import trials as trials_module
from clsnf.study.remote_copy import driver_copy
from clsnf.study.trials import open_storage
from tests.support.object_store import stoppable_bucket

_HOLD = """
import sqlite3, sys
database = sqlite3.connect(sys.argv[1], timeout=60)
database.execute("begin exclusive")
print("locked", flush=True)
sys.stdin.readline()
database.rollback()
"""


@contextmanager
def locked_by_a_process(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process holds the database's lock until it gets a line, or the block ends."""
    command = [sys.executable, "-c", _HOLD, str(path)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    try:
        yield process
    finally:
        process.communicate("go on\n" if process.poll() is None else None, timeout=60)


@pytest.fixture
def short_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """sqlite itself gives up soon."""
    monkeypatch.setattr(database_module, "_LOCKED_FOR", 0.1)


@pytest.mark.parametrize("is_known", [False, True])
@pytest.mark.usefixtures("short_locks")
def test_a_database_that_another_process_locks_is_waited_for(
    tmp_path: Path, is_known: bool
) -> None:
    path, said = tmp_path / "trials.db", list[str]()
    url = f"sqlite:///{path}"
    if is_known:
        RDBStorage(url)
    with locked_by_a_process(path) as holder:
        assert holder.stdin is not None

        def say(line: str) -> None:
            said.append(line)
            if "waiting" in line:
                holder.stdin.write("go on\n")  # type: ignore[union-attr]

        storage = open_storage(url, tmp_path, patience=Patience(120, say), is_known=is_known)
    assert storage.get_all_studies() == []
    assert "database is locked: waiting until it works again, for at most 2 min" in said[0]
    assert said[1].startswith("it works again after")


@pytest.mark.usefixtures("short_locks")
def test_a_database_that_stays_locked_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "trials.db"
    with locked_by_a_process(path), pytest.raises(OutageError, match="locked") as raised:
        open_storage(f"sqlite:///{path}", tmp_path, patience=Patience(0.5))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("is_known", [False, True])
@pytest.mark.parametrize("where", ["sqlite:////no/such/folder/studies.db", "nothing://here"])
def test_to_a_wrong_url_the_answer_comes_at_once(
    where: str, is_known: bool, tmp_path: Path
) -> None:
    said = list[str]()
    with pytest.raises(OutputError, match=r"The Optuna storage .* can't be opened"):
        open_storage(where, tmp_path, patience=Patience(600, said.append), is_known=is_known)
    assert said == []


class ServerError(Exception):
    """What a server's driver raises."""


@pytest.mark.parametrize(
    ("message", "is_known", "waits"),
    [
        ("FATAL:  the database system is starting up", False, True),
        ("FATAL:  sorry, too many clients already", False, True),
        ("Connection refused", False, False),
        ('could not translate host name "no-such-host" to address', False, False),
        ("Connection refused", True, True),
    ],
)
def test_of_a_server_that_the_study_does_not_know_only_a_busy_one_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, message: str, is_known: bool, waits: bool
) -> None:
    def opened(url: str, **arguments: Any) -> RDBStorage:
        if not said:
            raise OperationalError(message, None, ServerError(message))
        return RDBStorage(f"sqlite:///{tmp_path / 'trials.db'}")

    said = list[str]()
    monkeypatch.setattr(database_module, "RDBStorage", opened)
    patience = Patience(60, said.append)
    if waits:
        open_storage("sqlite:///here.db", tmp_path, patience=patience, is_known=is_known)
        assert message in said[0]
    else:
        with pytest.raises(OutputError, match="can't be opened"):
            open_storage("sqlite:///here.db", tmp_path, patience=patience, is_known=is_known)


def test_a_journal_whose_disk_is_away_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, look = list[str](), trials_module.cut_damage

    def away_once(path: Path) -> Any:
        if not said:
            raise OSError(errno.ESTALE, "Stale file handle")
        return look(path)

    monkeypatch.setattr(trials_module, "cut_damage", away_once)
    storage = open_storage(None, tmp_path, patience=Patience(60, said.append))
    assert storage.get_all_studies() == []
    assert "Stale file handle: waiting" in said[0]


def test_a_remote_study_to_go_on_with_is_waited_for(tmp_path: Path) -> None:
    with stoppable_bucket() as store:
        uri = f"s3://bucket/{tmp_path.name}{store.end}"
        with driver_copy(uri, False, NO_PATIENCE, lambda line: None) as copy:
            (copy.path / "study.json").write_text(f'{{"copy": "{copy.path.name}"}}')
            copy.upload()
        store.stop()
        with (
            pytest.raises(OutageError),
            driver_copy(uri, False, Patience(600), lambda line: None),
        ):
            pass
        said = list[str]()

        def say(line: str) -> None:
            said.append(line)
            if "waiting" in line:
                threading.Thread(target=store.start).start()

        with driver_copy(uri, True, Patience(120, say), lambda line: None) as copy:
            assert (copy.path / "study.json").exists()
        assert "waiting until it works again" in said[0]
