"""How workers show what they do: each writes small notes, and the driver reads all of them.

Where the machines share the study's folder, a note is a file. That works across processes, across
nodes, and after a restart. Where they share none, the actor that keeps the leases keeps the notes.
A note that gets lost costs nothing.

There are two kinds. A progress note says how far a task is. A process note says which process runs
a trial, so that :mod:`clsnf.study.hang_watch` can end it.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from pydantic import TypeAdapter

from clsnf.core.periodic import call_periodically

_FOLDER = ".progress"
_PROCESS = "trial."  # how the name of a process note begins
_WRITE_EVERY = 0.5  # seconds
_MAX_AGE = 120.0  # seconds after which a progress note is out of date


class Notes(Protocol):
    """Where notes are. No method raises."""

    def write(self, name: str, text: str) -> None:
        """Write a note; it replaces the one of this name."""

    def delete(self, name: str) -> None:
        """Delete a note, if it is there."""

    def read(self) -> dict[str, str]:
        """All notes by their names."""


class FileNotes:
    """Notes as files.

    Args:
        out: the study's folder. Where it is missing, notes are lost.
    """

    def __init__(self, out: Path) -> None:
        self._folder = out / _FOLDER

    def write(self, name: str, text: str) -> None:
        """Write a note; it replaces the one of this name."""
        with suppress(OSError):
            self._folder.mkdir(exist_ok=True)
            draft = self._folder / f".{name}.{os.getpid()}.part"
            draft.write_text(text)
            draft.replace(self._folder / f"{name}.json")

    def delete(self, name: str) -> None:
        """Delete a note, if it is there."""
        with suppress(OSError):
            (self._folder / f"{name}.json").unlink(missing_ok=True)

    def read(self) -> dict[str, str]:
        """All notes by their names."""
        found = {}
        for file in sorted(self._folder.glob("[!.]*.json")):
            with suppress(OSError):
                found[file.name.removesuffix(".json")] = file.read_text(errors="replace")
        return found


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


_PROGRESS = TypeAdapter(ProgressNote)


def this_process() -> str:
    """A name of this process that no other process of the cluster has."""
    return f"{socket.gethostname()}-{os.getpid()}"


class NotedProgress:
    """A :class:`clsnf.core.progress.Progress` that writes a note, at most twice a second.

    Args:
        notes: where.
        category: that this process works on.
    """

    def __init__(self, notes: Notes, category: str) -> None:
        self._notes, self._category = notes, category
        self._written_at = 0.0

    def __call__(self, task: str, done: int, total: int) -> None:
        now = time.time()
        name = f"{self._category}.{this_process()}"
        if done >= total:
            self._notes.delete(name)
        elif now - self._written_at >= _WRITE_EVERY:
            self._written_at = now
            note = ProgressNote(self._category, task, done, total, now)
            self._notes.write(name, json.dumps(asdict(note)))


def progress_notes(notes: Notes) -> list[ProgressNote]:
    """The workers' progress notes of the last two minutes."""
    found = []
    for name, text in notes.read().items():
        if not name.startswith(_PROCESS):
            with suppress(ValueError):  # pydantic's errors are ValueErrors
                note = _PROGRESS.validate_json(text)
                if time.time() - note.at < _MAX_AGE:
                    found.append(note)
    return found


@contextmanager
def report_notes(
    notes: Notes, report: Callable[[list[ProgressNote]], None], every: float = 1.0
) -> Iterator[None]:
    """Call `report` with the workers' progress every `every` seconds while the block runs."""
    with call_periodically(lambda: report(progress_notes(notes)), every):
        yield


@dataclass(frozen=True)
class TrialProcess:
    """The process that runs a trial.

    Attributes:
        node: Ray's id of its node.
        pid: its number there.
        name: as :func:`this_process` gives it.
    """

    node: str
    pid: int
    name: str


_TRIAL = TypeAdapter(TrialProcess)


def note_process(notes: Notes, trial_id: str, node: str) -> None:
    """Note that this process, on a node, runs the trial with this id of Tune's."""
    process = TrialProcess(node, os.getpid(), this_process())
    notes.write(f"{_PROCESS}{trial_id}", json.dumps(asdict(process)))


@dataclass(frozen=True)
class TrialSign:
    """What is known of a trial that runs; it changes as long as its process works.

    Attributes:
        process: that runs it.
        progress: the texts of the process's progress notes, by their names.
    """

    process: TrialProcess
    progress: dict[str, str]


def trial_signs(notes: Notes) -> dict[str, TrialSign]:
    """What is known of the trials that run, by their ids."""
    texts = notes.read()
    found = {}
    for name, text in texts.items():
        if name.startswith(_PROCESS):
            with suppress(ValueError):
                process = _TRIAL.validate_json(text)
                own = {n: t for n, t in texts.items() if n.endswith(f".{process.name}")}
                found[name.removeprefix(_PROCESS)] = TrialSign(process, own)
    return found


def forget_process(notes: Notes, trial_id: str) -> None:
    """Delete the note about a trial's process."""
    notes.delete(f"{_PROCESS}{trial_id}")
