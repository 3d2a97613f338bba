"""One driver at a time for a study whose folder is remote.

A lock on this machine does not stop a driver on another one, and an object store has no locks. So
the driver keeps a lease in the folder itself: ``driver.json`` names its process, and a count in it
rises every few seconds. As with :mod:`clsnf.training.leases`, no clocks of different machines are
compared: a lease is free when its count has not changed for its lifetime, by the clock of the one
who waits, or when its owner ran on this machine and has ended.

Of two drivers that write at the same moment, the one that wrote last is the owner: each reads the
lease once more before it begins, and again before every heartbeat. A driver that finds another
owner there hands out no more trials and changes nothing in the folder any more.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from clsnf.core.errors import OutageError, OutputError
from clsnf.core.periodic import call_periodically
from clsnf.core.remote import RemoteFolder
from clsnf.core.uris import without_secrets
from clsnf.training.leases import HEARTBEAT, LIFETIME, Owner, owner_of, sign, this_process

DRIVER = "driver.json"
_SETTLE = 1.0  # seconds after which the owner of a lease that was just written is certain


class DriverLease:
    """The lease on a remote study.

    Args:
        remote: the study's folder.
        say: gets a line where an owner that may have ended is waited for.
        heartbeat, lifetime: seconds; the lifetime must be several heartbeats.

    Attributes:
        is_lost: whether another driver took the lease over.
    """

    def __init__(
        self,
        remote: RemoteFolder,
        say: Callable[[str], None] = lambda line: None,
        heartbeat: float = HEARTBEAT,
        lifetime: float = LIFETIME,
    ) -> None:
        self._remote, self._say = remote, say
        self._heartbeat, self._lifetime = heartbeat, lifetime
        self._owner = this_process()
        self.is_lost = False

    @contextmanager
    def hold(self) -> Iterator[DriverLease]:
        """Hold the lease while the block runs.

        Raises:
            OutputError: another driver holds it.
            OutageError: the folder can't be read or written.
        """
        self._take()
        counts = itertools.count(1)
        try:
            with call_periodically(lambda: self._beat(next(counts)), self._heartbeat):
                yield self
        finally:
            with suppress(OutageError):  # it is free when its lifetime is over
                if self._is_mine(self._read()):
                    self._remote.delete(DRIVER)

    def _take(self) -> None:
        content = self._read()
        if content and not self._is_free(content):
            self._wait_for_silence(content)
        self._remote.write(DRIVER, sign(self._owner, 0).encode())
        time.sleep(_SETTLE)
        content = self._read()
        if not self._is_mine(content):
            raise self._in_use(owner_of(content))

    def _wait_for_silence(self, content: str) -> None:
        """Wait until the owner has been silent for a lifetime.

        Raises:
            OutputError: it was heard.
        """
        self._say(
            f"{without_secrets(self._remote.uri)} has a driver, on {_machine_of(content)}: waiting "
            f"for {self._lifetime:.0f} s to see whether it still runs"
        )
        until = time.monotonic() + self._lifetime
        while time.monotonic() < until:
            time.sleep(self._heartbeat / 5)
            now = self._read()
            if not now or self._is_free(now):
                return
            if now != content:
                raise self._in_use(owner_of(now))

    def _in_use(self, owner: Owner | None) -> OutputError:
        where = "" if owner is None else f" (process {owner.pid} on {owner.machine.split()[0]})"
        return OutputError(
            f"{without_secrets(self._remote.uri)} is in use by another study right now{where}: "
            "choose another --out."
        )

    def _read(self) -> str:
        return (self._remote.read(DRIVER) or b"").decode(errors="replace")

    def _is_free(self, content: str) -> bool:
        owner = owner_of(content)
        return owner is not None and owner.is_gone()

    def _is_mine(self, content: str) -> bool:
        return owner_of(content) == self._owner

    def _beat(self, count: int) -> None:
        with suppress(OutageError):  # the next heartbeat may succeed
            content = self._read()
            if self.is_lost or (content and not self._is_mine(content)):
                self.is_lost = True
            else:
                self._remote.write(DRIVER, sign(self._owner, count).encode())


def _machine_of(content: str) -> str:
    owner = owner_of(content)
    return "an unknown machine" if owner is None else owner.machine.split()[0]
