"""Bootstrap over test images: intervals for every metric, and paired comparisons of two systems.

Images are drawn with replacement, normal and defective ones apart: the shares of the two in a test
set are the experimenter's choice, not chance. A drawn image brings all its pixels.

Replicates do not read the pixels again. Each image is binned once by score, and a replicate's
curves are weighted sums of the images' bins; a thousand replicates of all metrics take seconds.
Bins tie scores that lie close together, so replicates are good to about 1e-3. The metrics
themselves are always exact (:func:`clsnf.metrics.evaluate`).

Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993 (percentile intervals).

Legend: N images, B bins, scores falling, R replicates.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from clsnf.core.errors import MetricError
from clsnf.metrics.counts import checked_labels
from clsnf.metrics.pimo import image_aupimo
from clsnf.metrics.pixels import count_pixels
from clsnf.metrics.samples import PixelSample, read_samples
from clsnf.metrics.saturation import annotated_regions

Floats = NDArray[np.float64]

_BINS = 1500  # for defect pixels, and as many again for the others
_CHUNK = 64  # replicates at once


@dataclass(frozen=True, eq=False)
class BinnedImages:
    """What replicates are made from.

    scores, labels: (N,), of the images.
    hits, misses: (N, B) defect pixels and defect-free pixels by score, highest bin first; None
        without masks.
    shares: (N, B) sum over the image's regions of the share of the region's pixels; None without
        masks.
    saturated: likewise of the saturated overlap.
    aupimo: (N,) of each image, NaN for normal ones; None without masks or normal images.
    """

    scores: Floats
    labels: NDArray[np.bool_]
    hits: Floats | None
    misses: Floats | None
    shares: Floats | None
    saturated: Floats | None
    aupimo: Floats | None


def bin_images(
    scores: ArrayLike, labels: ArrayLike, samples: Iterable[PixelSample] | None
) -> BinnedImages:
    """Bin a test set's images.

    scores, labels, samples: as for :func:`clsnf.metrics.evaluate`; passed over four times.

    Raises MetricError: as :func:`clsnf.metrics.evaluate` would.
    """
    known = checked_labels(labels)
    values = np.asarray(scores, np.float64)
    if values.shape != known.shape or not np.isfinite(values).all():
        raise MetricError(
            f"there are {values.size} scores for {known.size} labels, or some are not finite."
        )
    if samples is None:
        return BinnedImages(values, known, None, None, None, None, None)
    aupimo = None if known.all() else image_aupimo(count_pixels(samples, known))
    edges = _edges(samples)
    rows = [_bin_image(sample, edges) for sample in read_samples(samples)]
    hits, misses, shares, saturated = (
        np.stack(parts)[:, ::-1] for parts in zip(*rows, strict=True)
    )
    return BinnedImages(values, known, hits, misses, shares, saturated, aupimo)


def _edges(samples: Iterable[PixelSample]) -> NDArray[np.float32]:
    """Edges of the bins, rising.

    They cut the defect pixels evenly, and the other pixels more finely the higher they score.
    """
    defects: list[NDArray[np.float32]] = []
    others: list[NDArray[np.float32]] = []
    for sample in read_samples(samples):
        background = ~sample.mask if sample.valid is None else sample.valid & ~sample.mask
        values = np.sort(sample.score_map[background])[::-1]
        # The highest scores decide metrics at low false-positive rates: all of them.
        others.append(np.concatenate([values[:500], values[500::37]]))
        defects.append(
            sample.score_map[sample.mask][::7]
            if sample.mask.sum() > 700
            else sample.score_map[sample.mask]
        )
    ranked = np.sort(np.concatenate(others))[::-1]
    falling = np.unique(
        (np.geomspace(1, max(2, len(ranked)), _BINS) - 1).astype(np.int64).clip(0, len(ranked) - 1)
    )
    even = np.linspace(0, len(ranked) - 1, _BINS // 4).astype(np.int64)
    flat = np.sort(np.concatenate(defects))
    return np.unique(
        np.concatenate(
            [
                ranked[falling],
                ranked[even],
                flat[np.linspace(0, len(flat) - 1, _BINS).astype(np.int64)],
            ]
        )
    )


def _bin_image(sample: PixelSample, edges: NDArray[np.float32]) -> tuple[Floats, ...]:
    """An image's rows of :class:`BinnedImages`: hits, misses, shares and saturated."""

    def counted(values: NDArray[np.float32], weights: Floats | None = None) -> Floats:
        return np.bincount(
            np.searchsorted(edges, values, side="right"), weights, minlength=len(edges) + 1
        ).astype(np.float64)

    background = ~sample.mask if sample.valid is None else sample.valid & ~sample.mask
    misses = counted(np.sort(sample.score_map[background]))
    if not sample.mask.any():
        nothing = np.zeros_like(misses)
        return nothing, misses, nothing, nothing
    _, components = cv2.connectedComponents(sample.mask.astype(np.uint8), connectivity=8)
    region = components[sample.mask]
    inside = sample.score_map[sample.mask]
    shares = counted(inside, 1.0 / np.bincount(region)[region])
    regions = annotated_regions(sample)
    if regions is None:
        return counted(inside), misses, shares, shares
    own = inside[regions.pixel]
    return counted(inside), misses, shares, counted(own, regions.gains(own))


def draw_replicates(labels: ArrayLike, replicates: int, seed: int) -> Floats:
    """(R, N): how often each image occurs in each replicate.

    The numbers of normal and of defective images are the same in every replicate.
    """
    known = checked_labels(labels)
    generator = np.random.default_rng(seed)
    weights = np.zeros((replicates, len(known)))
    for kind in (False, True):
        place = np.flatnonzero(known == kind)
        if len(place):
            weights[:, place] = generator.multinomial(
                len(place), np.full(len(place), 1 / len(place)), size=replicates
            )
    return weights


def replicate_metrics(images: BinnedImages, weights: Floats) -> dict[str, Floats]:
    """Every metric that the images allow, in each replicate.

    Returns name of :data:`clsnf.metrics.METRICS` -> (R,).
    """
    parts = [
        _metrics(images, weights[start : start + _CHUNK])
        for start in range(0, len(weights), _CHUNK)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _metrics(images: BinnedImages, weights: Floats) -> dict[str, Floats]:
    result: dict[str, Floats] = {}
    if images.labels.any() and not images.labels.all():
        _, place = np.unique(-images.scores, return_inverse=True)
        bins = np.zeros((len(images.scores), place.max() + 1))
        bins[np.arange(len(place)), place] = 1
        result |= _ranking(
            "image",
            weights @ (bins * images.labels[:, None]),
            weights @ (bins * ~images.labels[:, None]),
        )
    if (
        images.hits is not None
        and images.misses is not None
        and images.shares is not None
        and images.saturated is not None
    ):
        hits, misses = weights @ images.hits, weights @ images.misses
        result |= _ranking("pixel", hits, misses)
        rate = np.cumsum(misses, axis=1) / misses.sum(axis=1, keepdims=True)
        for name, shares in (("au_pro", images.shares), ("au_spro", images.saturated)):
            overlap = np.cumsum(weights @ shares, axis=1)
            overlap /= overlap[:, -1:]
            result |= {name: _area(rate, overlap, 0.3), f"{name}_05": _area(rate, overlap, 0.05)}
    if images.aupimo is not None:
        # Its thresholds stay those of all normal images: a false-positive rate of 1e-5 is not
        # resolved by fewer.
        defects = ~np.isnan(images.aupimo)
        drawn = weights[:, defects]
        result["aupimo"] = drawn @ images.aupimo[defects] / drawn.sum(axis=1)
    return result


def _ranking(kind: str, hits: Floats, misses: Floats) -> dict[str, Floats]:
    """AUROC, AP and F1-max of (R, B) counts, scores falling.

    The formulas are those of :mod:`clsnf.metrics.ranking`.
    """
    true, false = np.cumsum(hits, axis=1), np.cumsum(misses, axis=1)
    positives, negatives = true[:, -1:], false[:, -1:]
    met = np.maximum(true + false, 1)
    return {
        f"{kind}_auroc": (hits * (negatives - false + 0.5 * misses)).sum(axis=1)
        / (positives * negatives)[:, 0],
        f"{kind}_ap": (hits * true / met).sum(axis=1) / positives[:, 0],
        f"{kind}_f1_max": (2 * true / (true + false + positives)).max(axis=1),
    }


def _area(x: Floats, y: Floats, limit: float) -> Floats:
    """Area under curves (R, B) up to x = limit, divided by the limit.

    By trapezoids from (0, 0), interpolated at the limit.
    """
    x, y = (np.concatenate([np.zeros((len(v), 1)), v], axis=1) for v in (x, y))
    width = np.diff(x, axis=1)
    kept = np.clip(limit - x[:, :-1], 0, width)
    share = np.divide(kept, width, out=np.zeros_like(width), where=width > 0)
    return (kept * (y[:, :-1] + 0.5 * share * np.diff(y, axis=1))).sum(axis=1) / limit


def intervals(metrics: Mapping[str, Floats], level: float = 0.95) -> dict[str, tuple[float, float]]:
    """Percentile intervals of replicated metrics."""
    tail = (1 - level) / 2
    return {
        name: (float(np.quantile(v, tail)), float(np.quantile(v, 1 - tail)))
        for name, v in metrics.items()
    }


@dataclass(frozen=True)
class PairedDifference:
    """One system's metric minus another's, on the same images.

    Attributes:
        low, high: 95 % percentile interval.
        ahead: share of the replicates in which the first is ahead (a draw counts half).
    """

    low: float
    high: float
    ahead: float


def compare(
    first: Mapping[str, Floats], second: Mapping[str, Floats]
) -> dict[str, PairedDifference]:
    """Paired differences of metrics that were replicated with the same weights."""
    result = {}
    for name in (name for name in first if name in second):
        difference = first[name] - second[name]
        low, high = intervals({name: difference})[name]
        result[name] = PairedDifference(
            low, high, float(((difference > 0) + 0.5 * (difference == 0)).mean())
        )
    return result
