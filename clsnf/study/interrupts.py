"""A Ctrl-C or a SIGTERM during the search takes effect between two of Tune's steps.

Raised anywhere else, KeyboardInterrupt can interrupt the loggers that Tune calls. TensorBoard's
writer, for one, then waits at the end of the process for a thread that never ran.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ray.tune import Callback

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class InterruptCallback(Callback):
    """Tune's callback that heeds a signal after the step in which it came.

    The handler that was there before then raises what it raises: KeyboardInterrupt, or its subclass
    :class:`clsnf.core.sigterm.Terminated`. Where none was there, KeyboardInterrupt is raised.
    """

    def __init__(self) -> None:
        self._came: int | None = None
        self.before: Mapping[int, Any] = {}  # signal -> the handler that was there

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its callbacks; only the driver's has signals to heed."""
        return {"_came": None, "before": {}}

    def handle(self, number: int, *_: Any) -> None:
        """A signal handler; the second signal is heeded at once."""
        again, self._came = self._came is not None, number
        if again:
            self._heed(number)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Tune is between two steps; each takes a tenth of a second."""
        if self._came is not None:
            self._heed(self._came)

    def _heed(self, number: int) -> None:
        handler = self.before.get(number)
        if callable(handler):
            handler(number, None)
        raise KeyboardInterrupt


@contextmanager
def interrupt_between_steps() -> Iterator[InterruptCallback]:
    """Handle SIGINT and SIGTERM while the block runs; give the callback to Tune.

    Off the main thread, which alone gets signals, it changes nothing.

    Raises:
        KeyboardInterrupt: a signal came in the block's last step.
    """
    callback = InterruptCallback()
    if threading.current_thread() is not threading.main_thread():
        yield callback
        return
    callback.before = {number: signal.signal(number, callback.handle) for number in _SIGNALS}
    try:
        yield callback
    finally:
        for number, handler in callback.before.items():
            signal.signal(number, handler)
    callback.on_step_end(0, [])
