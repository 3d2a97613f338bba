"""Settings: one frozen, validated dataclass per stage.

The command line's flags, the YAML keys and the tables in ``docs/settings.md`` are all made from these classes: a field's ``help``
is its documentation. Unusual: a settings object is *content*. Its canonical form (:func:`to_dict`) is hashed into the names of
stored stages, so a field that does not change a result must not live here.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from clsnf.errors import SettingsError, nearest

T = TypeVar("T")


def setting(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    """A dataclass field with its one-line documentation and, for strings, the valid choices."""
    return field(default=default, metadata={"help": help, "choices": choices})


def _check(owner: object, name: str, ok: bool, rule: str) -> None:
    if not ok:
        raise SettingsError(f"{type(owner).__name__}.{name} is {getattr(owner, name)!r}: it must be {rule}.")


def _check_choices(owner: Any) -> None:
    for f in dataclasses.fields(owner):
        choices = f.metadata.get("choices")
        value = getattr(owner, f.name)
        if choices and value not in choices:
            raise SettingsError(f"{type(owner).__name__}.{f.name} is {value!r}.{nearest(str(value), choices)}")


@dataclass(frozen=True)
class ImageSettings:
    """How an image file becomes the network's input: the same for training, prediction and serving."""

    height: int = setting(256, "height of the network's input in pixels")
    width: int = setting(256, "width of the network's input in pixels")
    aspect: str = setting(
        "squeeze",
        "squeeze: resize to height x width whatever the shape; fit: keep the shape and pad (padding counts as no pixel)",
        ("squeeze", "fit"),
    )

    def __post_init__(self) -> None:
        _check_choices(self)
        for name in ("height", "width"):
            value = getattr(self, name)
            _check(self, name, isinstance(value, int) and 32 <= value <= 4096 and value % 32 == 0, "a multiple of 32 from 32 to 4096")

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.height, self.width


@dataclass(frozen=True)
class BackboneSettings:
    """The shared feature extractor, a timm architecture."""

    name: str = setting("resnet18", "a timm model name, or 'demo' for the small backbone that ships with clsnf")
    levels: tuple[int, ...] = setting((1, 2, 3), "timm's feature stages to use, shallow to deep (ResNets: 1, 2, 3, 4 = strides 4, 8, 16, 32)")
    weights: str | None = setting(None, "a weights file (.safetensors, .pth, .pt, .bin); without it, timm's pretrained weights")

    def __post_init__(self) -> None:
        _check(self, "name", bool(self.name), "a timm model name")
        ok = len(self.levels) > 0 and all(isinstance(v, int) and v >= 0 for v in self.levels)
        _check(self, "levels", ok and list(self.levels) == sorted(set(self.levels)), "different stages in rising order, such as 1,2,3")


@dataclass(frozen=True)
class DefectSettings:
    """Synthetic training defects (METHOD: DRAEM's recipe)."""

    max_transparency: float = setting(0.8, "defects are blended in with opacity 1 - b, b uniform in [0, this]")
    texture_share: float = setting(0.5, "share of defects filled from textures; the rest from other normal images of the category")
    object_mask: str = setting(
        "auto", "cut defects to the product: auto decides from the normal images; off, dark (a dark product), bright",
        ("auto", "off", "dark", "bright"),
    )
    max_frequency_power: int = setting(5, "Perlin noise: each axis's frequency is drawn from 2^0 to 2^this")
    threshold: float = setting(0.5, "Perlin noise above this is defect")

    def __post_init__(self) -> None:
        _check_choices(self)
        _check(self, "max_transparency", 0 <= self.max_transparency < 1, "in [0, 1)")
        _check(self, "texture_share", 0 <= self.texture_share <= 1, "in [0, 1]")
        _check(self, "max_frequency_power", 0 <= self.max_frequency_power <= 7, "from 0 to 7")
        _check(self, "threshold", 0 < self.threshold < 1, "in (0, 1)")
