"""Bootstrap: exact without resampling; intervals cover; pairs are compared image by image."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clsnf.core.errors import MetricError
from clsnf.metrics import METRICS, PixelSample, evaluate
from clsnf.metrics.bootstrap import (
    bin_images,
    compare,
    draw_replicates,
    intervals,
    replicate_metrics,
)

SIZE = (40, 48)


def data(
    n: int = 24, seed: int = 0, gain: float = 1.5
) -> tuple[np.ndarray, np.ndarray, list[PixelSample]]:
    """Scores, labels and samples of n images: every third is normal, the others have defects."""
    generator = np.random.default_rng(seed)
    samples = []
    for index in range(n):
        mask = np.zeros(SIZE, bool)
        if index % 3:
            for _ in range(1 + index % 2):
                top, left = generator.integers(0, 30, 2)
                mask[top : top + 8, left : left + int(generator.integers(3, 12))] = True
        score_map = generator.normal(size=SIZE) + gain * mask * generator.uniform(0, 2)
        samples.append(PixelSample(score_map.astype(np.float32), mask))
    scores = np.array([sample.score_map.max() for sample in samples])
    return scores, np.array([sample.mask.any() for sample in samples]), samples


@given(st.integers(0, 50))
@settings(deadline=None, max_examples=15)
def test_each_image_once_gives_the_exact_metrics(seed: int) -> None:
    scores, labels, samples = data(seed=seed)
    exact = evaluate(scores, labels, samples)
    found = replicate_metrics(bin_images(scores, labels, samples), np.ones((1, len(labels))))
    assert set(found) == set(METRICS)
    for name, value in exact.items():
        assert found[name][0] == pytest.approx(
            value, abs=1e-9 if METRICS[name].kind == "image" else 3e-3
        ), name


def test_a_replicate_is_the_data_set_with_its_images_repeated() -> None:
    scores, labels, samples = data()
    weights = draw_replicates(labels, 3, seed=1)
    found = replicate_metrics(bin_images(scores, labels, samples), weights)
    names = [
        name for name in METRICS if name != "aupimo"
    ]  # its thresholds stay those of all normal images
    for row, counts in enumerate(weights.astype(int)):
        chosen = np.repeat(np.arange(len(labels)), counts)
        exact = evaluate(scores[chosen], labels[chosen], [samples[i] for i in chosen], names)
        for name, value in exact.items():
            assert found[name][row] == pytest.approx(value, abs=3e-3), name


def test_replicates_keep_the_numbers_of_both_classes() -> None:
    labels = np.array([True] * 7 + [False] * 3)
    weights = draw_replicates(labels, 50, seed=0)
    assert (weights[:, labels].sum(axis=1) == 7).all()
    assert (weights[:, ~labels].sum(axis=1) == 3).all()
    assert len(np.unique(weights, axis=0)) > 30
    assert np.array_equal(weights, draw_replicates(labels, 50, seed=0))


def test_intervals_cover_the_true_auroc_about_as_often_as_they_say() -> None:
    """Scores of two normal distributions one apart: the true image AUROC is 0.760."""
    generator = np.random.default_rng(0)
    labels = np.arange(80) % 2 == 0
    covered = 0
    for run in range(100):
        images = bin_images(generator.normal(size=80) + labels, labels, None)
        low, high = intervals(replicate_metrics(images, draw_replicates(labels, 200, seed=run)))[
            "image_auroc"
        ]
        covered += low <= 0.7602 <= high
    assert 86 <= covered <= 99


def test_a_system_that_is_better_on_every_image_is_ahead_in_every_replicate() -> None:
    scores, labels, samples = data()
    better = [PixelSample(s.score_map + 3 * s.mask.astype(np.float32), s.mask) for s in samples]
    weights = draw_replicates(labels, 100, seed=0)
    one, other = (
        replicate_metrics(bin_images(v, labels, s), weights)
        for v, s in ((scores + labels, better), (scores, samples))
    )
    difference = compare(one, other)["pixel_ap"]
    assert difference.ahead == 1
    assert 0 < difference.low < difference.high
    same = compare(one, one)["pixel_ap"]
    assert (same.low, same.high, same.ahead) == (0, 0, 0.5)


def test_without_masks_there_are_image_metrics_alone() -> None:
    scores, labels, _ = data()
    found = replicate_metrics(bin_images(scores, labels, None), draw_replicates(labels, 5, 0))
    assert set(found) == {"image_auroc", "image_ap", "image_f1_max"}


def test_scores_that_are_not_finite_are_refused() -> None:
    scores, labels, samples = data()
    scores[3] = np.nan
    with pytest.raises(MetricError, match="finite"):
        bin_images(scores, labels, samples)
