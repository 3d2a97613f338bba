"""Something done every few seconds beside a block, such as a sign of life."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def repeated(call: Callable[[], None], every: float) -> Iterator[None]:
    """Call `call` every `every` seconds, in a thread, while the block runs; never after it. What
    `call` raises ends the repeating.
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
