"""Names of hosts and origins: those that a setting lists, and those of this machine."""

from __future__ import annotations

import ipaddress
import re
import socket

from clsnf.core.errors import SettingsError

_HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[^:\[\]/@?#\s]+)(?::\d{1,5})?")
_LISTED = re.compile(r"\*|(\*\.)?[^:/*@\s]+")
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}


def listed_hosts(text: str) -> set[str]:
    """The comma-separated names of the setting ``allowed_hosts``, in lower case.

    Raises:
        SettingsError: one of them is none.
    """
    names = _listed(text)
    for name in names:
        if _LISTED.fullmatch(name) is None:
            raise SettingsError(
                f"serving.allowed_hosts holds {name!r}: give names without scheme and port, such "
                "as inspect.plant.local, *.plant.local, or * for any."
            )
    return names


def listed_origins(text: str) -> set[str]:
    """The comma-separated origins of the setting ``allowed_origins``, in lower case.

    Raises:
        SettingsError: one of them is none.
    """
    origins = _listed(text)
    for origin in origins:
        scheme, _, host = origin.partition("://")
        if scheme not in _DEFAULT_PORTS or _HOST.fullmatch(host) is None:
            raise SettingsError(
                f"serving.allowed_origins holds {origin!r}: give a page's scheme and host, such as "
                "https://mes.plant.local."
            )
    return origins


def _listed(text: str) -> set[str]:
    return {part.strip().lower().rstrip("/.") for part in text.split(",") if part.strip()}


def is_loopback(host: str) -> bool:
    """Whether who listens on this address is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower().rstrip(".") == "localhost"


def own_hosts() -> set[str]:
    """Names that this machine has for itself, in lower case."""
    machine = socket.gethostname().lower().rstrip(".")
    short = machine.partition(".")[0]
    return {"localhost", "*.localhost", machine, short, f"{short}.local"} - {""}


def is_known_host(host: str, known: set[str]) -> bool:
    """Whether a header ``Host`` names an IP address or one of the `known` names.

    No page on the web can make an address its own name, so addresses need no list.
    """
    found = _HOST.fullmatch(host.lower())
    if found is None:
        return False
    name = found["name"].rstrip(".")
    if "*" in known or name in known or _is_address(name.strip("[]")):
        return True
    parts = name.split(".")
    return any(f"*.{'.'.join(parts[start:])}" in known for start in range(1, len(parts)))


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_same_host(origin: str, host: str) -> bool:
    """Whether a header ``Origin`` is that of a page of `host` itself.

    Schemes do not count: behind a proxy that ends TLS, the server's own is not the page's.
    """
    scheme, _, place = origin.lower().partition("://")
    port = _DEFAULT_PORTS.get(scheme, "")
    return bool(place) and place.removesuffix(port) == host.lower().removesuffix(port)
