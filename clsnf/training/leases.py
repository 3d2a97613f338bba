"""Leases: which process computes an artifact now. Here by files, for machines that share a folder.

A lease on NAME is a file ``NAME.<generation>``. Only one process can create it, and the creator of
the highest generation holds the lease. The holder writes a new count into the file every few
seconds. No clocks of different machines are compared: a waiting process takes a lease for dead when
the count has not changed for the lifetime of a lease, by its own clock. It then creates the next
generation. On the holder's own machine it looks the holder's process up instead, so a killed
process's lease is free at once. The owner of a damaged lease file is unknown, so its lease is free
when the file has not changed for the lifetime.

There are two kinds of leases, because neither serves every run. Files need a folder that all
machines share, on a file system where only one process can create a file; an object store gives no
such promise. An actor of a Ray cluster (:mod:`clsnf.study.lease_actor`) needs no folder, but
training without Ray, and runs of different clusters on one folder, have no such actor.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

import psutil

from clsnf.core.periodic import call_periodically

HEARTBEAT = 5.0  # seconds between two heartbeats of a holder
LIFETIME = 60.0  # seconds without a heartbeat after which others may take a lease
_POLL = 0.1  # seconds between two reads of a lease that another process holds


@cache
def _machine() -> str:
    """The host and, on Linux, its container's namespace: process numbers are unique within both."""
    space = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()} {os.readlink(space) if space.exists() else ''}"


@dataclass(frozen=True)
class Owner:
    """The process that holds a lease.

    Attributes:
        machine: the host and, on Linux, its container's namespace.
        pid: of the process.
        born: when it began, in seconds since the epoch: a new process may get the number of an
            ended one.
        token: tells the leases of one process apart.
    """

    machine: str
    pid: int
    born: float
    token: str

    def is_gone(self) -> bool:
        """Whether the owner has ended; False if it ran on another machine."""
        if self.machine != _machine():
            return False
        try:
            return abs(psutil.Process(self.pid).create_time() - self.born) > 1.0
        except psutil.NoSuchProcess:
            return True


def this_process() -> Owner:
    """A new owner: this process."""
    return Owner(_machine(), os.getpid(), psutil.Process().create_time(), uuid.uuid4().hex)


class Leases(Protocol):
    """What gives leases."""

    def hold(self, name: str) -> AbstractContextManager[None]:
        """Hold the lease on `name` while the block runs; wait first while another one holds it.

        The block must check whether the work was done meanwhile.
        """


class FileLeases:
    """Leases as files in a folder.

    Args:
        folder: created if it is missing; on a file system that all workers share.
        heartbeat, lifetime: seconds. The lifetime must be several heartbeats, or a busy holder is
            taken for a dead one.
    """

    def __init__(
        self, folder: Path, heartbeat: float = HEARTBEAT, lifetime: float = LIFETIME
    ) -> None:
        self._folder, self._heartbeat, self._lifetime = folder, heartbeat, lifetime

    @contextmanager
    def hold(self, name: str) -> Iterator[None]:
        """Hold the lease on `name` while the block runs; wait first while another one holds it.

        The block must check whether the work was done meanwhile. A holder that sleeps for longer
        than the lifetime (a stopped machine) and another process then do the same work. What they
        store must be equal and appear whole, as artifacts do.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        owner = this_process()
        lease = self._acquire(name, owner)
        counts = itertools.count(1)
        try:
            with call_periodically(lambda: self._beat(lease, owner, next(counts)), self._heartbeat):
                yield
        finally:
            self._release(lease, owner)

    def _acquire(self, name: str, owner: Owner) -> Path:
        seen: tuple[Path, str] | None = None
        seen_at = time.monotonic()
        while True:
            newest = self._newest(name)
            if newest is None:
                generation = 0
            else:
                content = _read(newest)
                if (newest, content) != seen:
                    seen, seen_at = (newest, content), time.monotonic()
                holder = owner_of(content)
                dead = time.monotonic() - seen_at > self._lifetime or (
                    holder is not None and holder.is_gone()
                )
                if not dead:
                    time.sleep(_POLL)
                    continue
                generation = int(newest.suffix[1:]) + 1
            lease = self._folder / f"{name}.{generation}"
            if _create(lease, sign(owner, 0)):
                others = set(self._all(name)) - {lease}
                if others <= {newest}:
                    for dead_one in others:
                        dead_one.unlink(missing_ok=True)
                    return lease
                # Other leases came or went meanwhile. Each process that sees this gives up its
                # own, and all try again.
                lease.unlink(missing_ok=True)
                time.sleep(random.uniform(0, _POLL))

    def _all(self, name: str) -> list[Path]:
        return [path for path in self._folder.glob(f"{name}.*") if path.suffix[1:].isdecimal()]

    def _newest(self, name: str) -> Path | None:
        return max(self._all(name), key=lambda path: int(path.suffix[1:]), default=None)

    def _beat(self, lease: Path, owner: Owner, count: int) -> None:
        with suppress(OSError):  # the next heartbeat may succeed
            if lease.exists():  # else another process took it over
                draft = lease.with_name(f".{lease.name}.part")
                draft.write_text(sign(owner, count))
                draft.replace(lease)

    def _release(self, lease: Path, owner: Owner) -> None:
        with suppress(OSError):
            if owner_of(_read(lease)) == owner:  # else another took it over
                lease.unlink(missing_ok=True)


def sign(owner: Owner, count: int) -> str:
    """What a holder writes at its heartbeat of this number."""
    return json.dumps({"owner": asdict(owner), "count": count})


def owner_of(content: str) -> Owner | None:
    """The owner that a lease names; None where it is damaged."""
    try:
        found = Owner(**json.loads(content)["owner"])
    except (ValueError, KeyError, TypeError):
        return None
    whole = (
        isinstance(found.machine, str)
        and isinstance(found.pid, int)
        and 0 < found.pid < 2**31
        and isinstance(found.born, int | float)
    )
    return found if whole else None


def _create(path: Path, content: str) -> bool:
    """Create a file with its content; False if it exists.

    The file is a link to a finished draft, so no process reads half of it.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.part")
    draft.write_text(content)
    try:
        os.link(draft, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        try:
            with path.open("x") as file:
                file.write(content)
        except FileExistsError:
            return False
    finally:
        draft.unlink(missing_ok=True)
    return True


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
