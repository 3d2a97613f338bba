"""Which stream brings a category's images, and why: ``--stream ray|local|auto``.

A choice changes no figure and is no part of any content key. Called by the jobs and commands, which
know of clusters what is needed here: how many nodes and workers there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clsnf.core.config import STREAMS, ImageSettings
from clsnf.core.errors import SettingsError, nearest
from clsnf.core.memory import memory_budget
from clsnf.data.sources import Reference
from clsnf.streams.stream import LocalStream, Stream


@dataclass(frozen=True)
class StreamChoice:
    """What was chosen.

    Attributes:
        kind: ``memory``, ``local`` or ``ray``.
        reason: one line for people.
        workers: CPUs of a Ray stream; threads of a local one, 0 for one a core.
        gpus: that workers of a Ray stream may take.
    """

    kind: str
    reason: str
    workers: int = 0
    gpus: int = 0


def choose_stream(
    wanted: str,
    images: Sequence[int],
    settings: ImageSettings,
    *,
    budget: int | None = None,
    nodes: int = 1,
    workers: int = 0,
) -> StreamChoice:
    """Decide on a stream.

    Args:
        wanted: ``auto``, ``local`` or ``ray``.
        images: numbers of images of the categories.
        settings: their size on the canvas.
        budget: bytes that a process may fill with them; None for what is right on this machine now.
        nodes: of the Ray cluster.
        workers: CPUs for a Ray stream, threads for a local one.

    Raises:
        SettingsError: another name.
    """
    if wanted not in STREAMS:
        raise SettingsError(f"--stream is {wanted!r}.{nearest(wanted, STREAMS)}")
    budget = memory_budget() if budget is None else budget
    most = max(images)
    size = 3 * settings.height * settings.width * most
    fits = size <= budget
    takes = f"{most} images take {_megabytes(size)} on the canvas"
    if wanted == "ray":
        return StreamChoice("ray", "ray: as asked", max(1, workers))
    if fits:
        return StreamChoice(
            "memory",
            f"local, from memory: {takes}, and {_megabytes(budget)} may be filled",
            workers,
        )
    too_large = f"{takes}, more than the {_megabytes(budget)} that may be filled"
    if wanted == "auto" and nodes > 1:
        return StreamChoice(
            "ray",
            f"ray: {too_large}, and the cluster has {nodes} nodes to decode them on",
            max(1, workers),
        )
    return StreamChoice("local", f"local, decoded over and over: {too_large}", workers)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.0f} MB" if size < 1e9 else f"{size / 1e9:.1f} GB"


def open_stream(
    choice: StreamChoice, paths: Sequence[Reference], settings: ImageSettings
) -> Stream:
    """The stream of images that do not lie in memory. Raises SettingsError where it is Ray's and
    Ray isn't running.
    """
    if choice.kind == "ray":
        from clsnf.streams.ray_stream import RayStream

        return RayStream(paths, settings, choice.workers, choice.gpus)
    return LocalStream(paths, settings, choice.workers or None)
