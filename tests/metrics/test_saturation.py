"""The saturated overlap against the published evaluation's arithmetic, word by word, and PRO."""

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clsnf.core.errors import MetricError
from clsnf.data.region_files import Saturation
from clsnf.metrics import METRICS, PixelSample, Region, au_pro, au_spro, evaluate
from clsnf.metrics.bootstrap import bin_images, replicate_metrics

LIMITS = (0.01, 0.05, 0.1, 0.3, 1.0)  # of the published evaluation


@dataclass
class Channel:
    """One annotated defect as the published evaluation has it: a mask, and its type's threshold."""

    mask: np.ndarray
    threshold: float
    relative: bool

    def saturation_area(self) -> int:
        """A share of the area, rounded down; a number of pixels, cut at the area."""
        area = int(self.mask.sum())
        return int(self.threshold * area) if self.relative else min(int(self.threshold), area)


@dataclass
class Picture:
    scores: np.ndarray
    channels: list[Channel]

    def sample(self) -> PixelSample:
        mask = np.logical_or.reduce([c.mask for c in self.channels] or [self.scores < -1])
        regions = tuple(
            Region(c.mask, Saturation(c.threshold, c.relative).pixels(int(c.mask.sum())))
            for c in self.channels
        )
        return PixelSample(self.scores, mask, None, regions or None)


def published(pictures: list[Picture], limit: float) -> float:
    """The area by the published evaluation's arithmetic, with every score as a threshold.

    A pixel is predicted where its score is above the threshold. Overlaps are averaged over all
    channels of all pictures; false positives are counted over all pictures, where no channel marks.
    """
    values = np.unique(np.concatenate([p.scores.ravel() for p in pictures]).astype(np.float64))
    points = []
    for threshold in [*values[::-1], values[0] - 1]:
        overlaps, false, free = [], 0, 0
        for picture in pictures:
            found = picture.scores > threshold
            anything = np.zeros(found.shape, bool)
            for channel in picture.channels:
                hit = np.sum(found & channel.mask)
                overlaps.append(min(hit / channel.saturation_area(), 1.0))
                anything |= channel.mask
            false += np.sum(found & ~anything)
            free += np.sum(~anything)
        points.append((false / free, np.mean(overlaps)))
    area = 0.0
    for (x0, y0), (x1, y1) in pairwise(points):
        if x1 <= limit:
            area += (x1 - x0) * (y0 + y1) / 2
        elif x0 < limit:
            y_limit = y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
            area += (limit - x0) * (y0 + y_limit) / 2
    return float(area / limit)


def made_up(seed: int) -> list[Picture]:
    """Small pictures of several sizes, the first with defects and the second without; overlapping
    channels, thresholds of both kinds, tied scores.
    """
    rng = np.random.default_rng(seed)
    pictures = []
    for index in range(rng.integers(2, 6)):
        shape = tuple(rng.integers(4, 12, 2))
        channels = []
        for _ in range(0 if index == 1 else rng.integers(1, 4)):
            mask = np.zeros(shape, bool)
            top, left = (int(rng.integers(0, side - 2)) for side in shape)
            mask[top : top + 3, left : left + int(rng.integers(2, 5))] = True
            mask[0, 0] = False
            relative = bool(rng.integers(2))
            threshold = float(rng.uniform(0.3, 1)) if relative else float(rng.integers(1, 20))
            channels.append(Channel(mask, threshold, relative))
        scores = rng.integers(0, 12, shape).astype(np.float32)
        for channel in channels:
            scores += channel.mask * rng.integers(0, 5)
        pictures.append(Picture(scores.astype(np.float32), channels))
    return pictures


seeds = st.integers(0, 2**32 - 1)


@given(seeds)
@settings(max_examples=60, deadline=None)
def test_the_area_is_that_of_the_published_arithmetic_at_each_of_its_limits(seed: int) -> None:
    pictures = made_up(seed)
    samples = [picture.sample() for picture in pictures]
    for limit in LIMITS:
        assert au_spro(samples, limit) == pytest.approx(published(pictures, limit), abs=1e-12)


def test_by_hand() -> None:
    # One row: a region of four pixels of which two are enough, and four pixels without a defect.
    mask = np.array([[True] * 4 + [False] * 4])
    scores = np.array([[9, 3, 2, 1, 5, 0, 0, 0]], np.float32)
    sample = PixelSample(scores, mask, None, (Region(mask, 2),))
    # FPR 0: half; up to 1/4 it stays, then 9 and 3 are enough.
    assert au_spro([sample], 0.25) == pytest.approx(0.5)
    assert au_spro([sample], 1) == pytest.approx(0.25 * 0.5 + 0.75 * 1)
    assert au_pro([sample], 1) == pytest.approx(0.25 * 0.25 + 0.75 * 1)


def without_regions(samples: list[PixelSample]) -> list[PixelSample]:
    return [replace(sample, regions=None) for sample in samples]


def connected(samples: list[PixelSample]) -> list[PixelSample]:
    """The samples with their connected regions as annotation, each to be found whole."""
    from scipy import ndimage

    result = []
    for sample in samples:
        components, count = ndimage.label(sample.mask, structure=np.ones((3, 3)))
        regions = tuple(
            Region(components == k, int((components == k).sum())) for k in range(1, count + 1)
        )
        result.append(replace(sample, regions=regions or None))
    return result


@given(seeds, st.sampled_from(LIMITS))
@settings(max_examples=40, deadline=None)
def test_of_regions_to_be_found_whole_it_is_the_area_under_pro(seed: int, limit: float) -> None:
    samples = without_regions([picture.sample() for picture in made_up(seed)])
    assert au_spro(samples, limit) == au_pro(samples, limit)
    assert au_spro(connected(samples), limit) == pytest.approx(au_pro(samples, limit), abs=1e-12)
    # An image without an annotation counts its connected regions.
    mixed = [*connected(samples[:1]), *samples[1:]]
    assert au_spro(mixed, limit) == pytest.approx(au_pro(samples, limit), abs=1e-12)


@given(seeds, st.sampled_from(LIMITS))
@settings(max_examples=40, deadline=None)
def test_the_less_is_enough_the_more_is_found(seed: int, limit: float) -> None:
    samples = [picture.sample() for picture in made_up(seed)]
    values = []
    for enough in (1, 3, 5, 100):
        changed = [
            replace(s, regions=s.regions and tuple(Region(r.mask, enough) for r in s.regions))
            for s in samples
        ]
        values.append(au_spro(changed, limit))
    assert all(after <= before + 1e-12 for before, after in pairwise(values))


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_other_metrics_look_at_the_union_alone(seed: int) -> None:
    samples = [picture.sample() for picture in made_up(seed)]
    labels = np.array([sample.mask.any() for sample in samples])
    scores = np.array([sample.score_map.max() for sample in samples])
    names = [name for name in METRICS if not METRICS[name].regions]
    plain = evaluate(scores, labels, without_regions(samples), names)
    assert evaluate(scores, labels, samples, names) == plain


@given(seeds)
@settings(max_examples=20, deadline=None)
def test_a_replicate_of_each_image_once_is_the_metric(seed: int) -> None:
    samples = [picture.sample() for picture in made_up(seed)]
    labels = np.array([sample.mask.any() for sample in samples])
    scores = np.array([sample.score_map.max() for sample in samples])
    found = replicate_metrics(bin_images(scores, labels, samples), np.ones((1, len(labels))))
    for name in ("au_spro", "au_spro_05"):
        exact = evaluate(scores, labels, samples, [name])[name]
        assert found[name][0] == pytest.approx(exact, abs=1e-9)


def test_padding_counts_as_no_pixel_of_a_region() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 9, (8, 8)).astype(np.float32)
    one, two = np.zeros((8, 8), bool), np.zeros((8, 8), bool)
    one[2:4, 2:5], two[3:8, 1:3] = True, True
    two[:5] = False
    whole = PixelSample(scores[:5], one[:5], None, (Region(one[:5], 3),))
    valid = np.zeros((8, 8), bool)
    valid[:5] = True
    padded = PixelSample(scores, one | two, valid, (Region(one, 3), Region(two, 2)))
    assert au_spro([padded], 0.3) == au_spro([whole], 0.3)


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        (lambda mask: (Region(~mask, 1),), "the regions of image 0 are not its mask"),
        (lambda mask: (Region(mask, 0),), "saturated at 0: both must be 1 or more"),
        (lambda mask: (Region(mask, 1), Region(mask & False, 1)), "a region of 0 pixels"),
        (lambda mask: (Region(mask.astype(np.uint8), 1),), "the region of image 0 is uint8"),
        (lambda mask: (), "the regions of image 0 are not its mask"),
    ],
)
def test_regions_that_are_not_the_masks_are_refused(regions, message) -> None:  # type: ignore[no-untyped-def]
    mask = np.zeros((4, 5), bool)
    mask[1:3, 1:3] = True
    sample = PixelSample(np.zeros((4, 5), np.float32), mask, None, regions(mask))
    with pytest.raises(MetricError, match=message):
        au_spro([sample], 0.3)
