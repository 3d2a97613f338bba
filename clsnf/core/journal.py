"""An Optuna journal as a file, and what a killed process leaves of it.

A journal is lines of JSON, one for each record, and only grows. A process that is killed while it
writes leaves a torn last line, and its lock ``<journal>.lock`` beside it. Optuna appends to the
torn line and can't read the result, and waits for ever for the lock where the journal was moved
meanwhile, because the lock is a link to where the journal was.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

from optuna.storages.journal import (
    BaseJournalBackend,
    JournalFileBackend,
    JournalFileSymlinkLock,
)
from optuna.storages.journal._storage import JournalOperation

from clsnf.core.patience import NO_PATIENCE, Patience

# Records that a trial writes before its end: what makes the end last on the disk, makes them last.
_TOLD_LATER = {
    JournalOperation.SET_TRIAL_INTERMEDIATE_VALUE,
    JournalOperation.SET_TRIAL_USER_ATTR,
    JournalOperation.SET_TRIAL_SYSTEM_ATTR,
}
_POLL = 0.05  # seconds between two looks at a lock


@dataclass(frozen=True)
class JournalDamage:
    """What follows a journal's last whole record.

    Attributes:
        begins: byte at which it begins.
        size: number of bytes.
        lines: number of lines, whole and torn.
    """

    begins: int
    size: int
    lines: int

    def __str__(self) -> str:
        lines = "1 line" if self.lines == 1 else f"{self.lines} lines"
        return f"{lines}, {self.size} bytes"


class PatientJournal(JournalFileBackend):
    """A journal whose records are written whole or not at all, also on a disk that is full.

    Args:
        path: the journal; made where it is missing.
        patience: with outages of its disk.

    Raises:
        OSError: it can't be made. Its methods raise that too, and an OutageError after an outage
            that lasted too long.
    """

    def __init__(self, path: Path, patience: Patience = NO_PATIENCE) -> None:
        self._path, self._patience = path, patience
        super().__init__(str(path))

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        """The records from this number on."""
        read = super().read_logs
        yield from self._patience.wait_for(lambda: list(read(log_number_from)))

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Write records."""
        text = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        must_last = any(log["op_code"] not in _TOLD_LATER for log in logs)
        self._patience.wait_for(lambda: self._append(text.encode(), must_last))

    def _append(self, content: bytes, must_last: bool) -> None:
        self._lock.acquire()
        try:
            with self._path.open("ab") as file:
                size = file.tell()
                try:
                    file.write(content)
                    file.flush()
                    if must_last:
                        os.fsync(file.fileno())
                except OSError:
                    os.ftruncate(file.fileno(), size)  # needs no room
                    raise
        finally:
            self._lock.release()


class WholeRecords(BaseJournalBackend):
    """A journal up to its last whole record, to read only; no lock is needed and no file made."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """The records from this number on. Raises OSError."""
        with self._path.open("rb") as file:
            whole = takewhile(lambda record: record is not None, map(_record, file))
            yield from islice(whole, log_number_from, None)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Nothing is written. Raises NotImplementedError."""
        raise NotImplementedError(f"{self._path} was opened to read it only")


def _record(line: bytes) -> dict[str, Any] | None:
    """A line's record; None where it is not whole."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "op_code" in record else None


def find_damage(journal: Path) -> JournalDamage | None:
    """What follows the last whole record of a journal, or of one that is missing. Raises OSError.

    While another process writes, this may be the record that it is writing.
    """
    begins = size = lines = 0
    with suppress(FileNotFoundError), journal.open("rb") as file:
        for line in file:
            if lines or _record(line) is None:
                size, lines = size + len(line), lines + 1
            else:
                begins += len(line)
    return JournalDamage(begins, size, lines) if lines else None


def cut_damage(journal: Path) -> tuple[JournalDamage, Path] | None:
    """Cut a journal after its last whole record.

    What is cut off is appended to a file beside the journal first. Nothing is cut while another
    process writes.

    Returns:
        What was cut off, and where it lies now; None where the journal is whole.

    Raises:
        OSError: a file can't be read or written.
    """
    if find_damage(journal) is None:
        return None
    aside = journal.with_name(f"{journal.name}.torn")
    lock = JournalFileSymlinkLock(str(journal))
    lock.acquire()
    try:
        damage = find_damage(journal)  # another process may have finished its record meanwhile
        if damage is None:
            return None
        with journal.open("r+b") as file:
            file.seek(damage.begins)
            with aside.open("ab") as kept:
                kept.write(file.read())
                kept.flush()
                os.fsync(kept.fileno())
            file.truncate(damage.begins)
            os.fsync(file.fileno())
        return damage, aside
    finally:
        lock.release()


def remove_stale_lock(journal: Path, grace: float) -> bool:
    """Remove a journal's lock that a killed process left.

    A process that lives holds the lock for milliseconds.

    Args:
        journal: the journal.
        grace: seconds for which the lock must not change.

    Returns:
        Whether a lock was removed.

    Raises:
        OSError: it can't be removed.
    """
    lock = journal.with_name(f"{journal.name}.lock")
    first = _state_of(lock)
    until = time.monotonic() + grace
    while first is not None and time.monotonic() < until:
        time.sleep(_POLL)
        if _state_of(lock) != first:
            return False
    if first is None:
        return False
    gone = lock.with_name(f"{lock.name}{uuid.uuid4()}.rename")  # as Optuna does
    try:
        lock.rename(gone)  # in one step: of two processes one removes it
    except FileNotFoundError:
        return False
    gone.unlink()
    return True


def _state_of(lock: Path) -> tuple[int, int] | None:
    """What tells a lock from the next one; None where there is none."""
    try:
        found = lock.lstat()  # the lock itself: what it points to may have been moved
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns
