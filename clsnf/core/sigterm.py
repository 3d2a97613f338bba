"""SIGTERM, heeded as Ctrl-C is: Kubernetes, systemd and ``ray job stop`` end a program with it.

The command line calls :func:`heed_sigterm`. Ray puts a handler of its own in place, and
``clsnf/study/cluster.py`` takes it away again.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


class Terminated(KeyboardInterrupt):
    """A SIGTERM came; whatever heeds a Ctrl-C heeds it."""


@dataclass
class Sigterm:
    """Whether a SIGTERM came, also where its exception was caught on the way."""

    came: bool = False


@contextmanager
def heed_sigterm() -> Iterator[Sigterm]:
    """Raise :class:`Terminated` in the block when a SIGTERM comes.

    Off the main thread, which alone gets signals, it changes nothing.

    Raises:
        Terminated: a SIGTERM came.
    """
    sigterm, owner = Sigterm(), os.getpid()

    def handle(number: int, _: Any) -> None:
        if os.getpid() != owner:  # a forked process ends as it would without this handler
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        sigterm.came = True
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield sigterm
        return
    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield sigterm
    finally:
        signal.signal(signal.SIGTERM, before)
