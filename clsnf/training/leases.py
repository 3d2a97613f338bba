"""Leases: who computes a piece of work now, told by files, so that it works across nodes that share
a file system.

A lease on NAME is a file ``NAME.<generation>`` that can be created once only; whoever created the
highest generation holds it. The holder writes a new count into it every few seconds. Unusual:
nobody compares clocks. A waiter calls a lease dead when *its own* clock saw the count stand still
for the lease's lifetime, and takes over by creating the next generation, which again only one can
do. On the holder's own machine its process is looked up instead, so that a killed worker's lease is
free at once.
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
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import psutil

from clsnf.core.periodic import call_periodically

HEARTBEAT = 5.0  # seconds between a holder's signs of life
LIFETIME = 60.0  # seconds without one after which a lease is free for others
_POLL = 0.1  # seconds between looks at somebody else's lease


@cache
def _machine() -> str:
    """Where process numbers mean the same: the host, and on Linux the namespace of a container on
    it.
    """
    space = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()} {os.readlink(space) if space.exists() else ''}"


def _new_owner() -> dict[str, Any]:
    # A number may be given to a new process after the old one's end: the start tells them apart.
    return {
        "machine": _machine(),
        "pid": os.getpid(),
        "born": psutil.Process().create_time(),
        "token": uuid.uuid4().hex,
    }


def _is_gone(owner: dict[str, Any]) -> bool:
    """Whether the owner is known to have ended; False where nobody here can know."""
    if owner.get("machine") != _machine():
        return False
    try:
        return bool(abs(psutil.Process(owner["pid"]).create_time() - owner["born"]) > 1.0)
    except psutil.NoSuchProcess:
        return True


class Holder(Protocol):
    """Whoever hands out leases: by files in a folder, or by other means where workers share none."""

    def hold(self, name: str) -> AbstractContextManager[None]:
        """Hold the lease on `name` for the length of the block; wait for a living holder first."""


class Leases:
    """Leases in a folder.

    Args:
        folder: made where it is missing; on a file system that all workers share.
        heartbeat, lifetime: seconds; the lifetime must be several heartbeats, or a busy holder is
            taken for a dead one.
    """

    def __init__(
        self, folder: Path, heartbeat: float = HEARTBEAT, lifetime: float = LIFETIME
    ) -> None:
        self._folder, self._heartbeat, self._lifetime = folder, heartbeat, lifetime

    @contextmanager
    def hold(self, name: str) -> Iterator[None]:
        """Hold the lease on `name` for the length of the block; wait for a living holder first.

        The block must check whether the work was done meanwhile. A holder that slept for longer
        than its lease's lifetime (a stopped machine) does work that another does as well: what it
        stores must be the same and appear whole, as stages do.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        owner = _new_owner()
        lease = self._acquire(name, owner)
        counts = itertools.count(1)
        try:
            with call_periodically(lambda: self._beat(lease, owner, next(counts)), self._heartbeat):
                yield
        finally:
            self._release(lease, owner)

    def _acquire(self, name: str, owner: dict[str, Any]) -> Path:
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
                dead = time.monotonic() - seen_at > self._lifetime or (
                    content and _is_gone(json.loads(content)["owner"])
                )
                if not dead:
                    time.sleep(_POLL)
                    continue
                generation = int(newest.suffix[1:]) + 1
            lease = self._folder / f"{name}.{generation}"
            if _create(lease, _sign(owner, 0)):
                others = set(self._all(name)) - {lease}
                if others <= {newest}:
                    for dead_one in others:
                        dead_one.unlink(missing_ok=True)
                    return lease
                # What we looked at is no longer so: others came and went since. Who sees this steps
                # back, and all look again.
                lease.unlink(missing_ok=True)
                time.sleep(random.uniform(0, _POLL))

    def _all(self, name: str) -> list[Path]:
        return [path for path in self._folder.glob(f"{name}.*") if path.suffix[1:].isdecimal()]

    def _newest(self, name: str) -> Path | None:
        return max(self._all(name), key=lambda path: int(path.suffix[1:]), default=None)

    def _beat(self, lease: Path, owner: dict[str, Any], count: int) -> None:
        with suppress(
            OSError
        ):  # the next beat may succeed, and work that is nearly done is not given up for it
            if lease.exists():  # gone where another took it over
                draft = lease.with_name(f".{lease.name}.part")
                draft.write_text(_sign(owner, count))
                draft.replace(lease)

    def _release(self, lease: Path, owner: dict[str, Any]) -> None:
        with suppress(OSError):
            if (
                json.loads(_read(lease) or "{}").get("owner") == owner
            ):  # not where another took it over
                lease.unlink(missing_ok=True)


def _sign(owner: dict[str, Any], count: int) -> str:
    return json.dumps({"owner": owner, "count": count})


def _create(path: Path, content: str) -> bool:
    """Create a file with its content, False where it exists: a link to a finished draft, so that
    nobody ever reads half of it.
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
        return path.read_text()
    except OSError:
        return ""
