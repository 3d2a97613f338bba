"""How a study shows that it moves: workers note their progress in small files, the driver reads
them.

Files work across processes, nodes with a shared file system, and restarts; a line that gets lost
costs nothing.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from clsnf.core.periodic import call_periodically

_FOLDER = ".progress"
_WRITE_EVERY = 0.5  # seconds
_OLD = 120.0  # seconds after which a note says nothing any more


class FileProgress:
    """A :class:`clsnf.core.progress.Progress` that notes where this process is, at most twice a
    second.
    """

    def __init__(self, out: Path, category: str) -> None:
        self._file = out / _FOLDER / f"{category}.{os.getpid()}.json"
        self._category = category
        self._last = 0.0

    def __call__(self, task: str, done: int, total: int) -> None:
        now = time.time()
        if done >= total:
            with suppress(OSError):
                self._file.unlink(missing_ok=True)
            return
        if now - self._last < _WRITE_EVERY:
            return
        self._last = now
        with suppress(OSError):  # a note that can't be written must not end a training
            self._file.parent.mkdir(exist_ok=True)
            draft = self._file.with_suffix(f".{os.getpid()}.part")
            draft.write_text(
                json.dumps(
                    {
                        "category": self._category,
                        "task": task,
                        "done": done,
                        "total": total,
                        "at": now,
                    }
                )
            )
            draft.replace(self._file)


def read_notes(out: Path) -> list[dict[str, object]]:
    """What the workers noted lately."""
    notes = []
    for file in sorted((out / _FOLDER).glob("*.json")):
        with suppress(OSError, ValueError):
            note = json.loads(file.read_text())
            if time.time() - note["at"] < _OLD:
                notes.append(note)
    return notes


@contextmanager
def notes_shown(
    out: Path, show: Callable[[list[dict[str, object]]], None], every: float = 1.0
) -> Iterator[None]:
    """Hands the workers' notes to `show`, again and again, while the block runs."""
    with call_periodically(lambda: show(read_notes(out)), every):
        yield
