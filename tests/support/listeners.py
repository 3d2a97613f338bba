"""Who listens on the network: asked of the real processes."""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import Sequence

import psutil


def listeners(family: Sequence[psutil.Process]) -> list[tuple[str, str]]:
    """Name and address of each listening socket of these processes."""
    found = []
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [
                (process.name(), str(connection.laddr.ip))
                for connection in process.net_connections("inet")
                if connection.status == psutil.CONN_LISTEN
            ]
    return found


def beyond_loopback(family: Sequence[psutil.Process]) -> list[tuple[str, str]]:
    """Those of :func:`listeners` that other machines may reach."""
    return [
        (name, address)
        for name, address in listeners(family)
        if not ipaddress.ip_address(address.removeprefix("::ffff:")).is_loopback
    ]
