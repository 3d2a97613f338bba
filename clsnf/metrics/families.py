"""Pixel counts of several defect families with the same normals, for maps in memory.

A family's counts are those of :func:`clsnf.metrics.pixels.count_pixels` on all normals and the
family's images, to the last bit. The normals' pixels are sorted once, not once for each family, and
what depends on masks alone is worked out once for any number of maps. Selection calls it, for every
fusion weight.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from clsnf.metrics.pixels import (
    PixelCounts,
    Regions,
    check_labels,
    counts_of,
    find_regions,
    slot_counts,
    sort_defects,
)
from clsnf.metrics.samples import Map, PixelSample, read_samples


class FamilyPixels:
    """The masks of some normals and of defect families.

    masks: (N, H, W) bool.
    valid: (N, H, W) bool or None, as in :class:`~clsnf.metrics.samples.PixelSample`.
    normals: (M,) indices of the images without defects; may be none.
    families: name -> indices of its images, all with defects.

    Raises MetricError, with the image's index among the normals and the family's images: masks that
    contradict this, no defect pixel, or no defect-free pixel.
    """

    def __init__(
        self,
        masks: NDArray[np.bool_],
        valid: NDArray[np.bool_] | None,
        normals: NDArray[np.intp],
        families: Mapping[str, NDArray[np.intp]],
    ) -> None:
        self._masks = masks if valid is None else masks & valid
        self._valid = valid
        self._normals = normals
        self._families = dict(families)
        nothing = np.zeros(masks.shape[1:], np.float32)
        self._regions: dict[str, Regions] = {}
        for name, members in self._families.items():
            chosen = [*normals, *members]
            samples = [
                PixelSample(nothing, masks[i], None if valid is None else valid[i]) for i in chosen
            ]
            found = find_regions(read_samples(samples))
            check_labels(np.arange(len(chosen)) >= len(normals), found.sizes)
            self._regions[name] = found

    def count(self, maps: NDArray[np.float32], with_rates: bool = True) -> dict[str, PixelCounts]:
        """The counts of each family.

        maps: (N, H, W) float32, finite where valid.
        with_rates: False leaves out ``normal_rate``, which takes longest and AUPIMO alone reads.

        Raises MetricError: with the image's index in `maps`, a score that is not finite, another
        type or shape.
        """
        self._check(maps)
        # One sorted array is enough for whole numbers, whatever image they are of; sums of rates
        # depend on the order of the images.
        normals = (
            [
                np.sort(self._pixels(maps, self._normals[i : i + 1]))
                for i in range(len(self._normals))
            ]
            if with_rates
            else [np.sort(self._pixels(maps, self._normals))]
        )
        return {name: self._count(name, maps, normals, with_rates) for name in self._families}

    def _count(
        self, name: str, maps: NDArray[np.float32], normals: list[Map], with_rates: bool
    ) -> PixelCounts:
        members = self._families[name]
        chosen = maps[members]
        defects = sort_defects(chosen[self._masks[members]], self._regions[name])
        hits = np.diff(defects.starts, append=len(defects.weights))
        slots = slot_counts(defects.scores, np.sort(self._pixels(maps, members)))
        slots[1::2] -= hits  # the defect pixels themselves
        rates = np.zeros(len(slots)) if with_rates else None
        for values in normals:
            count = slot_counts(defects.scores, values)
            slots += count
            if rates is not None:
                rates += count / len(values)
        return counts_of(defects, slots, rates)

    def _pixels(self, maps: NDArray[np.float32], images: NDArray[np.intp]) -> Map:
        """The scores of some images' valid pixels, (P,)."""
        chosen = maps[images]
        return chosen.ravel() if self._valid is None else chosen[self._valid[images]]

    def _check(self, maps: NDArray[np.float32]) -> None:
        same = maps.shape == self._masks.shape and maps.dtype == np.float32
        if same and np.isfinite(maps).all():
            return
        valid = [None] * len(maps) if self._valid is None else self._valid
        samples = [PixelSample(*each) for each in zip(maps, self._masks, valid, strict=True)]
        for _ in read_samples(samples):
            pass
