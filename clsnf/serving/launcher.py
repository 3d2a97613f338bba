"""``clsnf serve``: Ray Serve on this machine, or on a cluster, until Ctrl-C ends it."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clsnf.core.errors import ClsnfError, SettingsError
from clsnf.core.threads import wait_passively
from clsnf.serving.catalogue import read_catalogue_within
from clsnf.serving.settings import MiB, ServingSettings
from clsnf.streams.private_ray import on_loopback

APPLICATION = "clsnf"
TLS_CERTIFICATE, TLS_KEY = "CLSNF_TLS_CERT", "CLSNF_TLS_KEY"
_HA_PROXY = "RAY_SERVE_ENABLE_HA_PROXY"  # Ray's switch for HAProxy instead of its own proxy
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing about a factory leaves it
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "MALLOC_ARENA_MAX": "2",  # threads that decode would each keep a heap full of holes
    # Each request changes threads less often; the service itself never blocks the event loop.
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
}


@dataclass(frozen=True)
class ListenAddress:
    """Where a server listens; for HTTPS with the files of a certificate and its key."""

    host: str = "127.0.0.1"
    port: int = 8000
    certificate: Path | None = None
    key: Path | None = None

    @classmethod
    def from_environment(cls, host: str, port: int) -> ListenAddress:
        """With the certificate that the environment names, if any; port 0 for a free one.

        Raises:
            SettingsError: the environment names one of both files only, or one that is not there.
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

    def check_free(self) -> None:
        """Check that this process may listen here.

        Raises:
            SettingsError: it may not, such as where another server listens.
        """
        try:
            with socket.socket(_family(self.host)) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((self.host, self.port))
        except (OSError, OverflowError) as error:
            raise SettingsError(
                f"There is no listening at {self.host}:{self.port} ({error}): choose another "
                "--host or --port."
            ) from error


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _free_port(host: str) -> int:
    with socket.socket(_family(host)) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def serve_until_stopped(
    settings: ServingSettings,
    listen: ListenAddress,
    cluster: str | None,
    report: Callable[[str], None],
) -> None:
    """Serve until SIGINT or SIGTERM; SIGHUP rolls in what the folder of models holds then.

    Args:
        settings: resolved.
        listen: where to listen.
        cluster: address of a Ray cluster, None for a private Ray that ends with this call.
        report: called with lines for people.

    Raises:
        SettingsError: another server listens there, there is no such cluster, or the models can't
            be served.
    """
    _check_proxy(listen, report)
    listen.check_free()
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    wait_passively()
    import ray
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    stop, reload = threading.Event(), threading.Event()

    def on_signal(number: int, frame: object) -> None:
        (reload if number == signal.SIGHUP else stop).set()

    loopback = ExitStack()
    try:
        if cluster is None:  # whatever --host says: the host is for HTTP alone
            loopback.enter_context(on_loopback())
        _start_ray(settings, cluster)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, on_signal)
        options: dict[str, Any] = {"host": listen.host, "port": listen.port}
        if listen.certificate is not None:
            options |= {"ssl_certfile": str(listen.certificate), "ssl_keyfile": str(listen.key)}
        serve.start(http_options=options)
        _deploy(settings)
        report(
            f"serving {settings.models} at {listen.url} (Ctrl-C ends, SIGHUP reads the models "
            "again)"
        )
        while not stop.wait(0.2):
            if reload.is_set():
                reload.clear()
                _roll(settings, report)
    finally:
        if ray.is_initialized():
            _shut_down(private=cluster is None)
        loopback.close()


def _check_proxy(listen: ListenAddress, report: Callable[[str], None]) -> None:
    """Refuse HTTPS behind HAProxy, and warn about its open ports."""
    if os.environ.get(_HA_PROXY) != "1":
        return
    if listen.certificate is not None:
        raise SettingsError(
            f"{_HA_PROXY}=1 speaks plain HTTP: unset it, or unset {TLS_CERTIFICATE} and {TLS_KEY}."
        )
    report(f"{_HA_PROXY}=1: ports are open to the network, whatever --host says")


def _start_ray(settings: ServingSettings, cluster: str | None) -> None:
    """Connect to a cluster, or start a private Ray. Raises SettingsError."""
    import ray

    arguments: dict[str, Any] = {
        "address": "local" if cluster is None else cluster,
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "namespace": "serve",
    }
    if cluster is None:
        replicas = settings.max_replicas + 1  # one more while new models roll in
        cpus = max(os.cpu_count() or 1, 2 + settings.cpus_per_replica * replicas)
        arguments |= {
            "include_dashboard": False,
            "object_store_memory": 200 * 2**20,
            "num_cpus": int(cpus),
        }
    try:
        ray.init(**arguments)
    except (OSError, ValueError, RuntimeError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SettingsError(f"Ray can't be reached or started ({line}).") from error


def _shut_down(private: bool) -> None:
    """End the application, after the requests under way, and what a private Ray has started."""
    import psutil
    import ray
    from ray import serve

    children = psutil.Process().children(recursive=True) if private else []
    with suppress(Exception):
        serve.delete(APPLICATION)
    ray.shutdown()
    for process in psutil.wait_procs(children, timeout=10)[1]:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _deploy(settings: ServingSettings) -> None:
    """Start the application, or replace the one that runs. Raises SettingsError."""
    from ray import serve

    from clsnf.serving.deployment import bind_application

    try:
        serve.run(bind_application(settings), name=APPLICATION, route_prefix="/")
    except RuntimeError as error:
        status = serve.status().applications.get(APPLICATION)
        messages = [d.message for d in status.deployments.values() if d.message] if status else []
        raise SettingsError(error_line("\n".join(messages)) or str(error)) from error


def error_line(messages: str) -> str:
    """The message of the last clsnf error in a replica's tracebacks; empty where there is none."""
    found = re.findall(r"^\s*clsnf\.(?:\w+\.)*errors\.\w+: (.+)$", messages, re.MULTILINE)
    return found[-1].strip() if found else ""


def _roll(settings: ServingSettings, report: Callable[[str], None]) -> None:
    """Replace the replicas by new ones, which read the folder of models again.

    The replicas of before serve until then.
    """
    try:
        read_catalogue_within(Path(settings.models), settings.memory_mb * MiB)
        _deploy(settings)
        report(f"rolled in what {settings.models} holds now")
    except ClsnfError as error:
        report(f"nothing was rolled in: {error}")
