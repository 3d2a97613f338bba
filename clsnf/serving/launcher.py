"""``clsnf serve``: Ray Serve on this machine, or on a cluster, until Ctrl-C ends it."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from clsnf.core.errors import ClsnfError, SettingsError
from clsnf.serving.listening import (
    SharedListener,
    check_free,
    listener_folder,
    tls_context,
    url_of,
)
from clsnf.serving.settings import ServingSettings
from clsnf.streams.private_ray import on_loopback

APPLICATION = "clsnf"
_ENDING_S = 15.0  # beyond the deadline of requests: until then Ray's processes are ended
_ROLL_S = 300.0
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing about a factory leaves it
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "MALLOC_ARENA_MAX": "2",  # threads that decode would each keep a heap full of holes
    # The service never blocks the event loop, so it may share Ray's.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
}


def serve_until_stopped(
    settings: ServingSettings, cluster: str | None, report: Callable[[str], None]
) -> None:
    """Serve until SIGINT or SIGTERM; SIGHUP rolls in what the folder of models holds then.

    Where a process of the private Ray has ended, or Ray does not end in time, this function reports
    it and ends the process, with status 1: Ray's own calls would wait for minutes for what is gone.

    Args:
        settings: resolved; port 0 for a free one.
        cluster: address of a Ray cluster, None for a private Ray that ends with this call.
        report: called with lines for people.

    Raises:
        SettingsError: another server listens there, there is no such cluster, or the models can't
            be served.
    """
    tls = tls_context(settings.certificate, settings.key)
    with ExitStack() as ending:
        # On this machine the address is taken now, and given to the replicas: it stays the same
        # whatever becomes of them. A cluster's replicas take it where they run.
        folder = None
        if cluster is None:
            folder = listener_folder("serve", str(os.getpid()), str(time.time_ns()))
            listener = SharedListener(folder, settings.host, settings.port)
            ending.callback(listener.close)
            check_free(settings.host, settings.grpc_port)
            settings = dataclasses.replace(settings, port=listener.port)
        elif not settings.port:
            raise SettingsError("On a cluster --port must be a number above 0.")
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
        from ray import serve

        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        signals = _Signals()
        if cluster is None:  # whatever --host says: the host is for HTTP alone
            ending.enter_context(on_loopback())
        guard = _RayGuard(cluster is None, settings.deadline_s + _ENDING_S, report)
        ending.callback(guard.end)
        _start_ray(settings, cluster)
        guard.start()
        signals.listen(guard.end_in_time)
        proxies: Any = "Disabled" if cluster is None else "EveryNode"
        serve.start(proxy_location=proxies)
        deployed = _Deployed(settings, folder)
        deployed.roll()
        url = url_of(settings.host, settings.port, tls is not None)
        report(f"serving {settings.models} at {url} (Ctrl-C ends, SIGHUP reads the models again)")
        while not signals.stop.wait(0.2):
            if signals.reload.is_set():
                signals.reload.clear()
                deployed.roll_again(report)


class _Signals:
    """What signals have asked for."""

    def __init__(self) -> None:
        self.stop, self.reload = threading.Event(), threading.Event()

    def listen(self, on_stop: Callable[[], None]) -> None:
        """Heed signals from now on; `on_stop` is called with each that asks for the end."""

        def on_signal(number: int, frame: object) -> None:
            if number == getattr(signal, "SIGHUP", None):
                self.reload.set()
            else:
                self.stop.set()
                on_stop()

        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), on_signal)


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


class _RayGuard:
    """Sees to it that this process ends when Ray does not work any more, or does not end.

    Args:
        private: this process starts Ray, and ends all that it has started.
        seconds: for Ray's own calls at the end.
        report: called with a line for people.
    """

    def __init__(self, private: bool, seconds: float, report: Callable[[str], None]) -> None:
        self._private, self._seconds, self._report = private, seconds, report
        self._ended = threading.Event()

    def start(self) -> None:
        """Watch the processes of the private Ray, which can't work without any of them."""
        if self._private:
            threading.Thread(target=self._watch, name="watch Ray", daemon=True).start()

    def end(self) -> None:
        """End the application, after the requests under way, and what a private Ray has started."""
        import psutil
        import ray
        from ray import serve

        self.end_in_time()
        children = psutil.Process().children(recursive=True) if self._private else []
        if ray.is_initialized():
            with suppress(Exception):
                serve.delete(APPLICATION)
            self._ended.set()  # Ray's processes are about to end, as they should
            ray.shutdown()
        self._ended.set()
        for process in psutil.wait_procs(children, timeout=10)[1]:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def end_in_time(self) -> None:
        """Give Ray's calls their time from now on."""
        timer = threading.Timer(self._seconds, self._too_late)
        timer.daemon = True
        timer.start()

    def _too_late(self) -> None:
        if not self._ended.is_set():
            self._leave(f"Ray did not end within {self._seconds:g} s, and was left or killed.")

    def _watch(self) -> None:
        import ray

        node = ray._private.worker._global_node
        while not self._ended.wait(0.5):
            dead: list[Any] = node.dead_processes() if node is not None else []
            if dead and not self._ended.is_set():
                names = ", ".join(sorted({name for name, _ in dead}))
                self._leave(f"Ray's {names} has ended, and the server with it: start it again.")

    def _leave(self, reason: str) -> None:
        """End this process at once, and those of the private Ray."""
        import psutil

        self._report(f"error: {reason}")
        for process in psutil.Process().children(recursive=True) if self._private else []:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


class _Deployed:
    """The application on Ray Serve, and the models that were rolled in."""

    def __init__(self, settings: ServingSettings, folder: Path | None) -> None:
        self._settings, self._folder, self._generation = settings, folder, 0

    def roll(self) -> None:
        """Start the application, or let its replicas read their models again.

        Raises:
            SettingsError: it does not start.
        """
        from ray import serve

        from clsnf.serving.deployment import bind_application

        application = bind_application(self._settings, self._folder, self._generation)
        try:
            serve.run(application, name=APPLICATION, route_prefix="/")
        except RuntimeError as error:
            status = serve.status().applications.get(APPLICATION)
            found = [d.message for d in status.deployments.values() if d.message] if status else []
            raise SettingsError(error_line("\n".join(found)) or str(error)) from error

    def roll_again(self, report: Callable[[str], None]) -> None:
        """Let the replicas roll in what the folder of models holds now, and report the outcome."""
        models = self._settings.models
        try:
            self._generation += 1
            self.roll()
            refused = self._refused()
        except ClsnfError as error:
            refused = str(error)
        if refused is None:
            report(f"rolled in what {models} holds now")
        else:
            report(f"not all was rolled in: {refused}")

    def _refused(self) -> str | None:
        """Why a replica refused the newest models; None where it serves them."""
        from ray import serve

        handle = serve.get_app_handle(APPLICATION)
        until = time.monotonic() + _ROLL_S
        while True:
            generation, refused = handle.rolled.remote().result(timeout_s=60)
            if generation == self._generation:
                return None if refused is None else str(refused)
            if time.monotonic() > until:
                raise SettingsError(f"The replicas did not answer within {_ROLL_S:g} s.")
            time.sleep(0.2)


def error_line(messages: str) -> str:
    """The message of the last clsnf error in a replica's tracebacks; empty where there is none."""
    found = re.findall(r"^\s*clsnf\.(?:\w+\.)*errors\.\w+: (.+)$", messages, re.MULTILINE)
    return found[-1].strip() if found else ""
