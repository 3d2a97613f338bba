"""Pixel metrics against scikit-learn, slow literal implementations and values by hand.

Also their memory, and how often they pass over the samples.
"""

import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from clsnf.core.errors import MetricError
from clsnf.metrics import (
    LazySamples,
    PixelSample,
    au_pro,
    aupimo,
    aupimo_per_image,
    evaluate,
    pixel_ap,
    pixel_auroc,
    pixel_f1_max,
)

PIXEL_METRICS = [pixel_auroc, pixel_ap, pixel_f1_max, au_pro, aupimo]


def tied_samples(seed: int, with_valid: bool) -> list[PixelSample]:
    """Two to five small images of different sizes, the first a defect and the second normal, scores
    from a dozen values.
    """
    rng = np.random.default_rng(seed)
    samples = []
    for index in range(rng.integers(2, 6)):
        shape = tuple(rng.integers(3, 12, 2))
        mask = rng.random(shape) < rng.choice([0.1, 0.4])
        valid = rng.random(shape) < 0.8 if with_valid else None
        if index == 0:
            mask.flat[:2] = True, False
            if valid is not None:
                valid.flat[:2] = True
        if index == 1 or (valid is not None and not (mask & valid).any()):
            mask[:] = False
        if valid is not None:
            valid.flat[2] = True
        scores = rng.integers(0, 12, shape) + mask * rng.integers(0, 6)
        samples.append(PixelSample(scores.astype(np.float32), mask, valid))
    return samples


def counted(sample: PixelSample) -> np.ndarray:
    return np.ones(sample.mask.shape, bool) if sample.valid is None else sample.valid


def flattened(samples: list[PixelSample]) -> tuple[np.ndarray, np.ndarray]:
    """(truth, scores) of all pixels that count."""
    truth = np.concatenate([s.mask[counted(s)] for s in samples])
    return truth, np.concatenate([s.score_map[counted(s)] for s in samples])


def literal_au_pro(samples: list[PixelSample], limit: float) -> float:
    """The definition, word by word: every distinct score a threshold, every region looked at,
    straight lines between.
    """
    truth, scores = flattened(samples)
    regions = []
    for s in samples:
        components, count = ndimage.label(s.mask & counted(s), structure=np.ones((3, 3)))
        regions += [s.score_map[components == number] for number in range(1, count + 1)]
    points = [(0.0, 0.0)]
    for threshold in np.unique(scores)[::-1]:
        points.append(
            (
                np.mean(scores[~truth] >= threshold),
                np.mean([np.mean(r >= threshold) for r in regions]),
            )
        )
    area = 0.0
    for (x0, y0), (x1, y1) in pairwise(points):
        if x1 <= limit:
            area += (x1 - x0) * (y0 + y1) / 2
        elif x0 < limit:
            y_limit = y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
            area += (limit - x0) * (y0 + y_limit) / 2
    return area / limit


def literal_aupimo(samples: list[PixelSample], low: float = 1e-5, high: float = 1e-4) -> np.ndarray:
    """The step function recall(f) = best recall of a threshold whose mean FPR over the normal
    images is at most f, integrated.
    """
    normals = [s.score_map[counted(s)] for s in samples if not s.mask.any()]
    thresholds = np.append(np.unique(flattened(samples)[1])[::-1], -np.inf)
    rates = np.array([np.mean([np.mean(n >= t) for n in normals]) for t in thresholds])
    edges = np.unique([low, high, *rates[(rates > low) & (rates < high)]])
    values = []
    for s in samples:
        pixels = s.score_map[s.mask & counted(s)]
        recalls = np.array([np.mean(pixels >= t) if len(pixels) else np.nan for t in thresholds])
        area = 0.0
        for f, after in pairwise(edges):
            allowed = recalls[rates <= f]
            area += (allowed.max() if len(allowed) else 0.0) * (np.log(after) - np.log(f))
        values.append(area / (np.log(high) - np.log(low)) if len(pixels) else np.nan)
    return np.array(values)


seeds = st.integers(0, 2**32 - 1)


@given(seeds, st.booleans())
@settings(max_examples=50, deadline=None)
def test_ranking_metrics_equal_scikit_learn_on_the_concatenated_pixels(
    seed: int, with_valid: bool
) -> None:
    samples = tied_samples(seed, with_valid)
    truth, scores = flattened(samples)
    precision, recall, _ = precision_recall_curve(truth, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-300)
    assert pixel_auroc(samples) == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)
    assert pixel_ap(samples) == pytest.approx(average_precision_score(truth, scores), abs=1e-12)
    assert pixel_f1_max(samples) == pytest.approx(f1.max(), abs=1e-12)


@given(seeds, st.booleans(), st.sampled_from([0.05, 0.3, 0.5, 1.0]))
@settings(max_examples=100, deadline=None)
def test_au_pro_equals_its_literal_definition(seed: int, with_valid: bool, limit: float) -> None:
    samples = tied_samples(seed, with_valid)
    assert au_pro(samples, limit) == pytest.approx(literal_au_pro(samples, limit), abs=1e-9)


@given(seeds)
@settings(max_examples=10, deadline=None)
def test_aupimo_equals_its_literal_definition_where_normals_resolve_the_bounds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shapes = [(150, 200), (12, 9), (100, 130), (7, 7)]  # normal, defect, normal, defect
    samples = []
    for index, shape in enumerate(shapes):
        mask = np.zeros(shape, bool)
        if index % 2:
            mask[2:6, 1:5] = True
        # The background of defect images scores as high as defects: it must not count towards the
        # false-positive rate.
        scores = np.floor(rng.exponential(10, shape) + (mask * 20 + 70) * (index % 2)).astype(
            np.float32
        )
        samples.append(PixelSample(scores, mask, rng.random(shape) < 0.95))
    expected = literal_aupimo(samples)
    np.testing.assert_allclose(aupimo_per_image(samples), expected, atol=1e-9)
    assert aupimo(samples) == pytest.approx(np.nanmean(expected), abs=1e-9)


def test_pixel_metrics_equal_values_worked_out_by_hand() -> None:
    # Regions {9} and {7, 5}; defect-free 5, 3, 3, 1, 1, of which 5 ties with a defect pixel.
    scores = np.array([[9, 5, 7, 5, 3, 3, 1, 1]], np.float32)
    mask = np.array([[1, 0, 1, 1, 0, 0, 0, 0]], bool)
    samples = [PixelSample(scores, mask)]
    assert pixel_auroc(samples) == pytest.approx((5 + 5 + 4.5) / 15)
    assert pixel_ap(samples) == pytest.approx((1 + 1 + 3 / 4) / 3)
    assert pixel_f1_max(samples) == pytest.approx(6 / 7)
    # PRO climbs to 1/2 and 3/4 at FPR 0, then in a straight line to 1 at FPR 1/5, where it stays.
    assert au_pro(samples, 0.3) == pytest.approx(((0.75 + 1) / 2 * 0.2 + 0.1) / 0.3)
    assert au_pro(samples, 0.05) == pytest.approx((0.75 + 0.8125) / 2)
    assert au_pro(samples, 1.0) == pytest.approx(0.175 + 0.8)


def test_regions_have_equal_weight_and_join_over_corners() -> None:
    scores = np.array([[5, 0, 0, 0], [0, 5, 0, 0], [0, 0, 0, 1]], np.float32)
    mask = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]], bool)
    # Two regions, not three: the first is met before any defect-free pixel, the second above all of
    # them as well.
    assert au_pro([PixelSample(scores, mask)]) == pytest.approx(1.0)
    missed = np.where(scores == 1, np.float32(-1), scores)
    assert au_pro([PixelSample(missed, mask)]) == pytest.approx(0.5)


def aupimo_case(side: int) -> list[PixelSample]:
    """Two normal images with one pixel of score 8 among them, and a defect image with scores 9, 8,
    5, 0.
    """
    normals = [np.zeros((side, side), np.float32) for _ in range(2)]
    normals[0][3, 3] = 8
    defect = np.array([[9, 8], [5, 0]], np.float32)
    blank = np.zeros((side, side), bool)
    return [
        PixelSample(normals[0], blank),
        PixelSample(defect, np.ones((2, 2), bool)),
        PixelSample(normals[1], blank),
    ]


def test_aupimo_equals_values_worked_out_by_hand() -> None:
    # 20,000 normal pixels: score 8 costs FPR 5e-5 and then holds over log(1e-4 / 5e-5) = ln 2 of
    # the ln 10 between the bounds.
    expected = (1 + 2 * np.log(2) / np.log(10) + 0) / 4
    np.testing.assert_allclose(
        aupimo_per_image(aupimo_case(100)), [np.nan, expected, np.nan], atol=1e-12
    )


def test_aupimo_of_normals_too_small_for_its_bounds_is_the_recall_without_a_false_pixel() -> None:
    assert aupimo(aupimo_case(10)) == pytest.approx(1 / 4)


def test_padding_counts_as_no_pixel_whatever_it_holds() -> None:
    plain = tied_samples(5, with_valid=False)
    padded = []
    for s in plain:
        frame = [(2, 1), (0, 3)]
        valid = np.pad(np.ones(s.mask.shape, bool), frame)
        scores = np.pad(s.score_map, frame, constant_values=np.nan)
        padded.append(
            PixelSample(
                scores, np.pad(s.mask, frame, constant_values=True) & (s.mask.any() | valid), valid
            )
        )
    for metric in PIXEL_METRICS:
        assert metric(padded) == metric(plain)


def test_maps_are_read_twice_and_at_most_two_are_alive_at_once() -> None:
    loads, alive, most = 0, 0, 0

    def gone() -> None:
        nonlocal alive
        alive -= 1

    def load(index: int) -> PixelSample:
        nonlocal loads, alive, most
        loads, alive = loads + 1, alive + 1
        most = max(most, alive)
        mask = np.zeros((8, 8), bool)
        mask[:2, :2] = index % 2
        score_map = np.arange(64, dtype=np.float32).reshape(8, 8)
        weakref.finalize(score_map, gone)
        return PixelSample(score_map, mask)

    evaluate([0, 1] * 10, [0, 1] * 10, LazySamples(load, 20))
    assert loads == 2 * 20
    assert most <= 2


def test_memory_does_not_grow_with_the_number_of_normal_images() -> None:
    def load(index: int) -> PixelSample:
        score_map = np.random.default_rng(index).random((128, 128), dtype=np.float32)
        mask = np.zeros((128, 128), bool)
        mask[:9, :9] = index == 0
        return PixelSample(score_map, mask)

    def peak(count: int) -> int:
        tracemalloc.start()
        au_pro(LazySamples(load, count))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(3)  # whatever the first call loads
    assert peak(60) < 1.2 * peak(3)


def image(
    scores: object = ((1.0, 2.0), (3.0, 4.0)), mask: object = ((0, 0), (0, 1)), valid: object = None
) -> PixelSample:
    return PixelSample(
        np.array(scores, np.float32),
        np.array(mask, bool),
        None if valid is None else np.array(valid, bool),
    )


BLANK = ((0, 0), (0, 0))
REFUSED: dict[str, tuple[list[PixelSample], str]] = {
    "empty input": ([], "no images"),
    "normal images alone": ([image(mask=BLANK)] * 3, "all 3 images are normal"),
    "defect pixels alone": ([image(mask=((1, 1), (1, 1)))], "every pixel"),
    "NaN": (
        [image(), image(((1, 2), (np.nan, 4)))],
        "score map of image 1 holds nan at row 1, column 0",
    ),
    "infinity": (
        [image(), image(), image(((1, -np.inf), (3, 4)), BLANK)],
        "score map of image 2 holds -inf",
    ),
    "mask of another shape": (
        [image(mask=((0, 0, 1),))],
        r"mask of image 0 has shape \(1, 3\).*resize",
    ),
    "valid of another shape": ([image(valid=((1, 1, 1),))], "valid mask of image 0 has shape"),
    "map that is not (H, W)": (
        [image((1.0, 2.0), (0, 1))],
        r"score map of image 0 has shape \(2,\)",
    ),
    "regions in the padding alone": (
        [image(), image(valid=((1, 1), (1, 0)))],
        "image 1 has regions without pixels",
    ),
    "no valid pixel": (
        [image(), image(mask=BLANK, valid=BLANK)],
        "image 1 has no pixel that counts",
    ),
    "uint8 mask": (
        [PixelSample(np.ones((2, 2), np.float32), np.ones((2, 2), np.uint8))],  # type: ignore[arg-type]
        "mask of image 0 is uint8",
    ),
    "float64 map": (
        [PixelSample(np.ones((2, 2)), np.ones((2, 2), bool))],  # type: ignore[arg-type]
        "score map of image 0 is float64",
    ),
}


@pytest.mark.parametrize("metric", PIXEL_METRICS)
@pytest.mark.parametrize("case", REFUSED)
def test_undefined_pixel_metrics_are_refused(metric: Callable[..., float], case: str) -> None:
    samples, message = REFUSED[case]
    with pytest.raises(MetricError, match=message):
        metric(samples)


def test_one_shot_iterators_are_refused() -> None:
    with pytest.raises(MetricError, match="generator, which can be read only once"):
        pixel_ap(image() for _ in range(2))


@pytest.mark.parametrize("second", [1, 3])
def test_samples_that_change_between_the_passes_are_refused(second: int) -> None:
    class Shifting:
        counts = iter([2, second])

        def __iter__(self) -> Iterator[PixelSample]:
            return iter([image()] * next(self.counts))

    with pytest.raises(MetricError, match="the same each time"):
        pixel_ap(Shifting())


def test_aupimo_without_normal_images_is_refused_and_the_others_are_not() -> None:
    assert pixel_ap([image()]) == 1.0
    with pytest.raises(MetricError, match="all 1 images have defects"):
        aupimo([image()])


@pytest.mark.parametrize("limit", [0.0, -0.1, 1.5, 30.0, float("nan")])
def test_au_pro_limits_outside_zero_to_one_are_refused(limit: float) -> None:
    with pytest.raises(MetricError, match="limit"):
        au_pro([image()], limit)
