"""A Ctrl-C during the search is heeded between two of Tune's steps.

Raised just anywhere, it can leave the loggers that Tune calls in the middle of something:
TensorBoard's writer, for one, then waits at the end of the process for a thread that never ran.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray.tune import Callback


class Interrupts(Callback):
    """Tune's callback that raises KeyboardInterrupt where :meth:`note` was told of one."""

    def __init__(self) -> None:
        self._noted = False

    def note(self, *_: Any) -> None:
        """A signal handler. A second signal raises at once: whoever sends it does not want to wait."""
        if self._noted:
            raise KeyboardInterrupt
        self._noted = True

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Tune is between two steps, which take a tenth of a second each."""
        if self._noted:
            raise KeyboardInterrupt


@contextmanager
def heeded_between_steps() -> Iterator[Interrupts]:
    """Take SIGINT for the length of the block; give the callback to Tune. Off the main thread,
    which gets no signals, it changes nothing.

    Raises:
        KeyboardInterrupt: the block ended with an interrupt noted.
    """
    interrupts = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    before = signal.signal(signal.SIGINT, interrupts.note)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before)
    interrupts.on_step_end(0, [])
