"""The search pauses while something that trials need is away.

A trial that met a full disk, an absent store or a dead service says nothing about its point of the
space. It is no trial: it goes back to be run. Until the outage is over, one trial at a time tries
whether it is, and the others wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from clsnf.core.durations import duration

_FIRST, _MOST = 2.0, 60.0  # seconds between two attempts: they double from the first to the most


class Pause:
    """Whether trials may begin.

    Args:
        seconds: how long an outage may last.
        say: gets a line when an outage begins, and one when it is over.
        has_room: whether the disk of the study has room for a trial.
        clock: seconds that only rise.
    """

    def __init__(
        self,
        seconds: float,
        say: Callable[[str], None] = lambda line: None,
        has_room: Callable[[], bool] = lambda: True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._seconds, self._say, self._has_room, self._clock = seconds, say, has_room, clock
        self._cause: str | None = None
        self._began = self._next = 0.0
        self._wait = _FIRST

    @property
    def is_on(self) -> bool:
        """Whether there is an outage."""
        return self._cause is not None

    def given_up(self, running: int) -> str | None:
        """The cause of an outage that lasted too long; None while a trial runs and may end it."""
        return self._cause if not running and self._clock() - self._began > self._seconds else None

    def begin(self, what: str, cause: str) -> None:
        """A trial met an outage.

        Args:
            what: names the trial, for people.
            cause: of the outage.
        """
        now = self._clock()
        if self._cause is None:
            self._began, self._wait = now, _FIRST
            self._say(
                f"{what}: {cause.rstrip('.')}: trials wait until that is mended, for at most "
                f"{duration(self._seconds)}"
            )
        self._cause = cause
        self._next = now + self._wait
        self._wait = min(2 * self._wait, _MOST)

    def end(self) -> None:
        """A trial ended without an outage."""
        if self._cause is not None:
            self._say(f"trials go on after {duration(self._clock() - self._began)}")
        self._cause = None

    def may_begin(self, running: int) -> bool:
        """Whether a trial may begin; in an outage only one at a time, after some seconds.

        Args:
            running: number of trials that run.
        """
        if self._cause is None:
            return True
        return not running and self._clock() >= self._next and self._has_room()
