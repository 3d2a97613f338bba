"""What processes that were really killed leave of a journal: a torn last line, and a lock."""

import errno
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from optuna import create_study, load_study
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import create_trial

from clsnf.core.errors import OutageError
from clsnf.core.journal import (
    PatientJournal,
    WholeRecords,
    cut_damage,
    find_damage,
    remove_stale_lock,
)
from clsnf.core.patience import Patience

# Killed by the system in the midst of a record, because its file may not grow further.
KILLED = """
import resource, signal, sys
from pathlib import Path
from optuna import create_study
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

study = create_study(storage=JournalStorage(JournalFileBackend(sys.argv[1])), study_name="gear")
study.ask()
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
size = Path(sys.argv[1]).stat().st_size + 20
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
study.set_user_attr("a long name", "a long value")
"""


def left_by_a_killed_process(folder: Path) -> Path:
    folder.mkdir()
    journal = folder / "optuna.journal"
    ended = subprocess.run([sys.executable, "-c", KILLED, journal], timeout=120, check=False)
    assert ended.returncode < 0
    assert journal.with_name("optuna.journal.lock").is_symlink()
    assert not journal.read_bytes().endswith(b"\n")
    return journal


def test_a_torn_last_line_is_cut_and_kept_and_the_journal_grows_on(tmp_path: Path) -> None:
    journal = left_by_a_killed_process(tmp_path / "study")
    before = journal.read_bytes()
    torn = before.rpartition(b"\n")[2]
    assert remove_stale_lock(journal, grace=0.2)
    cut = cut_damage(journal)
    assert cut is not None
    damage, aside = cut
    assert (damage.begins, damage.size, damage.lines) == (len(before) - 20, 20, 1)
    assert str(damage) == "1 line, 20 bytes"
    assert aside.read_bytes() == torn
    assert journal.read_bytes() + torn == before
    assert find_damage(journal) is None
    assert cut_damage(journal) is None
    study = load_study(study_name="gear", storage=JournalStorage(JournalFileBackend(str(journal))))
    study.set_user_attr("more", 1)
    assert load_study(study_name="gear", storage=study._storage).user_attrs == {"more": 1}


@pytest.mark.parametrize(
    "tail",
    [
        b'{"op_code":2,"study_na{"op_code":2,"study_id":0,"user_attr":{}}\n{"op_code":2}\n',
        b"\0" * 512,
        b"\xff\xfe\n",
        b"null\n",
        b"{}\n",
    ],
    ids=["appended to a torn line", "zeros after a power cut", "no text", "null", "no record"],
)
def test_nothing_after_the_first_line_that_is_no_record_is_read(
    tmp_path: Path, tail: bytes
) -> None:
    journal = tmp_path / "optuna.journal"
    create_study(storage=JournalStorage(JournalFileBackend(str(journal))), study_name="gear")
    whole = journal.read_bytes()
    journal.write_bytes(whole + tail)
    assert list(WholeRecords(journal).read_logs(0)) == [
        json.loads(line) for line in whole.splitlines()
    ]
    assert list(WholeRecords(journal).read_logs(1)) == []
    cut = cut_damage(journal)
    assert cut is not None
    assert journal.read_bytes() == whole
    assert cut[1].read_bytes() == tail


def test_a_whole_journal_and_a_missing_one_are_left_alone(tmp_path: Path) -> None:
    journal = tmp_path / "optuna.journal"
    assert cut_damage(journal) is None
    assert not remove_stale_lock(journal, grace=0.0)
    create_study(storage=JournalStorage(JournalFileBackend(str(journal))))
    before = journal.read_bytes()
    assert cut_damage(journal) is None
    assert journal.read_bytes() == before
    assert list(tmp_path.iterdir()) == [journal]


def test_a_record_that_another_process_is_writing_is_not_cut(tmp_path: Path) -> None:
    journal = tmp_path / "optuna.journal"
    create_study(storage=JournalStorage(JournalFileBackend(str(journal))))
    whole = journal.read_bytes()
    lock = JournalFileSymlinkLock(str(journal))
    lock.acquire()
    journal.write_bytes(whole + whole[:20])
    found = []
    waiting = threading.Thread(target=lambda: found.append(cut_damage(journal)))
    waiting.start()
    with journal.open("ab") as file:
        file.write(whole[20:])
    lock.release()
    waiting.join(30)
    assert found == [None]
    assert journal.read_bytes() == whole + whole


def test_the_lock_of_a_moved_journal_is_removed_and_one_that_is_used_is_not(tmp_path: Path) -> None:
    left_by_a_killed_process(tmp_path / "study")
    (tmp_path / "study").rename(tmp_path / "moved")
    journal = tmp_path / "moved" / "optuna.journal"
    assert not journal.with_name("optuna.journal.lock").exists(), "it points to the old place"
    assert remove_stale_lock(journal, grace=0.2)
    assert sorted(p.name for p in journal.parent.iterdir()) == ["optuna.journal"]

    ended = threading.Event()

    def use() -> None:
        lock = JournalFileSymlinkLock(str(journal))
        while not ended.is_set():
            lock.acquire()
            time.sleep(0.01)
            lock.release()

    using = threading.Thread(target=use)
    using.start()
    try:
        assert not remove_stale_lock(journal, grace=1.0)
    finally:
        ended.set()
        using.join(30)


def test_a_trial_reaches_the_disk_when_it_begins_and_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attributes wait for the trial's end: each wait for the disk takes milliseconds."""
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    storage = JournalStorage(PatientJournal(tmp_path / "journal"))
    study = create_study(storage=storage)
    before = len(synced)
    trial = study.ask()
    begun = len(synced)
    for number in range(20):
        trial.set_user_attr(f"metric {number}", 0.5)
    assert len(synced) == begun > before
    study.tell(trial, 0.5)
    assert len(synced) == begun + 1


def test_a_record_that_does_not_fit_leaves_the_journal_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "journal"
    study = create_study(storage=JournalStorage(PatientJournal(path)))
    whole = path.read_bytes()
    failed: list[int] = []

    def full(file: int) -> None:
        if not failed:
            failed.append(file)
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutageError, match="No space left"):
        study.add_trial(create_trial(value=0.5))
    assert path.read_bytes() == whole
    patient = create_study(
        storage=JournalStorage(PatientJournal(path, Patience(60))), study_name="other"
    )
    failed.clear()
    patient.add_trial(create_trial(value=0.5))
    assert [t.value for t in patient.trials] == [0.5], "waited for, and written once"
    assert find_damage(path) is None
