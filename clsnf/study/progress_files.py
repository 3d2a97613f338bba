"""How workers show their progress: each writes a small file, and the driver reads all of them.

Files work across processes, across nodes with a shared file system, and after a restart. A note
that gets lost costs nothing.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter

from clsnf.core.periodic import call_periodically

_FOLDER = ".progress"
_WRITE_EVERY = 0.5  # seconds
_MAX_AGE = 120.0  # seconds after which a note is out of date


@dataclass(frozen=True)
class ProgressNote:
    """What a worker is doing.

    Attributes:
        category: that it works on.
        task: its name, for people.
        done, total: steps of the task.
        at: when the note was written, in seconds since the epoch.
    """

    category: str
    task: str
    done: int
    total: int
    at: float


_NOTE = TypeAdapter(ProgressNote)


class FileProgress:
    """A :class:`clsnf.core.progress.Progress` that writes a note, at most twice a second."""

    def __init__(self, out: Path, category: str) -> None:
        self._file = out / _FOLDER / f"{category}.{os.getpid()}.json"
        self._category = category
        self._written_at = 0.0

    def __call__(self, task: str, done: int, total: int) -> None:
        now = time.time()
        if done >= total:
            with suppress(OSError):
                self._file.unlink(missing_ok=True)
            return
        if now - self._written_at < _WRITE_EVERY:
            return
        self._written_at = now
        note = ProgressNote(self._category, task, done, total, now)
        with suppress(OSError):  # a note that can't be written must not end a training
            self._file.parent.mkdir(exist_ok=True)
            draft = self._file.with_suffix(f".{os.getpid()}.part")
            draft.write_text(json.dumps(asdict(note)))
            draft.replace(self._file)


def read_notes(out: Path) -> list[ProgressNote]:
    """The workers' notes of the last two minutes."""
    notes = []
    for file in sorted((out / _FOLDER).glob("*.json")):
        with suppress(OSError, ValueError):  # pydantic's errors are ValueErrors
            note = _NOTE.validate_json(file.read_bytes())
            if time.time() - note.at < _MAX_AGE:
                notes.append(note)
    return notes


@contextmanager
def report_notes(
    out: Path, report: Callable[[list[ProgressNote]], None], every: float = 1.0
) -> Iterator[None]:
    """Call `report` with the workers' notes every `every` seconds while the block runs."""
    with call_periodically(lambda: report(read_notes(out)), every):
        yield
