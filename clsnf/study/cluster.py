"""Starting Ray, and how much of it a trial gets."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import clsnf
from clsnf.core.config import StudySettings
from clsnf.core.errors import SettingsError
from clsnf.core.threads import PASSIVE_THREADS, wait_passively

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing about a factory leaves it
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths mean the same in a trial as on the command line
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
    # Threads that decode images would each keep a heap of their own full of holes: with two heaps a
    # worker stays smaller.
    "MALLOC_ARENA_MAX": "2",
    # Tune's own handler swallows a Ctrl-C that comes while the last trial ends, and lets seconds
    # pass before it heeds another.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
}


@dataclass(frozen=True)
class Shares:
    """What a trial gets, and how many run at once; ``stream_cpus`` work for its stream, anywhere in
    the cluster.
    """

    cpus: int
    gpus: float
    concurrent: int
    stream_cpus: int = 0

    @property
    def bundles(self) -> list[dict[str, float]]:
        """A trial's own resources and those of its stream: reserved together, so that neither waits
        for the other for ever.
        """
        own: dict[str, float] = {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})
        return [own, {"CPU": self.stream_cpus}] if self.stream_cpus else [own]


@contextmanager
def ray_session(address: str | None, memory: int | None = None) -> Iterator[None]:
    """Ray for the length of the block; the processes of a private one end with it, however and
    whenever the block ends.

    Args:
        address: of a cluster, ``auto`` for one this machine belongs to; None for a private one on
            this machine, or for the one that a submitted job runs in.
        memory: bytes of the object store of a private Ray; small, because stages travel by files.

    Raises:
        SettingsError: there is no cluster at that address, or Ray can't start here.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    wait_passively()
    import logging

    import psutil
    import ray

    # A failed trial's traceback lies in its folder; the summary names its cause.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    address = address or os.environ.get("RAY_ADDRESS") or None
    arguments: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        # "local" never attaches to a leftover of somebody else's.
        arguments |= {
            "address": "local",
            "include_dashboard": False,
            "object_store_memory": memory or 200 * 1024**2,
        }
    else:
        # A private Ray's workers inherit this process's environment; a cluster's must be told.
        environment: dict[str, Any] = {"env_vars": PASSIVE_THREADS}
        if (
            "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ
        ):  # a submitted job brought its working folder along
            # Workers compute with this very code, whatever version is installed on their nodes, or
            # none.
            environment["py_modules"] = [str(Path(clsnf.__file__).parent)]
            environment["excludes"] = ["__pycache__"]
        arguments |= {"address": address, "runtime_env": environment}
    try:
        _start(arguments)
        yield
    finally:
        started = [] if address else psutil.Process().children(recursive=True)
        ray.shutdown()
        # Ray's agents outlive a Ray that is ended while it starts.
        for process in psutil.wait_procs(started, timeout=5)[1]:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def _start(arguments: dict[str, Any]) -> None:
    import ray

    try:
        _check_reachable(arguments["address"])
        ray.init(**arguments)
    except (OSError, ValueError, RuntimeError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if arguments["address"] == "local":
            raise SettingsError(
                f"Ray can't start on this machine ({line}): is there memory and room in /tmp?"
            ) from error
        raise SettingsError(
            f"There is no Ray cluster at {arguments['address']!r} ({line}): leave --address out "
            "for a private one."
        ) from error


def _check_reachable(address: str) -> None:
    """Raise OSError where nobody listens at a HOST:PORT; Ray would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def node_resources() -> list[dict[str, float]]:
    """The resources (``CPU``, ``GPU``, ``memory`` in bytes) of the running cluster's nodes."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def share_out(
    settings: StudySettings,
    categories: int,
    nodes: Sequence[Mapping[str, float]],
    stream_cpus: int = 0,
) -> Shares:
    """A trial's share of nodes with these resources (``CPU``, ``GPU``); `stream_cpus` more work for
    each trial's stream.

    Where nothing else is said, trials get as many cores as leave room for one trial of each
    category at a time, four at most: single-threaded trials side by side get more out of a machine
    than one trial with many threads, and with no more trials at once than categories every
    category's trials run in sequence, so that the same seed gives the same trials.

    Raises:
        SettingsError: no node could ever hold one trial; Ray would wait for one for ever.
    """
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
    room = most_cpus if len(nodes) > 1 else most_cpus - stream_cpus
    cpus = settings.cpus_per_trial or max(1, min(4, room // max(1, min(categories, room))))
    if cpus > most_cpus:
        raise SettingsError(
            f"cpus_per_trial is {cpus}, but the largest node{where} has {most_cpus}: choose that "
            "or fewer."
        )
    fits = sum(
        min(
            int(node.get("CPU", 0)) // cpus, int(node["GPU"] / gpus + 1e-9) if gpus else sys.maxsize
        )
        for node in usable
    )
    if stream_cpus:
        fits = min(fits, _with_streams(cpus, gpus, stream_cpus, nodes))
        if fits < 1:
            total = int(sum(node.get("CPU", 0) for node in nodes))
            raise SettingsError(
                f"A trial of {cpus} CPUs and its ray stream of {stream_cpus} do not fit on the "
                f"Ray cluster ({total} CPUs): "
                "say --stream local, or give the cluster more."
            )
    return Shares(cpus, gpus, min(settings.concurrent_trials or fits, fits), stream_cpus)


def _with_streams(
    cpus: int, gpus: float, stream_cpus: int, nodes: Sequence[Mapping[str, float]]
) -> int:
    """How many trials fit at once, each with its stream's CPUs on one node: those without GPUs are
    for streams first.
    """
    free = [[int(node.get("CPU", 0)), node.get("GPU", 0.0)] for node in nodes]
    count = 0
    while True:
        places = [place for place in free if place[0] >= cpus and place[1] >= gpus - 1e-9]
        if not places:
            return count
        place = max(places, key=lambda place: (place[1] if gpus else -place[1], place[0]))
        place[0] -= cpus
        place[1] -= gpus
        streams = [place for place in free if place[0] >= stream_cpus]
        if not streams:
            return count
        min(streams, key=lambda place: (place[1], place[0]))[0] -= stream_cpus
        count += 1
