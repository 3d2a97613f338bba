"""Which stream brings a category's images, and why: ``--stream ray|local|auto``.

The choice changes no result and is no part of any content key. Jobs and commands call this module;
they know how many nodes and workers the cluster has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from clsnf.core.config import STREAMS, ImageSettings
from clsnf.core.errors import SettingsError, nearest
from clsnf.core.memory import memory_budget
from clsnf.data.sources import Reference
from clsnf.streams.stream import LocalStream, Stream


@dataclass(frozen=True)
class StreamChoice:
    """The stream that was chosen.

    Attributes:
        kind: ``memory``, ``local`` or ``ray``.
        reason: one line for people.
        workers: number of CPUs of a Ray stream; of threads of a local one, 0 for one a core.
        gpus: number of GPUs that workers of a Ray stream may take.
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
        images: number of images of each category, at least one category.
        settings: the network's input, whose size decides what an image takes.
        budget: bytes that a process may fill with images; None for a share of what is free now.
        nodes: number of nodes of the Ray cluster.
        workers: number of CPUs for a Ray stream, of threads for a local one.

    Raises:
        SettingsError: ``wanted`` is another name.
    """
    if wanted not in STREAMS:
        raise SettingsError(f"--stream is {wanted!r}.{nearest(wanted, STREAMS)}")
    budget = memory_budget() if budget is None else budget
    most = max(images)
    size = 3 * math.prod(settings.size) * most
    takes = f"{most} images take {_megabytes(size)} at the network's input size"
    if wanted == "ray":
        return StreamChoice("ray", "ray: as asked", max(1, workers))
    if size <= budget:
        reason = f"local, from memory: {takes}, and {_megabytes(budget)} may be filled"
        return StreamChoice("memory", reason, workers)
    too_large = f"{takes}, more than the {_megabytes(budget)} that may be filled"
    if wanted == "auto" and nodes > 1:
        reason = f"ray: {too_large}, and the cluster has {nodes} nodes to decode them on"
        return StreamChoice("ray", reason, max(1, workers))
    return StreamChoice("local", f"local, decoded again in every epoch: {too_large}", workers)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.0f} MB" if size < 1e9 else f"{size / 1e9:.1f} GB"


def open_stream(
    choice: StreamChoice, paths: Sequence[Reference], settings: ImageSettings
) -> Stream:
    """A stream of images that do not lie in memory.

    Raises:
        SettingsError: it is Ray's, and Ray isn't running.
    """
    if choice.kind == "ray":
        from clsnf.streams.ray_stream import RayStream

        return RayStream(paths, settings, choice.workers, choice.gpus)
    return LocalStream(paths, settings, choice.workers or None)
