"""Leases and notes of workers that share no file system: one small Ray actor keeps them.

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
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from clsnf.core.errors import OutageError
from clsnf.core.patience import NO_PATIENCE, Patience
from clsnf.core.periodic import call_periodically
from clsnf.training.leases import HEARTBEAT, LIFETIME

_NAMESPACE = "clsnf"
_ANSWER = 30.0  # seconds in which the actor answers, unless its machine is away
_POLL = 0.2  # seconds between two requests for a lease that another holds


class LeaseTable:
    """Who holds which lease, and the workers' notes; runs in the actor.

    Args:
        lifetime: seconds without a heartbeat after which others may take a lease.
        clock: seconds that only rise.
    """

    def __init__(
        self, lifetime: float = LIFETIME, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._lifetime, self._clock = lifetime, clock
        self._held: dict[str, tuple[str, float]] = {}  # name -> holder, time of its last heartbeat
        self._notes: dict[str, str] = {}

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

    def write_note(self, name: str, text: str | None) -> None:
        """Keep a note; delete it where `text` is None."""
        self._notes.pop(name, None)
        if text is not None:
            self._notes[name] = text

    def notes(self) -> dict[str, str]:
        """All notes by their names."""
        return self._notes


def start_lease_actor(name: str) -> Any:
    """Start the actor that keeps a study's leases; it ends with the handle that is returned.

    It lives on the driver's node, without which there is no study. Where its process dies, Ray
    begins it again, with an empty table: the next heartbeat of each holder enters its lease again.
    Until then another process may take the lease too. Both then store the same artifact.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return (
        ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(LeaseTable)
        .options(name=name, namespace=_NAMESPACE, get_if_exists=True, scheduling_strategy=here)
        .remote()
    )


class ActorLeases:
    """Leases that the actor of this name keeps, for any process of the Ray cluster.

    Args:
        name: of the actor.
        patience: with an actor that does not answer.
    """

    def __init__(self, name: str, patience: Patience = NO_PATIENCE) -> None:
        self._name, self._patience = name, patience

    def _call(self, method: str, name: str, owner: str) -> bool:
        """Call a method of the actor.

        Raises:
            OutageError: it does not answer.
        """
        try:
            actor = ray.get_actor(self._name, namespace=_NAMESPACE)
            return bool(ray.get(getattr(actor, method).remote(name, owner), timeout=_ANSWER))
        except (ray.exceptions.RayError, ValueError) as error:
            raise OutageError(
                f"The process that keeps the study's leases does not answer "
                f"({type(error).__name__}): is the driver's machine reachable?"
            ) from error

    @contextmanager
    def hold(self, name: str) -> Iterator[None]:
        """As :meth:`clsnf.training.leases.Leases.hold`.

        Raises:
            OutageError: the actor does not answer.
        """
        owner = uuid.uuid4().hex
        while not self._patience.wait_for(lambda: self._call("take", name, owner)):
            time.sleep(_POLL)

        def send_heartbeat() -> None:
            with suppress(OutageError):  # the next one may succeed
                self._call("take", name, owner)

        try:
            with call_periodically(send_heartbeat, HEARTBEAT):
                yield
        finally:
            with suppress(OutageError):  # it is free when its lifetime is over
                self._call("free", name, owner)


class ActorNotes:
    """Notes that the actor of this name keeps; see :class:`clsnf.study.progress_notes.Notes`."""

    def __init__(self, name: str) -> None:
        self._name = name

    def _actor(self) -> Any:
        return ray.get_actor(self._name, namespace=_NAMESPACE)

    def write(self, name: str, text: str) -> None:
        """Write a note; it replaces the one of this name."""
        with suppress(ray.exceptions.RayError, ValueError):
            self._actor().write_note.remote(name, text)

    def delete(self, name: str) -> None:
        """Delete a note, if it is there."""
        with suppress(ray.exceptions.RayError, ValueError):
            self._actor().write_note.remote(name, None)

    def read(self) -> dict[str, str]:
        """All notes by their names."""
        with suppress(ray.exceptions.RayError, ValueError):
            found: dict[str, str] = ray.get(self._actor().notes.remote(), timeout=_ANSWER)
            return found
        return {}
