"""Leases for workers that share no file system: one small Ray actor keeps them.

The counterpart of :mod:`clsnf.training.leases`, whose leases are files. Here too no clocks of
different machines are compared: the actor's own clock says when a holder last reported.
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
_POLL = 0.2  # seconds between two requests for a lease that another holds


class LeaseTable:
    """Who holds which lease; runs in the actor.

    Args:
        lifetime: seconds without a heartbeat after which others may take a lease.
        clock: seconds that only rise.
    """

    def __init__(
        self, lifetime: float = LIFETIME, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._lifetime, self._clock = lifetime, clock
        self._held: dict[str, tuple[str, float]] = {}  # name -> holder, time of its last heartbeat

    def take(self, name: str, owner: str) -> bool:
        """Take the lease on `name`, or send its holder's heartbeat; False where another has it."""
        holder, heard_at = self._held.get(name, (owner, 0.0))
        if holder != owner and self._clock() - heard_at < self._lifetime:
            return False
        self._held[name] = (owner, self._clock())
        return True

    def free(self, name: str, owner: str) -> None:
        """Give the lease back, unless another took it over meanwhile."""
        if self._held.get(name, ("", 0.0))[0] == owner:
            del self._held[name]


def start_lease_actor(name: str) -> Any:
    """Start the actor that keeps a study's leases; it ends with the handle that is returned."""
    return (
        ray.remote(num_cpus=0)(LeaseTable)
        .options(name=name, namespace=_NAMESPACE, get_if_exists=True)
        .remote()
    )


class ActorLeases:
    """Leases that the actor of this name keeps, for any process of the Ray cluster."""

    def __init__(self, name: str) -> None:
        self._name = name

    @contextmanager
    def hold(self, name: str) -> Iterator[None]:
        """As :meth:`clsnf.training.leases.Leases.hold`."""
        actor = ray.get_actor(self._name, namespace=_NAMESPACE)
        owner = uuid.uuid4().hex
        while not ray.get(actor.take.remote(name, owner)):
            time.sleep(_POLL)

        def send_heartbeat() -> None:
            with suppress(ray.exceptions.RayError):  # the next one may succeed
                ray.get(actor.take.remote(name, owner))

        try:
            with call_periodically(send_heartbeat, HEARTBEAT):
                yield
        finally:
            ray.get(actor.free.remote(name, owner))
