"""timm's architectures as a user chooses among them: levels, sizes, cost, what weights expect.

Called by ``clsnf backbones``. All of it is found out on PyTorch's meta device.
"""

from __future__ import annotations

import fnmatch
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat

from clsnf.core.config import DetectorSettings, replaced
from clsnf.core.errors import SettingsError, nearest
from clsnf.model.architectures import architecture_of, facts_of
from clsnf.model.extractors import takes
from clsnf.model.flops import BackboneCost, cost_of
from clsnf.model.resolve import resolved

_FEW = 8  # architectures that are not worth the start of more processes


@dataclass(frozen=True)
class ListedBackbone:
    """An architecture at its default levels.

    Attributes:
        name: timm's.
        kind: ``pyramid`` or ``transformer``.
        levels: by timm's numbers.
        strides: of the levels, in pixels of the canvas.
        channels: of the maps.
        canvas: (H, W) that operations were counted at: the one asked for, rounded up to what the
            architecture needs, or its own if it takes no other.
        multiple: of which the sides of a canvas must be multiples; None: it takes its own size
            alone.
        parameters: of the network up to its deepest level.
        flops: of one image, a multiplication and its addition being two.
        mean, std: what the weights expect, for RGB in [0, 1].
    """

    name: str
    kind: str
    levels: tuple[int, ...]
    strides: tuple[int, ...]
    channels: tuple[int, ...]
    canvas: tuple[int, int]
    multiple: int | None
    parameters: int
    flops: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def names_like(pattern: str | None) -> list[str]:
    """timm's architectures whose names match a glob, or contain a text; None: all of them.

    A name with a tag of its weights, such as ``resnet18.a1_in1k``, is one itself.

    Raises:
        SettingsError: there is none.
    """
    import timm

    names: list[str] = timm.list_models()
    if pattern is None:
        return names
    if timm.is_model(pattern):
        return [pattern]
    glob = pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}*"
    found = fnmatch.filter(names, glob)
    if not found:
        raise SettingsError(f"No timm model matches {pattern!r}.{nearest(pattern, names)}")
    return found


def listed(name: str, size: tuple[int, int]) -> ListedBackbone | None:
    """What there is to say about an architecture; None if it can't serve.

    Args:
        name: timm's.
        size: (height, width) of the network's input that a user wants.
    """
    wanted = {"backbone.name": name, "image.height": size[0], "image.width": size[1]}
    try:
        settings = resolved(replaced(DetectorSettings(), wanted))
        facts = facts_of(architecture_of(settings.backbone))
    except SettingsError:
        return None
    canvas, multiple = settings.image.size, settings.image.multiple
    if not takes(facts.name, settings.backbone.level_numbers, canvas):
        canvas, multiple = facts.input_size, None
    try:
        return _row(settings, cost_of(settings.backbone, canvas), canvas, multiple)
    except SettingsError:
        return None


def _row(
    settings: DetectorSettings, cost: BackboneCost, canvas: tuple[int, int], multiple: int | None
) -> ListedBackbone:
    facts = facts_of(architecture_of(settings.backbone))
    levels = settings.backbone.level_numbers
    return ListedBackbone(
        name=settings.backbone.name,
        kind=facts.kind,
        levels=levels,
        strides=tuple(facts.reductions[level] for level in levels),
        channels=tuple(facts.channels[level] for level in levels),
        canvas=canvas,
        multiple=multiple,
        parameters=cost.parameters,
        flops=cost.flops,
        mean=facts.mean,
        std=facts.std,
    )


def list_backbones(
    names: Sequence[str], size: tuple[int, int], workers: int
) -> Iterator[ListedBackbone | None]:
    """:func:`listed` for each name, in their order, as they are found.

    Args:
        names: timm's.
        size: (height, width) that a user wants.
        workers: processes; few names are done in this one.
    """
    if len(names) <= _FEW or workers < 2:
        yield from map(listed, names, repeat(size))
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["timm", __name__])
    with ProcessPoolExecutor(workers, context) as pool:
        yield from pool.map(listed, names, repeat(size), chunksize=4)
