"""How long work tells that it moves: one callable, so that no part below the doors knows about
terminals.
"""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told about every step of long work."""

    def __call__(self, task: str, done: int, total: int) -> None:
        """`done` of `total` steps of `task` are finished; ``done == total`` ends the task."""


def silent(task: str, done: int, total: int) -> None:
    """Tell nobody."""
