"""``clsnf serve``: Ray Serve on this machine, or on a cluster, in one command that ends with
Ctrl-C.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clsnf.core.errors import ClsnfError, SettingsError
from clsnf.core.threads import wait_passively
from clsnf.serving.catalogue import read_catalogue
from clsnf.serving.settings import ServingSettings

APPLICATION = "clsnf"
TLS_CERTIFICATE, TLS_KEY = "CLSNF_TLS_CERT", "CLSNF_TLS_KEY"
_HA_PROXY = "RAY_SERVE_ENABLE_HA_PROXY"  # Ray's switch for HAProxy in the place of its own proxy
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing about a factory leaves it
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "MALLOC_ARENA_MAX": "2",  # threads that decode would each keep a heap full of holes
    # Fewer hand-overs on the way of each request; the service keeps its own work off the event
    # loop.
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
}


@dataclass(frozen=True)
class Door:
    """Where a server listens: ``port`` 0 for a free one; paths of a certificate and its key for
    HTTPS, both or none.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    certificate: Path | None = None
    key: Path | None = None

    @classmethod
    def of(cls, host: str, port: int) -> Door:
        """With the certificate that the environment names.

        Raises:
            SettingsError: half of it, or a file that is not there.
        """
        found = {name: os.environ.get(name) for name in (TLS_CERTIFICATE, TLS_KEY)}
        missing = [name for name, value in found.items() if not value]
        if len(missing) == 1:
            raise SettingsError(
                f"{missing[0]} is not set: HTTPS needs both {TLS_CERTIFICATE} and {TLS_KEY}."
            )
        paths = [Path(value).expanduser() for value in found.values() if value]
        for path in paths:
            if not path.is_file():
                raise SettingsError(
                    f"There is no file {path}, which {TLS_CERTIFICATE} or {TLS_KEY} names."
                )
        return cls(host, port or _free_port(host), *paths)

    @property
    def url(self) -> str:
        scheme = "https" if self.certificate else "http"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{scheme}://{host}:{self.port}/"


def serve_until_told(
    settings: ServingSettings, door: Door, address: str | None, tell: Callable[[str], None]
) -> None:
    """Serve until SIGINT or SIGTERM; SIGHUP looks at the folder of models again and rolls in what
    is there.

    Args:
        settings: resolved.
        door: where to listen.
        address: of a Ray cluster, None for a private Ray that ends with this call.
        tell: told lines for people.

    Raises:
        SettingsError: the door is taken, there is no such cluster, or the models can't be served.
    """
    if os.environ.get(_HA_PROXY) == "1":
        if door.certificate is not None:
            raise SettingsError(
                f"{_HA_PROXY}=1 speaks plain HTTP: unset it, or unset {TLS_CERTIFICATE} and "
                f"{TLS_KEY}."
            )
        tell(f"{_HA_PROXY}=1: ports are open to the network, whatever --host says")
    _check_free(door)
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    wait_passively()
    import psutil
    import ray
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    told, again = threading.Event(), threading.Event()

    def hear(number: int, frame: object) -> None:
        (again if number == signal.SIGHUP else told).set()

    private = address is None
    arguments: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "namespace": "serve",
    }
    if private:
        cpus = max(
            os.cpu_count() or 1, 2 + settings.cpus_per_replica * (settings.max_replicas + 1)
        )  # a roll starts one more
        arguments |= {
            "address": "local",
            "include_dashboard": False,
            "object_store_memory": 200 * 2**20,
            "num_cpus": int(cpus),
        }
    else:
        arguments["address"] = address
    try:
        try:
            ray.init(**arguments)
        except (OSError, ValueError, RuntimeError) as error:
            line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise SettingsError(f"Ray can't be reached or started ({line}).") from error
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, hear)
        options: dict[str, Any] = {"host": door.host, "port": door.port}
        if door.certificate is not None:
            options |= {"ssl_certfile": str(door.certificate), "ssl_keyfile": str(door.key)}
        serve.start(http_options=options)
        _run(settings)
        tell(
            f"serving {settings.models} at {door.url} (Ctrl-C ends, SIGHUP looks at the models "
            "again)"
        )
        while not told.wait(0.2):
            if again.is_set():
                again.clear()
                _roll(settings, tell)
    finally:
        if ray.is_initialized():
            children = psutil.Process().children(recursive=True) if private else []
            with suppress(Exception):
                serve.delete(APPLICATION)  # requests under way are answered first
            ray.shutdown()
            for process in psutil.wait_procs(children, timeout=10)[1]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()


def _run(settings: ServingSettings) -> None:
    from ray import serve

    from clsnf.serving.deployment import bound

    try:
        serve.run(bound(settings), name=APPLICATION, route_prefix="/")
    except RuntimeError as error:
        status = serve.status().applications.get(APPLICATION)
        reasons = [d.message for d in status.deployments.values() if d.message] if status else []
        raise SettingsError(_cause("\n".join(reasons)) or str(error)) from error


def _cause(messages: str) -> str:
    """The line of a replica's traceback that says what is wrong; empty where none does."""
    lines = [
        line.strip() for line in messages.splitlines() if re.match(r"\s*clsnf\.errors\.\w+: ", line)
    ]
    return lines[-1].partition(": ")[2] if lines else ""


def _roll(settings: ServingSettings, tell: Callable[[str], None]) -> None:
    """Replace the replicas by some that serve what the folder holds now; those of before serve
    until then.
    """
    try:
        read_catalogue(Path(settings.models))
        _run(settings)
        tell(f"rolled in what {settings.models} holds now")
    except ClsnfError as error:
        tell(f"nothing was rolled in: {error}")


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def _check_free(door: Door) -> None:
    try:
        with socket.socket(socket.AF_INET6 if ":" in door.host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((door.host, door.port))
    except (OSError, OverflowError) as error:
        raise SettingsError(
            f"There is no listening at {door.host}:{door.port} ({error}): choose another --host "
            "or --port."
        ) from error
