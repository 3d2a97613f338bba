"""Brings results from the disk to one output, in order, for as long as it takes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from clsnf.core.errors import OutageError
from clsnf.core.patience import NEVER_TIRED, Patience
from clsnf.watching.output import Output, RefusedError
from clsnf.watching.state import Numbered, State

_LOOK = 0.5  # seconds between two looks, should a notice be missed


class Courier:
    """The thread of one output.

    Args:
        name: of the output.
        output: gets the results.
        state: has them.
        say: gets a line when the output is away and when it is back, and for what it refuses.

    Attributes:
        refused: results that the receiver did not take.
    """

    def __init__(self, name: str, output: Output, state: State, say: Callable[[str], None]) -> None:
        self.name, self._output, self._state = name, output, state
        self._say = lambda line: say(f"{name}: {line}")
        self.refused = 0
        self._patience = Patience(NEVER_TIRED, self._say)
        self._away, self._ending = False, False
        self._thread = threading.Thread(target=self._run, name=f"courier {name}", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def finish(self, seconds: float) -> None:
        """Deliver what waits within so many seconds; what does not arrive stays on the disk."""
        self._ending = True
        with self._state.changed:
            self._state.changed.notify_all()
        until = time.monotonic() + seconds
        while self._thread.is_alive() and time.monotonic() < until and not self._away:
            self._thread.join(0.05)
        self._patience.over.set()
        self._thread.join(max(0.0, until - time.monotonic()))

    def _run(self) -> None:
        while not self._patience.over.is_set():
            ending = self._ending  # asked first: what comes before the end is found after it
            try:
                found = self._patience.wait_for(self._next)
            except OutageError:
                return
            if found:
                if not self._deliver(found):
                    return
            elif ending:
                return
            else:
                with self._state.changed:
                    self._state.changed.wait(_LOOK)

    def _next(self) -> list[Numbered]:
        return self._state.next_for(self.name, self._output.batch)

    def _deliver(self, found: list[Numbered]) -> bool:
        """Deliver and confirm results; False where the watch ends before."""
        results = [result for _, result in found]
        numbers = [n for n, _ in found]

        def deliver() -> None:
            try:
                self._output.deliver(results)
            except OutageError:
                self._away = True
                raise
            self._away = False

        try:
            try:
                self._patience.wait_for(deliver)
            except RefusedError as error:
                self._refuse(len(results), str(error))
            except OutageError:
                return False
            # A receiver that breaks in a way nobody thought of must not hold up those behind it.
            except Exception as error:
                self._refuse(len(results), repr(error))
            self._patience.wait_for(lambda: self._state.confirm(self.name, numbers))
            if self._output.takes_files:
                self._patience.wait_for(lambda: self._state.forget([r.source for r in results]))
        except OutageError:
            return False
        return True

    def _refuse(self, number: int, cause: str) -> None:
        self._away = False
        self.refused += number
        self._say(f"{cause}: left out, the heartbeat counts it")
