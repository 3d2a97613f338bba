"""What the pixel metrics read: score maps with their masks, at the masks' own size, checked once.

Nothing here holds more than one map. A data set is any *re-iterable* of :class:`PixelSample`. The
counting passes over it at most twice, so a caller with small maps hands over a :class:`LazySamples`
that upsamples when asked. Called by :mod:`clsnf.metrics.pixels`; callers outside make the samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clsnf.core.errors import MetricError

Map = NDArray[np.float32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Region:
    """One annotated region of an image; regions may overlap.

    mask: (H, W) bool.
    saturation: how many of its pixels are enough, 1 or more; at its area or above, all of them.
    """

    mask: Mask
    saturation: int


@dataclass(frozen=True, eq=False)
class PixelSample:
    """One image's scores and truth, at the mask's own size; sizes may differ from image to image.

    score_map: (H, W) float32, finite where valid; higher = more of a defect. Compared exactly, as
        float32.
    mask: (H, W) bool, True on defect pixels; all False for a normal image.
    valid: (H, W) bool or None (all valid). False pixels, padding for instance, count as no pixel at
        all: neither as defect nor as background, nor do they join two regions; what the map holds
        there is never looked at.
    regions: what the saturated overlap counts; their union is the mask. None: the mask's
        8-connected regions, each of which must be found whole. No other metric reads them.
    """

    score_map: Map
    mask: Mask
    valid: Mask | None = None
    regions: tuple[Region, ...] | None = None


@dataclass(frozen=True)
class LazySamples:
    """A re-iterable that makes each sample when it is asked for: one map is in memory at a time.

    load: image index in [0, count) -> PixelSample; called up to twice per image, and must give the
        same each time.
    """

    load: Callable[[int], PixelSample]
    count: int

    def __iter__(self) -> Iterator[PixelSample]:
        return (self.load(index) for index in range(self.count))


def read_samples(samples: Iterable[PixelSample]) -> Iterator[PixelSample]:
    """One pass over ``samples``, each one checked.

    Yields the samples with ``mask`` cut to ``valid``: a defect pixel that does not count is no
    defect pixel.

    Raises MetricError, with the image's index: a one-shot iterator, wrong dtypes, shapes that
    differ, an image without pixels, scores that are not finite, a mask whose defect pixels are all
    invalid, regions that are not the mask's.
    """
    if isinstance(samples, Iterator):
        raise MetricError(
            f"samples is a {type(samples).__name__}, which can be read only once: the pixel "
            "metrics pass over it twice; give a list or LazySamples."
        )
    for index, sample in enumerate(samples):
        yield _checked(sample, index)


def _checked(sample: PixelSample, index: int) -> PixelSample:
    score_map, mask, valid = sample.score_map, sample.mask, sample.valid
    _check_array("score map", score_map, np.dtype(np.float32), score_map.shape, index)
    _check_array("mask", mask, np.dtype(np.bool_), score_map.shape, index)
    defects = mask
    if valid is not None:
        _check_array("valid mask", valid, np.dtype(np.bool_), score_map.shape, index)
        defects = mask & valid
        if mask.any() and not defects.any():
            raise MetricError(
                f"image {index} has regions without pixels: all {int(mask.sum())} defect pixels "
                "of its mask are marked invalid; check its valid mask."
            )
    if score_map.size == 0 or (valid is not None and not valid.any()):
        raise MetricError(
            f"image {index} has no pixel that counts (shape {score_map.shape}): leave it out."
        )
    finite = np.isfinite(score_map)
    if valid is not None:
        finite |= ~valid
    if not finite.all():
        row, column = np.argwhere(~finite)[0]
        raise MetricError(
            f"the score map of image {index} holds {score_map[row, column]} at row {row}, column "
            f"{column}: scores must be finite; mend the model that made it."
        )
    if sample.regions is not None:
        _check_regions(sample.regions, mask, index)
    return PixelSample(score_map, defects, valid, sample.regions)


def _check_regions(regions: tuple[Region, ...], mask: Mask, index: int) -> None:
    together = np.zeros_like(mask)
    for region in regions:
        _check_array("region", region.mask, np.dtype(np.bool_), mask.shape, index)
        together |= region.mask
        if region.saturation < 1 or not region.mask.any():
            raise MetricError(
                f"image {index} has a region of {int(region.mask.sum())} pixels that is saturated "
                f"at {region.saturation}: both must be 1 or more."
            )
    if not np.array_equal(together, mask):
        raise MetricError(
            f"the regions of image {index} are not its mask: their union must be; give None for "
            "the mask's connected regions."
        )


def _check_array(
    what: str, array: np.ndarray, dtype: np.dtype, shape: tuple[int, ...], index: int
) -> None:
    """Refuse an array of another dtype or shape.

    A uint8 mask would be inverted bitwise, and a float64 map compared at another precision.
    """
    if not isinstance(array, np.ndarray) or array.dtype != dtype:
        given = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        raise MetricError(
            f"the {what} of image {index} is {given}: it must be a numpy array of {dtype}."
        )
    if array.ndim != 2 or array.shape != shape:
        wanted = f"{shape}, the score map's" if what != "score map" else "(H, W)"
        raise MetricError(
            f"the {what} of image {index} has shape {array.shape}: it must be {wanted}; resize "
            "the map to the mask."
        )
