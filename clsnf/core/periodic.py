"""A function that is called periodically while a block of code runs, such as a heartbeat."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def call_periodically(call: Callable[[], None], every: float) -> Iterator[None]:
    """Call `call` every `every` seconds in a thread while the block runs, and never after it.

    If `call` raises, it is not called again; the block goes on.
    """
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(every):
            call()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
