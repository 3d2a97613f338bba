"""The saturated per-region overlap, sPRO (Bergmann et al., IJCV 130, 2022): its regions and curve.

A region is found whole as soon as so many of its pixels are found as its annotation says: where one
of several equal things is missing, any of their places will do. Regions may overlap. Without an
annotation, a region must be found whole, and sPRO is PRO.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clsnf.metrics.samples import Map, PixelSample


@dataclass(frozen=True, eq=False)
class ImageRegions:
    """The regions of one image, E pixels in S regions; a pixel may lie in several.

    pixel: (E,) which of the image's defect pixels, row by row.
    region: (E,) the region that it lies in.
    enough: (S,) how many pixels saturate each, from 1 to its size.
    """

    pixel: NDArray[np.intp]
    region: NDArray[np.intp]
    enough: NDArray[np.int64]

    def gains(self, scores: Map) -> NDArray[np.float64]:
        """What each pixel adds to its region's saturated overlap, (E,), 1 in all for a region.

        scores: (E,) of the pixels. The highest count until the region is saturated; among equal
        scores it makes no difference which ones.
        """
        order = np.lexsort((-scores, self.region))
        region = self.region[order]
        first = np.searchsorted(region, np.arange(len(self.enough)))
        rank = np.arange(len(region)) - first[region]
        gains = np.empty(len(region))
        gains[order] = (rank < self.enough[region]) / self.enough[region]
        return gains


def annotated_regions(sample: PixelSample) -> ImageRegions | None:
    """The regions of a checked sample's annotation, without pixels that don't count; None without
    one.
    """
    if sample.regions is None:
        return None
    pixels = [np.flatnonzero(region.mask[sample.mask]) for region in sample.regions]
    enough = [region.saturation for region in sample.regions]
    kept = [(p, min(e, len(p))) for p, e in zip(pixels, enough, strict=True) if len(p)]
    return ImageRegions(
        np.concatenate([p for p, _ in kept]),
        np.repeat(np.arange(len(kept)), [len(p) for p, _ in kept]),
        np.array([e for _, e in kept], np.int64),
    )


def connected_regions(region: NDArray[np.integer]) -> ImageRegions:
    """An image's connected regions, each of which must be found whole.

    region: (P,) the region of each defect pixel, from 0 on.
    """
    return ImageRegions(
        np.arange(len(region)), region.astype(np.intp), np.bincount(region).astype(np.int64)
    )


def joined(images: Sequence[ImageRegions], pixels: Sequence[int]) -> ImageRegions:
    """The regions of several images as those of one.

    pixels: the number of defect pixels of each image.
    """
    before = np.cumsum([0, *pixels])
    counted = np.cumsum([0, *(len(image.enough) for image in images)])
    return ImageRegions(
        np.concatenate([one.pixel + start for one, start in zip(images, before, strict=False)]),
        np.concatenate([one.region + start for one, start in zip(images, counted, strict=False)]),
        np.concatenate([one.enough for one in images]),
    )
