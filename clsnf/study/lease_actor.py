"""Leases for workers that share no file system: one small Ray actor keeps them. The counterpart of
:mod:`clsnf.training.leases`.

Nobody compares clocks here either: the actor's own says when a holder was last heard of.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray

from clsnf.core.periodic import call_periodically
from clsnf.training.leases import HEARTBEAT, LIFETIME

_NAMESPACE = "clsnf"
_POLL = 0.2  # seconds between looks at somebody else's lease


class LeaseBook:
    """Who holds which lease.

    Args:
        lifetime: seconds without a sign of life after which a lease is free for others.
        clock: seconds that only rise.
    """

    def __init__(
        self, lifetime: float = LIFETIME, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._lifetime, self._clock = lifetime, clock
        self._held: dict[str, tuple[str, float]] = {}

    def take(self, name: str, owner: str) -> bool:
        """Take the lease on `name`, or give a sign of life of who has it already; False where
        another holds it.
        """
        holder, heard = self._held.get(name, (owner, 0.0))
        if holder != owner and self._clock() - heard < self._lifetime:
            return False
        self._held[name] = (owner, self._clock())
        return True

    def free(self, name: str, owner: str) -> None:
        """Give the lease back, unless another took it over meanwhile."""
        if self._held.get(name, ("", 0.0))[0] == owner:
            del self._held[name]


def open_book(name: str) -> Any:
    """Start the actor that keeps a study's leases; it ends with the handle that this returns."""
    return (
        ray.remote(num_cpus=0)(LeaseBook)
        .options(name=name, namespace=_NAMESPACE, get_if_exists=True)
        .remote()
    )


class BookedLeases:
    """Leases that the book of this name keeps, for any process of the Ray cluster."""

    def __init__(self, name: str) -> None:
        self._name = name

    @contextmanager
    def hold(self, name: str) -> Iterator[None]:
        """As :meth:`clsnf.training.leases.Leases.hold`."""
        book = ray.get_actor(self._name, namespace=_NAMESPACE)
        owner = uuid.uuid4().hex
        while not ray.get(book.take.remote(name, owner)):
            time.sleep(_POLL)

        def beat() -> None:
            with suppress(ray.exceptions.RayError):  # the next beat may succeed
                ray.get(book.take.remote(name, owner))

        try:
            with call_periodically(beat, HEARTBEAT):
                yield
        finally:
            ray.get(book.free.remote(name, owner))
