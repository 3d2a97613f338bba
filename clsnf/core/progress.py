"""Progress of long work, reported through a callable: work knows nothing about terminals."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called after every step of long work."""

    def __call__(self, task: str, done: int, total: int) -> None:
        """Report that `done` of `total` steps of `task` are finished; all of them end the task."""


def silent(task: str, done: int, total: int) -> None:
    """Report nothing."""
