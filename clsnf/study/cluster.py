"""Starting Ray, and each trial's share of its CPUs and GPUs."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import clsnf
from clsnf.core.config import StudySettings
from clsnf.core.errors import SettingsError
from clsnf.core.sigterm import Terminated
from clsnf.core.threads import PASSIVE_THREADS, wait_passively
from clsnf.streams.private_ray import on_loopback

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # a factory's machines report to nobody
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths mean the same in a trial as on the command line
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
    # Without a limit, each thread that decodes images has a fragmented heap of its own; with two
    # heaps a worker needs less memory.
    "MALLOC_ARENA_MAX": "2",
    # Tune's own handler ignores a Ctrl-C while the last trial ends, and takes seconds for another.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # Every ten seconds Tune writes the state of all trials so far. Nothing goes on from that: once
    # at the beginning and once at the end is enough.
    "TUNE_GLOBAL_CHECKPOINT_S": "1e9",
}
# How long a private Ray may take to start, in seconds. Ray's own 30 are too few for a machine that
# is busy or has slow disks.
_START_SECONDS = "RAY_raylet_start_wait_time_s"
_PRIVATE_ENVIRONMENT = {_START_SECONDS: "300", "RAY_gcs_server_port_wait_time_s": "300"}


Node = Mapping[str, float]  # the resources of a node: ``CPU``, ``GPU``, ``memory`` in bytes


@dataclass(frozen=True)
class Shares:
    """What each trial gets.

    Attributes:
        cpus, gpus: of a trial.
        concurrent: number of trials at once.
        stream_cpus: CPUs for a trial's Ray stream, anywhere in the cluster.
    """

    cpus: int
    gpus: float
    concurrent: int
    stream_cpus: int = 0

    @property
    def bundles(self) -> list[dict[str, float]]:
        """A trial's own resources and those of its stream.

        They are reserved together: otherwise one could wait for the other for ever.
        """
        own: dict[str, float] = {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})
        return [own, {"CPU": self.stream_cpus}] if self.stream_cpus else [own]


@contextmanager
def ray_session(address: str | None, memory: int | None = None) -> Iterator[None]:
    """Connect to Ray while the block runs. The processes of a private Ray end with the block.

    Args:
        address: of a cluster; ``auto`` for the one that this machine belongs to; ``local`` for a
            private one on this machine; None for the one of RAY_ADDRESS, which a submitted job
            runs in, or else a private one.
        memory: bytes of a private Ray's object store. The default is small: artifacts are files.

    Raises:
        SettingsError: there is no cluster at that address, or Ray can't start here.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    wait_passively()
    import logging

    import psutil
    import ray

    # A failed trial's traceback is in its folder; the summary names its cause.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    address = address or os.environ.get("RAY_ADDRESS") or None
    address = None if address == "local" else address
    arguments: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        for name, value in _PRIVATE_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        # "local" never connects to a Ray that another program has left running.
        arguments |= {
            "address": "local",
            "include_dashboard": False,
            "object_store_memory": memory or 200 * 1024**2,
        }
    else:
        # A private Ray's workers inherit this process's environment; those of a cluster do not.
        environment: dict[str, Any] = {"env_vars": PASSIVE_THREADS}
        # A submitted job brought its working folder along. Otherwise send this code: workers may
        # have another version installed, or none.
        if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
            environment["py_modules"] = [str(Path(clsnf.__file__).parent)]
            environment["excludes"] = ["__pycache__"]
        arguments |= {"address": address, "runtime_env": environment}
    try:
        with on_loopback() if address is None else nullcontext():
            _start(arguments)
            yield
    finally:
        started = [] if address else psutil.Process().children(recursive=True)
        ray.shutdown()
        # Ray's agents go on running where Ray is stopped while it starts.
        for process in psutil.wait_procs(started, timeout=5)[1]:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def _start(arguments: dict[str, Any]) -> None:
    import ray

    address = arguments["address"]
    try:
        _check_reachable(address)
        with _own_sigterm():
            ray.init(**arguments)
    except Exception as error:  # of a node that is slow to start, Ray raises nothing narrower
        raise _start_error(address, error) from error


def _start_error(address: str, error: Exception) -> SettingsError:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    if address != "local":
        return SettingsError(
            f"There is no Ray cluster at {address!r} ({line}): say --address local for "
            "a private one."
        )
    if "timed out during startup" in line:
        waited = max(30, int(os.environ[_START_SECONDS]))  # Ray tries for 30 s at least
        return SettingsError(
            f"Ray did not start within {waited} s ({line}): is the machine busy? "
            f"{_START_SECONDS}=900 in the environment gives it more time."
        )
    return SettingsError(
        f"Ray can't start on this machine ({line}): is there memory and room in /tmp?"
    )


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep this process's handler of SIGTERM: Ray's ends the process with a crash dump.

    Raises:
        Terminated: a SIGTERM came while Ray's handler was there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as ended:
        if ended.code == signal.SIGTERM and callable(before):
            before(signal.SIGTERM, None)
            raise Terminated from ended
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _check_reachable(address: str) -> None:
    """Raise where no cluster answers at an address; Ray itself would try for minutes.

    Raises:
        OSError: nobody listens there, or ``auto`` finds no cluster.
        ray.exceptions.RpcError: who listens there does not answer as a cluster does.
    """
    if address == "local":
        return
    address = _resolved(address)
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise OSError(f"{address}: {error}") from error
    if not address.startswith("ray://"):
        # A head that hangs still listens, and another program may have a dead head's port. Ray's
        # client tries for 40 s.
        from ray import _raylet

        _raylet.GcsClient(address=address)  # type: ignore[attr-defined]


def _resolved(address: str) -> str:
    """HOST:PORT of ``auto``, as :func:`ray.init` finds it; other addresses are returned as given.

    That is RAY_ADDRESS, a Ray that runs on this machine, or the one that was started here last,
    which may be gone.
    """
    if address != "auto":
        return address
    from ray._private.services import get_ray_address_from_environment

    return str(get_ray_address_from_environment(address, None))


def node_resources() -> list[dict[str, float]]:
    """The resources (``CPU``, ``GPU``, ``memory`` in bytes) of the running cluster's nodes."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def share_out(
    settings: StudySettings,
    categories: int,
    nodes: Sequence[Node],
    stream_cpus: int = 0,
) -> Shares:
    """Divide the cluster's nodes among trials.

    By default a trial gets so many cores that one trial of each category fits, four at most.
    Single-threaded trials side by side finish more work than one trial with many threads. With no
    more trials at once than categories, each category's trials run in sequence, and the same seed
    gives the same trials.

    Args:
        settings: what the user asked for.
        categories: their number.
        nodes: resources of each node (``CPU``, ``GPU``).
        stream_cpus: CPUs for each trial's Ray stream.

    Raises:
        SettingsError: no node can hold a trial; Ray would wait for ever.
    """
    cpus, gpus, usable = _resources_of_a_trial(settings, categories, nodes, stream_cpus)
    fits = sum(
        min(
            int(node.get("CPU", 0)) // cpus, int(node["GPU"] / gpus + 1e-9) if gpus else sys.maxsize
        )
        for node in usable
    )
    if stream_cpus:
        fits = min(fits, _trials_with_streams(cpus, gpus, stream_cpus, nodes))
        if fits < 1:
            total = int(sum(node.get("CPU", 0) for node in nodes))
            raise SettingsError(
                f"A trial of {cpus} CPUs and its ray stream of {stream_cpus} do not fit on the "
                f"Ray cluster ({total} CPUs): say --stream local, or give the cluster more."
            )
    return Shares(cpus, gpus, min(settings.concurrent_trials or fits, fits), stream_cpus)


def _resources_of_a_trial(
    settings: StudySettings, categories: int, nodes: Sequence[Node], stream_cpus: int
) -> tuple[int, float, list[Node]]:
    """A trial's CPUs and GPUs, and the nodes that have enough GPUs for one."""
    gpus = settings.gpus_per_trial
    most_gpus = max(node.get("GPU", 0) for node in nodes)
    if gpus > most_gpus:
        there = f"at most {most_gpus:g} on one node" if most_gpus else "0 GPUs"
        raise SettingsError(
            f"gpus_per_trial is {gpus:g}, but the Ray cluster has {there}: set that or fewer, 0 "
            "to train on CPUs."
        )
    usable = [node for node in nodes if node.get("GPU", 0) >= gpus]
    most_cpus = int(max(node.get("CPU", 0) for node in usable))
    where = " with such GPUs" if gpus else ""
    if most_cpus < 1:
        raise SettingsError(
            f"No node of the Ray cluster{where} has a CPU to run trials on: start one with "
            "--num-cpus 1 or more."
        )
    available = most_cpus if len(nodes) > 1 else most_cpus - stream_cpus
    even_share = available // max(1, min(categories, available))
    cpus = settings.cpus_per_trial or max(1, min(4, even_share))
    if cpus > most_cpus:
        raise SettingsError(
            f"cpus_per_trial is {cpus}, but the largest node{where} has {most_cpus}: choose that "
            "or fewer."
        )
    return cpus, gpus, usable


@dataclass
class _FreeNode:
    """What a node still has."""

    cpus: int
    gpus: float


def _trials_with_streams(cpus: int, gpus: float, stream_cpus: int, nodes: Sequence[Node]) -> int:
    """How many trials fit at once, each with its stream's CPUs on one node.

    Streams take nodes without GPUs first.
    """
    free = [_FreeNode(int(node.get("CPU", 0)), node.get("GPU", 0.0)) for node in nodes]
    count = 0
    while True:
        for_trial = [node for node in free if node.cpus >= cpus and node.gpus >= gpus - 1e-9]
        if not for_trial:
            return count
        node = max(for_trial, key=lambda node: (node.gpus if gpus else -node.gpus, node.cpus))
        node.cpus -= cpus
        node.gpus -= gpus
        for_stream = [node for node in free if node.cpus >= stream_cpus]
        if not for_stream:
            return count
        min(for_stream, key=lambda node: (node.gpus, node.cpus)).cpus -= stream_cpus
        count += 1
