"""Pixel counts: all that the pixel metrics depend on, from two passes over the maps of a data set.

Pass one keeps the scores of the defect pixels (a few per cent of all) and the region that each
belongs to. Pass two sorts each image's defect-free pixels and looks them up among the distinct
defect scores. The counts are exact at the maps' own size, without histogram and subsampling, for
any number of images: memory is bounded by the number of defect pixels (about 130 bytes each at the
peak) plus two maps. Called by the metrics, and by :func:`clsnf.metrics.evaluate`, which shares one
result among all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from clsnf.core.errors import MetricError
from clsnf.metrics.counts import Counts, ScoreCounts, checked_labels
from clsnf.metrics.samples import Map, PixelSample, read_samples
from clsnf.metrics.saturation import ImageRegions, annotated_regions, connected_regions, joined


@dataclass(frozen=True, eq=False)
class PixelCounts:
    """What the pixel metrics depend on, for K distinct scores among P defect pixels, highest first.

    scores: pixels counted by score; negatives are the defect-free pixels of all images.
    region_share: (K,) float64, what PRO gains at each score: sum over its pixels of 1 / (region's
        size * number of regions).
    saturated_share: (K,) float64, what the saturated PRO gains at each score.
    normal_rate: (K,) float64 in [0, 1], mean over the normal images of the share of their pixels at
        or above the score; None where there is no normal image.
    pixel_rank: (P,) int64, which of the K scores each defect pixel has.
    pixel_image: (P,) int32, the index of the image that it lies in.
    images: number of images, normal ones included.
    """

    scores: ScoreCounts
    region_share: NDArray[np.float64]
    saturated_share: NDArray[np.float64]
    normal_rate: NDArray[np.float64] | None
    pixel_rank: NDArray[np.int64]
    pixel_image: NDArray[np.int32]
    images: int


@dataclass(frozen=True, eq=False)
class Regions:
    """The defect pixels of a data set, from its masks alone.

    P pixels, image by image and row by row, in R 8-connected regions, numbered through the set.
    """

    of_pixel: NDArray[np.int32]  # (P,)
    weights: NDArray[np.float64]  # (R,) 1 / (region's size * number of regions)
    images: NDArray[np.int32]  # (R,) the index of the image that it lies in
    sizes: list[tuple[int, int]]  # per image: defect pixels, defect-free pixels
    saturated: ImageRegions | None  # of all images; None: no image has annotated regions


@dataclass(frozen=True, eq=False)
class Defects:
    """Defect pixels with scores, rising: K distinct scores, and P pixels sorted by score."""

    scores: Map  # (K,)
    starts: NDArray[np.int64]  # (K,) where each distinct score begins among the P pixels
    weights: NDArray[np.float64]  # (P,) 1 / (region's size * number of regions)
    images: NDArray[np.int32]  # (P,)
    sizes: list[tuple[int, int]]  # per image: defect pixels, defect-free pixels
    saturated: (
        NDArray[np.float64] | None
    )  # (K,) as PixelCounts has it, rising; None: as the weights


def count_pixels(samples: Iterable[PixelSample], labels: ArrayLike | None = None) -> PixelCounts:
    """Count the pixels of a data set in exactly two passes over ``samples``.

    samples: a re-iterable that gives the same samples in the same order each time.
    labels: (N,) 0 normal, 1 defect, to hold the masks against; without it, an image with defect
        pixels is a defect.

    Raises MetricError: what :func:`clsnf.metrics.samples.read_samples` refuses, no images, no
    defect pixel or no defect-free pixel in the whole set, masks that contradict the labels, a
    second pass unlike the first.
    """
    known = None if labels is None else checked_labels(labels)
    defects = _collect_defects(samples)
    if known is not None:
        check_labels(known, defects.sizes)
    slots, rates = _count_background(samples, defects)
    return counts_of(defects, slots, rates)


def counts_of(defects: Defects, slots: Counts, rates: NDArray[np.float64] | None) -> PixelCounts:
    """Counts from the highest score down.

    slots, rates: see :func:`_count_background`; `rates` None where no metric asks for them.
    """
    # Slots rise with the score; from here on everything falls with it. Sums run from the highest
    # score down, so that the rates near zero, which AUPIMO takes the logarithm of, keep their
    # digits.
    met = np.cumsum(slots[::-1])  # (2K + 1,)
    count = len(defects.scores)
    hits = np.diff(defects.starts, append=len(defects.weights))
    scores = ScoreCounts(hits[::-1], met[:-1:2], slots[-2::-2], int(met[-1]))
    normal_images = sum(defect == 0 for defect, _ in defects.sizes)
    region_share = np.add.reduceat(defects.weights, defects.starts)[::-1]
    return PixelCounts(
        scores=scores,
        region_share=region_share,
        saturated_share=(region_share if defects.saturated is None else defects.saturated[::-1]),
        normal_rate=(
            np.cumsum(rates[::-1])[1::2] / normal_images
            if rates is not None and normal_images
            else None
        ),
        pixel_rank=np.repeat(np.arange(count)[::-1], hits),
        pixel_image=defects.images,
        images=len(defects.sizes),
    )


def _collect_defects(samples: Iterable[PixelSample]) -> Defects:
    scores: list[Map] = []

    def read() -> Iterator[PixelSample]:
        for sample in read_samples(samples):
            scores.append(sample.score_map[sample.mask])
            yield sample

    regions = find_regions(read())
    return sort_defects(np.concatenate(scores), regions)


def find_regions(samples: Iterable[PixelSample]) -> Regions:
    """The regions of checked samples; looks at masks alone.

    Raises MetricError: no images, or no defect pixel or no defect-free pixel in all of them.
    """
    regions: list[NDArray[np.int32]] = []
    region_sizes: list[Counts] = []
    region_images: list[NDArray[np.int32]] = []
    annotated: list[ImageRegions | None] = []
    sizes: list[tuple[int, int]] = []
    for index, sample in enumerate(samples):
        sizes.append(_sizes(sample))
        if sizes[-1][0] == 0:
            continue
        # 0 is the background.
        _, components = cv2.connectedComponents(sample.mask.astype(np.uint8), connectivity=8)
        regions.append(np.asarray(components[sample.mask], np.int32) - 1)
        region_sizes.append(np.bincount(regions[-1]))
        region_images.append(np.full(len(region_sizes[-1]), index, np.int32))
        annotated.append(annotated_regions(sample))
    _check_classes(sizes)
    saturated = _saturated(annotated, regions)
    region_count = 0
    for region, counted in zip(regions, region_sizes, strict=True):
        region += np.int32(region_count)
        region_count += len(counted)
    return Regions(
        np.concatenate(regions),
        1.0 / (np.concatenate(region_sizes) * region_count),
        np.concatenate(region_images),
        sizes,
        saturated,
    )


def _saturated(
    annotated: list[ImageRegions | None], regions: list[NDArray[np.int32]]
) -> ImageRegions | None:
    """The regions of the saturated overlap, of all images with defects; None without annotations.

    An image without one has its connected regions.
    """
    if all(one is None for one in annotated):
        return None
    each = [
        connected_regions(region) if one is None else one
        for one, region in zip(annotated, regions, strict=True)
    ]
    return joined(each, [len(region) for region in regions])


def sort_defects(scores: Map, regions: Regions) -> Defects:
    """Defect pixels by their scores (P,), which are in the order of the regions' pixels."""
    order = np.argsort(scores)
    rising = scores[order]
    region = regions.of_pixel[order]
    starts = np.flatnonzero(np.append(True, rising[1:] != rising[:-1]))
    distinct = rising[starts]
    return Defects(
        distinct,
        starts,
        regions.weights[region],
        regions.images[region],
        regions.sizes,
        _saturated_share(distinct, scores, regions.saturated),
    )


def _saturated_share(
    distinct: Map, scores: Map, regions: ImageRegions | None
) -> NDArray[np.float64] | None:
    """What the saturated overlap gains at each of K rising scores, (K,).

    scores: (P,) of the defect pixels.
    """
    if regions is None:
        return None
    own = scores[regions.pixel]
    gains = regions.gains(own) / len(regions.enough)
    share: NDArray[np.float64] = np.zeros(len(distinct))
    np.add.at(share, np.searchsorted(distinct, own), gains)
    return share


def _count_background(
    samples: Iterable[PixelSample], defects: Defects
) -> tuple[Counts, NDArray[np.float64]]:
    """Defect-free pixels by where they lie among the K defect scores.

    Returns two (2K + 1,) arrays, slot 2i for the gap below score i and slot 2i + 1 for score i
    itself: counts over all images, and the sum over the normal images of the share of the image's
    pixels.
    """
    slots = np.zeros(2 * len(defects.scores) + 1, np.int64)
    rates = np.zeros(len(slots), np.float64)
    read = 0
    for index, sample in enumerate(read_samples(samples)):
        read += 1
        defect_pixels, background_pixels = size = _sizes(sample)
        if index >= len(defects.sizes) or size != defects.sizes[index]:
            raise MetricError(
                f"image {index} was another one in the first pass: samples must give the same "
                "each time."
            )
        if background_pixels == 0:
            continue
        background = ~sample.mask if sample.valid is None else sample.valid & ~sample.mask
        slot, count = _among(defects.scores, np.sort(sample.score_map[background]))
        slots[slot] += count
        if defect_pixels == 0:
            rates[slot] += count / background_pixels
    if read != len(defects.sizes):
        raise MetricError(
            f"samples gave {len(defects.sizes)} images, then {read}: they must give the same each "
            "time."
        )
    return slots, rates


def _among(scores: Map, values: Map) -> tuple[Counts, Counts]:
    """The slots of K rising scores that sorted values fall into, each once, with their counts."""
    if len(scores) < len(values):
        count = slot_counts(scores, values)
        slot = np.flatnonzero(count)
        return slot, count[slot]
    # No score equals infinity, so the top gap needs no case of its own.
    edges = np.append(scores, np.float32(np.inf))
    rank = np.searchsorted(edges, values)
    each = 2 * rank + (edges[rank] == values)
    starts = np.flatnonzero(np.append(True, each[1:] != each[:-1]))
    return each[starts], np.diff(starts, append=len(each))


def slot_counts(scores: Map, values: Map) -> Counts:
    """How many sorted values fall into each of the (2K + 1,) slots of K rising scores.

    Looks the scores up among the sorted values, in rising order, which stays in the cache: several
    times faster than unsorted look-ups, the sort included.
    """
    ends = np.zeros(2 * len(scores) + 2, np.int64)  # where each slot begins, and the end
    ends[1:-1:2] = np.searchsorted(values, scores, side="left")
    ends[2:-1:2] = np.searchsorted(values, scores, side="right")
    ends[-1] = len(values)
    return ends[1:] - ends[:-1]


def _sizes(sample: PixelSample) -> tuple[int, int]:
    """(defect pixels, defect-free pixels) among those that count."""
    defects = int(np.count_nonzero(sample.mask))
    counted = sample.mask.size if sample.valid is None else int(np.count_nonzero(sample.valid))
    return defects, counted - defects


def _check_classes(sizes: list[tuple[int, int]]) -> None:
    if not sizes:
        raise MetricError(
            "no images were given: pixel metrics need at least one image with defect pixels."
        )
    if not any(defects for defects, _ in sizes):
        raise MetricError(
            f"all {len(sizes)} images are normal (no mask marks a pixel): pixel metrics need "
            "defect pixels; leave them out."
        )
    if not any(background for _, background in sizes):
        raise MetricError(
            f"every pixel of all {len(sizes)} images is a defect: pixel metrics need defect-free "
            "pixels; check the masks."
        )


def check_labels(labels: NDArray[np.bool_], sizes: list[tuple[int, int]]) -> None:
    if len(labels) != len(sizes):
        raise MetricError(
            f"there are {len(labels)} labels for {len(sizes)} samples: give one label an image, "
            "in the same order."
        )
    for index, (label, (defects, _)) in enumerate(zip(labels, sizes, strict=True)):
        if label and not defects:
            raise MetricError(
                f"image {index} is labelled a defect and has regions without pixels: its mask "
                "marks none; give its mask, or leave the image out of the pixel metrics."
            )
        if not label and defects:
            raise MetricError(
                f"image {index} is labelled normal, but its mask marks {defects} defect pixels: "
                "mend the label or the mask."
            )
