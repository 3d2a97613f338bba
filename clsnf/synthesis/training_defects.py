"""Synthetic training defects: Perlin regions filled from textures or other normal images (DRAEM).

The method is that of DRAEM (Zavrtanik et al., ICCV 2021). Defects are made for a whole batch at a
time, on the device that the batch is on. There is no generator with a state: all randomness of a
sample comes from its key (:func:`sample_key`), so batch size, order and the number of workers do
not change a defect. Source pixels are looked up and changed only inside the regions. Called by the
streams of the finetuning stage; validation defects have a generator of their own
(:mod:`clsnf.synthesis.validation_defects`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from clsnf.core.config import DefectSettings
from clsnf.core.errors import DataError
from clsnf.core.pixels import to_floats
from clsnf.synthesis.augment import (
    UNIFORMS_A_SAMPLE,
    ColourChanges,
    count_levels,
    draw_colour_changes,
)
from clsnf.synthesis.fill import SourceView, fill, look_up_channels, places_of, put_channels
from clsnf.synthesis.keyed_random import hash_keys, random_bytes, random_uniforms
from clsnf.synthesis.perlin import lattice_side, perlin_regions

_NUMBERS, _COLOURS, _LATTICE = 1, 2, 3  # streams of random numbers of one key


@dataclass(frozen=True)
class DefectBatch:
    """B images with defects, and what a network learns from them.

    Attributes:
        images: float32 (B, 3, H, W) in [0, 1], with the defects.
        regions: bool (B, H, W), True on the defect. With an empty region an image is exactly its
            clean one.
        clean: float32 (B, 3, H, W) in [0, 1], without defects.
    """

    images: Tensor
    regions: Tensor
    clean: Tensor

    def region_pixels(self) -> Tensor:
        """The images inside the regions, float32 (3, K).

        With the normal images and the regions, they say everything about the batch.
        """
        return look_up_channels(self.images, places_of(self.regions))

    @classmethod
    def from_region_pixels(cls, images: Tensor, regions: Tensor, pixels: Tensor) -> DefectBatch:
        """The batch again, from what :meth:`region_pixels` gave.

        Args:
            images: the normal images, uint8 (B, 3, H, W).
            regions: bool (B, H, W).
            pixels: float32 (3, K).
        """
        clean = to_floats(images)
        defective = clean.clone()
        put_channels(defective, places_of(regions), pixels)
        return cls(defective, regions, clean)


def sample_key(seed: int, epoch: int, image: ArrayLike, repeat: ArrayLike = 0) -> NDArray[np.int64]:
    """The keys of N training samples, int64 (N,).

    A key is a hash of the run's seed, the epoch, the image and its repeat in that epoch. ``image``
    and ``repeat`` are integers, or arrays that broadcast; scalars give shape (1,). Take the number
    of an image from its content, not from its place in a list: then it keeps its defects when other
    images join.
    """
    return hash_keys(seed, epoch, image, repeat)


@dataclass(frozen=True)
class _Draw:
    """The random choices of B samples.

    What steers the work lies on the CPU; what works on pixels lies on the batch's device.
    """

    frequency: Tensor  # float64 (B, 2), CPU: lattice cells over height and width
    angle: Tensor  # float64 (B,), CPU: radians
    phase: Tensor  # float64 (B, 2), CPU: lattice cells
    lattice: Tensor  # uint8 (B, P * P)
    from_texture: NDArray[np.bool_]  # (B,)
    source: Tensor  # int64 (B,): which texture or which donor
    transposed: Tensor  # bool (B,)
    shift: Tensor  # int64 (B, 2): rows and columns
    opacity: Tensor  # float32 (B,)


class DefectMaker:
    """Makes synthetic defects for the normal images of one category.

    An image is never its own donor. With fewer than two donors, textures fill all defects.

    Args:
        settings: how often, how large and how opaque.
        textures: uint8 (T, 3, H, W), see :mod:`clsnf.synthesis.textures`.
        donors: uint8 (M, 3, H, W), normal images of the category.

    Raises:
        DataError: the settings ask for textures, and there are none.
    """

    def __init__(self, settings: DefectSettings, textures: Tensor, donors: Tensor) -> None:
        self.settings = settings
        self.textures = textures.contiguous()
        self.donors = donors.contiguous()
        self._texture_share = settings.texture_share if len(donors) > 1 else 1.0
        if self._texture_share > 0 and not len(textures):
            needed = [
                *(["bring two or more normal images"] if len(donors) < 2 else []),
                *(["set texture_share to 0"] if settings.texture_share > 0 else []),
            ]
            raise DataError(
                f"No textures to fill defects from, and {len(donors)} normal images with "
                f"texture_share {settings.texture_share}: give a texture folder, draw textures, or "
                f"{' and '.join(needed)}."
            )
        self._texture_counts = count_levels(textures)
        self._donor_counts = count_levels(donors)

    def make(self, images: Tensor, object_masks: Tensor | None, keys: Tensor) -> DefectBatch:
        """Put a defect into each of B normal images.

        Textures, donors, images and masks are on one device.

        Args:
            images: uint8 (B, 3, H, W), of the size of the textures and donors.
            object_masks: bool (B, H, W), where defects may lie; None for everywhere.
            keys: int64 (B,) from :func:`sample_key`.

        Raises:
            DataError: the images have another size than the textures or donors.
            ValueError: there is not one key for each image.
        """
        self._check(images, keys)
        size = (images.shape[2], images.shape[3])
        words = keys.cpu().numpy()
        draw = self._draw(words, images)
        regions = perlin_regions(
            size, draw.lattice, draw.frequency, draw.angle, draw.phase, self.settings.threshold
        )
        if object_masks is not None:
            regions &= object_masks
        changes = draw_colour_changes(
            random_uniforms(words, _COLOURS, UNIFORMS_A_SAMPLE),
            self._level_counts(draw),
            images.device,
        )
        clean = to_floats(images)
        defective = clean.clone()
        self._fill(defective, regions, draw, changes)
        return DefectBatch(defective, regions, clean)

    def _check(self, images: Tensor, keys: Tensor) -> None:
        if keys.shape != images.shape[:1]:
            raise ValueError(
                f"There are {tuple(keys.shape)} keys for {len(images)} images: give one for each."
            )
        for name, sources in (("textures", self.textures), ("normal images", self.donors)):
            if len(sources) and sources.shape[1:] != images.shape[1:]:
                have, need = tuple(sources.shape[1:]), tuple(images.shape[1:])
                raise DataError(
                    f"The {name} to fill defects from are {have} (C, H, W), the images {need}: "
                    "load both at one size."
                )

    def _draw(self, keys: NDArray[np.int64], images: Tensor) -> _Draw:
        power, device = self.settings.max_frequency_power, images.device
        side = lattice_side(power)
        u = torch.from_numpy(random_uniforms(keys, _NUMBERS, 12))
        from_texture = u[:, 5] < self._texture_share
        texture, donor = (u[:, 6] * len(self.textures)).long(), (u[:, 7] * len(self.donors)).long()
        donor = self._not_itself(donor.to(device), images)
        shift = (u[:, 9:11] * (2 * torch.tensor(images.shape[2:]))).long()
        return _Draw(
            frequency=((power + 1) * u[:, 0:2]).floor().exp2(),
            angle=math.pi * (u[:, 2] - 0.5),
            phase=side * u[:, 3:5],
            lattice=torch.from_numpy(random_bytes(keys, _LATTICE, side * side)).to(device),
            from_texture=from_texture.numpy(),
            source=torch.where(from_texture.to(device), texture.to(device), donor),
            # A donor stays where it is, so that a defect shows another product's part at its own
            # place. Textures have no place.
            transposed=(from_texture & (u[:, 8] < 0.5)).to(device),
            shift=torch.where(from_texture[:, None], shift, 0).to(device),
            opacity=(1 - self.settings.max_transparency * u[:, 11]).float().to(device),
        )

    def _not_itself(self, donor: Tensor, images: Tensor) -> Tensor:
        """The donors, int64 (B,), with the next one in line where a donor is the image itself.

        Images are compared on a grid of about 32 x 32 pixels, which is enough.
        """
        if not len(self.donors):
            return donor
        down, across = (max(1, side // 32) for side in images.shape[2:])
        same = (
            (self.donors[donor, :, ::down, ::across] == images[:, :, ::down, ::across])
            .flatten(1)
            .all(1)
        )
        return torch.where(same, (donor + 1) % len(self.donors), donor)

    def _level_counts(self, draw: _Draw) -> NDArray[np.int64]:
        """How often each level occurs in each sample's source, int64 (B, 3, 256)."""
        source = draw.source.cpu().numpy()
        counts = np.empty((len(source), 3, 256), np.int64)
        for level_counts, chosen in (
            (self._texture_counts, draw.from_texture),
            (self._donor_counts, ~draw.from_texture),
        ):
            counts[chosen] = level_counts[source[chosen]]
        return counts

    def _fill(self, images: Tensor, regions: Tensor, draw: _Draw, changes: ColourChanges) -> None:
        """Blend the changed sources into the regions of ``images`` (float32, in place)."""
        for sources, uses_them in (
            (self.textures, draw.from_texture),
            (self.donors, ~draw.from_texture),
        ):
            numbers = np.flatnonzero(uses_them)
            samples = torch.from_numpy(numbers).to(images.device)
            view = SourceView.of(
                sources, draw.source[samples], draw.transposed[samples], draw.shift[samples]
            )
            fill(images, regions, numbers, view, changes.of(numbers), draw.opacity[samples])
