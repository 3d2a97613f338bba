"""Colour changes of a defect's source: three different ones of nine, drawn for each sample.

They are computed only where the defect will be. Gamma, brightness, solarize, posterize, invert,
autocontrast and equalize act on each channel's levels alone, so all of them that a sample draws
become one table of 256 levels for each channel. Autocontrast and equalize need no more than how
often each level occurs in the source, which is counted once. At the defect's pixels a sample's
changes are applied in one order: sharpness (it needs the neighbours), levels, hue and saturation
(they need the channels together). So the cost depends on the defect's area, not on the image's. The
ranges are those of DRAEM's public recipe or close to them.

To add a change of levels, write one function and one line in :data:`LEVEL_CHANGES`. Called by
:mod:`clsnf.synthesis.training_defects`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Levels = NDArray[np.float64]  # (n, 3, 256) or (1, 1, 256): the level 0..255 that each level becomes
Uniforms = NDArray[np.float64]  # (n, 4) in [0, 1): a change's own random numbers
Counts = NDArray[np.int64]  # (n, 3, 256): how many pixels of the source have each level now

_RAMP: Levels = np.arange(256, dtype=np.float64)[None, None, :]


def gamma(u: Uniforms, counts: Counts) -> Levels:
    """v^g in each channel, with its own g from 1/2 to 2, so that grey sources take on a tint."""
    return 255 * (_RAMP / 255) ** (2 ** (2 * u[:, :3, None] - 1))


def brightness(u: Uniforms, counts: Counts) -> Levels:
    """Levels times 0.8 to 1.2, plus -30 to 30."""
    return _RAMP * (0.8 + 0.4 * u[:, 0, None, None]) + (60 * u[:, 1, None, None] - 30)


def solarize(u: Uniforms, counts: Counts) -> Levels:
    """Invert the levels from a threshold on, which is 32 to 128."""
    threshold = 32 + 96 * u[:, 0, None, None]
    return np.where(threshold > _RAMP, _RAMP, 255 - _RAMP)


def posterize(u: Uniforms, counts: Counts) -> Levels:
    """Keep the 1 to 5 highest bits."""
    kept = 1 + np.floor(5 * u[:, 0, None, None])
    step = 2 ** (8 - kept)
    return np.floor(_RAMP / step) * step


def invert(u: Uniforms, counts: Counts) -> Levels:
    """255 - v."""
    return 255 - _RAMP


def autocontrast(u: Uniforms, counts: Counts) -> Levels:
    """Stretch each channel to the full range, cutting off 0 to 10 % of the pixels at either end."""
    share = np.cumsum(counts, axis=2) / counts.sum(axis=2, keepdims=True)
    cut = 0.1 * u[:, 0, None, None]
    low = (share > cut).argmax(axis=2)[..., None]
    high = (share >= 1 - cut).argmax(axis=2)[..., None]
    return np.where(high > low, (_RAMP - low) * 255 / np.maximum(high - low, 1), _RAMP)


def equalize(u: Uniforms, counts: Counts) -> Levels:
    """Make each channel's levels equally frequent.

    A level becomes the share of pixels at or below it, counted from the darkest level that occurs.
    """
    share = np.cumsum(counts, axis=2) / counts.sum(axis=2, keepdims=True)
    darkest = np.take_along_axis(share, (counts > 0).argmax(axis=2)[..., None], axis=2)
    return np.where(darkest < 1, (share - darkest) * 255 / np.maximum(1 - darkest, 1e-12), _RAMP)


LEVEL_CHANGES: dict[str, Callable[[Uniforms, Counts], Levels]] = {
    "gamma": gamma,
    "brightness": brightness,
    "solarize": solarize,
    "posterize": posterize,
    "invert": invert,
    "autocontrast": autocontrast,
    "equalize": equalize,
}
CHANGE_NAMES = (*LEVEL_CHANGES, "sharpness", "hue and saturation")
CHANGES_A_SAMPLE = 3
UNIFORMS_A_SAMPLE = len(CHANGE_NAMES) + 4 * CHANGES_A_SAMPLE
SHARPENED, RECOLOURED = 1, 2  # bits: what a sample's pixels need besides the table of levels


@dataclass(frozen=True)
class ColourChanges:
    """What happens to the colours of n samples, in the order sharpness, levels, colours.

    Attributes:
        kinds: int64 (n,), made of the bits SHARPENED and RECOLOURED; what isn't set can be skipped.
        sharpness: float32 (n,), 0 is smooth, 1 leaves the image as it is, 3 is the most.
        levels: uint8 (n, 3, 256), what each level becomes.
        colours: float32 (n, 3), what a channel takes from itself, from the next channel and from
            the one after that; (1, 0, 0) leaves the image as it is.
    """

    kinds: NDArray[np.int64]
    sharpness: Tensor
    levels: Tensor
    colours: Tensor

    def of(self, samples: NDArray[np.int64]) -> ColourChanges:
        """The changes of some of the samples."""
        return ColourChanges(
            self.kinds[samples],
            self.sharpness[samples],
            self.levels[samples],
            self.colours[samples],
        )


def count_levels(images: Tensor) -> Counts:
    """How many pixels have each level: uint8 (N, 3, H, W) -> int64 (N, 3, 256)."""
    counts = torch.empty(len(images), 3, 256, dtype=torch.int64)
    offset = 256 * torch.arange(3, device=images.device, dtype=torch.int32)[:, None]
    for image, into in zip(
        images, counts, strict=True
    ):  # one at a time: the int32 copy is four times the image
        into.copy_(
            torch.bincount((image.flatten(1).int() + offset).flatten(), minlength=768).view(3, 256)
        )
    return counts.numpy()


def draw_colour_changes(
    uniforms: NDArray[np.float64], counts: Counts, device: torch.device
) -> ColourChanges:
    """Draw three different changes for each of n samples.

    Args:
        uniforms: float64 (n, UNIFORMS_A_SAMPLE) in [0, 1), the samples' random numbers.
        counts: int64 (n, 3, 256), how many pixels of each sample's source have each level.
        device: where the changes will be applied.
    """
    ranks, numbers = uniforms[:, : len(CHANGE_NAMES)], uniforms[:, len(CHANGE_NAMES) :]
    chosen = np.argsort(ranks, axis=1)[:, :CHANGES_A_SAMPLE]
    numbers = numbers.reshape(-1, CHANGES_A_SAMPLE, 4)
    levels = np.broadcast_to(np.arange(256, dtype=np.uint8), (len(chosen), 3, 256)).copy()
    counts = counts.copy()
    sharpness = np.ones(len(chosen), np.float32)
    colours = np.tile(np.array([1, 0, 0], np.float32), (len(chosen), 1))
    kinds = np.zeros(len(chosen), np.int64)
    for turn in range(CHANGES_A_SAMPLE):
        for index, name in enumerate(CHANGE_NAMES):
            rows = np.flatnonzero(chosen[:, turn] == index)
            if not len(rows):
                continue
            u = numbers[rows, turn]
            if name in LEVEL_CHANGES:
                levels[rows], counts[rows] = _followed_by(
                    levels[rows], counts[rows], LEVEL_CHANGES[name](u, counts[rows])
                )
            elif name == "sharpness":
                sharpness[rows] = 3 * u[:, 0]
                kinds[rows] |= SHARPENED
            else:
                colours[rows] = _hue_and_saturation(2 * math.pi * u[:, 0], 2 ** (3 * u[:, 1] - 2))
                kinds[rows] |= RECOLOURED
    on_device = (torch.from_numpy(part).to(device) for part in (sharpness, levels, colours))
    return ColourChanges(kinds, *on_device)


def _followed_by(
    levels: NDArray[np.uint8], counts: Counts, change: Levels
) -> tuple[NDArray[np.uint8], Counts]:
    """Levels and counts after one more change of levels."""
    becomes = np.broadcast_to(np.rint(np.clip(change, 0, 255)), levels.shape).astype(np.uint8)
    bins = np.arange(counts.size // 256).reshape(-1, 3, 1) * 256 + becomes
    moved = (
        np.bincount(bins.ravel(), weights=counts.ravel(), minlength=counts.size)
        .astype(np.int64)
        .reshape(counts.shape)
    )
    return np.take_along_axis(becomes, levels, axis=2), moved


def _hue_and_saturation(
    turn: NDArray[np.float64], saturation: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Coefficients (n, 3) that turn colours about the grey axis and scale their distance from it.

    ``turn`` is in radians. The matrix s R + (1 - s) J / 3, with Rodrigues' rotation R about (1, 1,
    1), the saturation s and J all ones, is circulant: three numbers describe it.
    """
    cos, sin = np.cos(turn), np.sin(turn) / math.sqrt(3)
    rotation = np.stack([(1 + 2 * cos) / 3, (1 - cos) / 3 - sin, (1 - cos) / 3 + sin], axis=1)
    return saturation[:, None] * rotation + (1 - saturation[:, None]) / 3
