"""What timm says about an architecture, before any weights are read.

Nothing here allocates a network's parameters: modules are built on the meta device, which knows
shapes alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from clsnf.core.config import BackboneSettings
from clsnf.core.errors import SettingsError, first_line, nearest
from clsnf.model.weights_files import DEMO, demo_assets

PYRAMID, TRANSFORMER = "pyramid", "transformer"


@dataclass(frozen=True)
class ArchitectureFacts:
    """An architecture's feature levels, and what its pretrained weights expect.

    Attributes:
        name: timm's.
        kind: ``transformer`` where all levels have one stride (plain vision transformers and their
            kind), else ``pyramid``.
        reductions: the stride of each level in pixels of the image, by timm's numbers of levels.
        channels: of each level.
        input_size: (H, W) that the weights were trained at.
        mean, std: of the weights, for RGB in [0, 1].
        interpolation: by which the weights' images were resized: ``bilinear`` or ``bicubic``.
    """

    name: str
    kind: str
    reductions: tuple[int, ...]
    channels: tuple[int, ...]
    input_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str


def architecture_of(settings: BackboneSettings) -> str:
    """timm's name of the architecture (the demo backbone has one too).

    Raises:
        SettingsError: timm knows no such model, or no such tag of it.
    """
    import timm

    name: str = demo_assets()[0]["architecture"] if settings.name == DEMO else settings.name
    if not timm.is_model(name):
        raise SettingsError(
            f"There is no timm model {name!r}.{nearest(name, [*timm.list_models(), DEMO])}"
        )
    plain, _, tag = name.partition(".")
    tagged = timm.list_models(f"{plain}.*", include_tags=True)
    if tag and name not in tagged:
        raise SettingsError(f"timm has no weights {name!r}.{nearest(name, [*tagged, plain])}")
    return name


@lru_cache(maxsize=64)
def facts_of(architecture: str) -> ArchitectureFacts:
    """The facts of an architecture, with a tag of its weights or without.

    Raises:
        SettingsError: it gives no feature maps.
    """
    import timm
    from timm.models import PretrainedCfg

    try:
        with torch.device("meta"):
            levels: list[dict[str, Any]] = timm.create_model(
                architecture, features_only=True
            ).feature_info.info  # type: ignore[assignment, union-attr]
    # Architectures refuse in many ways, and a few fail at what they announce.
    except Exception as error:
        raise SettingsError(
            f"Backbone {architecture!r} gives no feature maps ({first_line(error)}): choose "
            "another (clsnf backbones lists them)."
        ) from error
    reductions = tuple(int(level["reduction"]) for level in levels)
    is_flat = len(reductions) > 1 and len(set(reductions)) == 1
    weights = timm.get_pretrained_cfg(architecture) or PretrainedCfg()
    return ArchitectureFacts(
        name=architecture,
        kind=TRANSFORMER if is_flat else PYRAMID,
        reductions=reductions,
        channels=tuple(int(level["num_chs"]) for level in levels),
        input_size=(weights.input_size[1], weights.input_size[2]),
        mean=tuple(weights.mean),
        std=tuple(weights.std),
        interpolation=known_interpolation(weights.interpolation),
    )


def known_interpolation(name: str | None) -> str:
    """timm's name of an interpolation as one that images are resized by here."""
    return "bilinear" if name == "bilinear" else "bicubic"


# The strides of a pyramid's default levels: finer ones are too many vectors, coarser ones no longer
# say where a defect is.
_STRIDES = range(4, 17)
# The default band of a transformer, as shares of its depth (docs/backbones.md has the figures).
DEFAULT_SHARES = (0.25, 0.5, 0.75)


def default_levels(facts: ArchitectureFacts) -> tuple[int | float, ...]:
    """The levels that suit an architecture's kind.

    Of a pyramid the deepest level of each stride from 4 to 16 pixels, or, where it has none, its
    first; of a transformer a band in the middle of its depth.
    """
    if facts.kind == TRANSFORMER:
        return DEFAULT_SHARES
    deepest = {stride: level for level, stride in enumerate(facts.reductions) if stride in _STRIDES}
    return tuple(sorted(deepest.values())) or (0,)


def numbers_of_levels(levels: tuple[int | float, ...], facts: ArchitectureFacts) -> tuple[int, ...]:
    """Levels by timm's numbers, rising; shares of the depth become the level that ends there.

    Raises:
        SettingsError: the architecture has not those levels.
    """
    depth = len(facts.reductions)
    numbers = [max(0, round(v * depth) - 1) if isinstance(v, float) else v for v in levels]
    if max(numbers) >= depth:
        raise SettingsError(
            f"Backbone {facts.name!r} has levels 0 to {depth - 1}, not {max(numbers)}: choose "
            "others with --levels, or shares of its depth such as 0.4,0.6,0.8."
        )
    return tuple(sorted(set(numbers)))
