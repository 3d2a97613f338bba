"""A Ctrl-C during the search takes effect between two of Tune's steps.

Raised anywhere else, KeyboardInterrupt can interrupt the loggers that Tune calls. TensorBoard's
writer, for one, then waits at the end of the process for a thread that never ran.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray.tune import Callback


class InterruptCallback(Callback):
    """Tune's callback that raises KeyboardInterrupt after a step in which a signal came."""

    def __init__(self) -> None:
        self._interrupted = False

    def handle(self, *_: Any) -> None:
        """A signal handler; the second signal raises at once."""
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Tune is between two steps; each takes a tenth of a second."""
        if self._interrupted:
            raise KeyboardInterrupt


@contextmanager
def interrupt_between_steps() -> Iterator[InterruptCallback]:
    """Handle SIGINT while the block runs; give the callback to Tune.

    Off the main thread, which alone gets signals, it changes nothing.

    Raises:
        KeyboardInterrupt: a signal came in the block's last step.
    """
    callback = InterruptCallback()
    if threading.current_thread() is not threading.main_thread():
        yield callback
        return
    before = signal.signal(signal.SIGINT, callback.handle)
    try:
        yield callback
    finally:
        signal.signal(signal.SIGINT, before)
    callback.on_step_end(0, [])
