"""What every metric in the registry promises, and ``evaluate``.

A metric that joins the registry is tested without a new test.
"""

import numpy as np
import pytest

from clsnf import metrics
from clsnf.core.errors import MetricError
from clsnf.metrics import METRICS, PixelSample, evaluate

LABELS = np.array([0, 1, 0, 1, 1])


def make_set(seed: int = 0) -> tuple[np.ndarray, np.ndarray, list[PixelSample]]:
    """Five images of different sizes with tied scores, image score = largest of the map; normals
    resolve AUPIMO's bounds.
    """
    rng = np.random.default_rng(seed)
    samples = []
    for index, label in enumerate(LABELS):
        shape = (12 + index, 17) if label else (150, 150 + index)
        mask = np.zeros(shape, bool)
        if label:
            mask[2:5, 3:6] = mask[8:10, 4:12] = True
        scores = np.floor(rng.exponential(8, shape) + mask * rng.integers(20, 60, shape)).astype(
            np.float32
        )
        samples.append(PixelSample(scores, mask))
    return image_scores(samples), LABELS, samples


def image_scores(samples: list[PixelSample]) -> np.ndarray:
    return np.array([sample.score_map.max() for sample in samples])


def transformed(samples: list[PixelSample]) -> list[PixelSample]:
    return [PixelSample(np.exp(sample.score_map / 16) - 3, sample.mask) for sample in samples]


@pytest.mark.parametrize("name", METRICS)
def test_metric_is_a_proper_fraction_on_an_imperfect_detector(name: str) -> None:
    assert 0 < evaluate(*make_set(), [name])[name] < 1


@pytest.mark.parametrize("name", METRICS)
def test_metric_does_not_change_under_a_rising_transform_of_the_scores(name: str) -> None:
    scores, labels, samples = make_set()
    assert evaluate(np.exp(scores / 16) - 3, labels, transformed(samples), [name]) == evaluate(
        scores, labels, samples, [name]
    )


@pytest.mark.parametrize("name", METRICS)
def test_perfect_scores_give_exactly_or_nearly_one(name: str) -> None:
    samples = [PixelSample(s.mask.astype(np.float32), s.mask) for s in make_set()[2]]
    assert evaluate(image_scores(samples), LABELS, samples, [name])[name] == pytest.approx(
        1.0, abs=1e-12
    )


@pytest.mark.parametrize("name", METRICS)
def test_metric_does_not_depend_on_the_order_of_the_images(name: str) -> None:
    scores, labels, samples = make_set()
    order = [3, 0, 4, 2, 1]
    shuffled = evaluate(scores[order], labels[order], [samples[index] for index in order], [name])
    assert shuffled[name] == pytest.approx(
        evaluate(scores, labels, samples, [name])[name], abs=1e-12
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", METRICS)
def test_scores_that_are_not_finite_are_refused_with_the_image_named(name: str, bad: float) -> None:
    scores, labels, samples = make_set()
    scores[2] = samples[2].score_map[7, 7] = bad
    with pytest.raises(MetricError, match=r"image 2 (is|holds) (nan|inf)"):
        evaluate(scores, labels, samples, [name])


@pytest.mark.parametrize("name", METRICS)
def test_sets_of_normal_images_alone_are_refused(name: str) -> None:
    scores, labels, samples = make_set()
    normal = np.flatnonzero(labels == 0)
    with pytest.raises(MetricError, match="all 2 images are normal"):
        evaluate(scores[normal], labels[normal], [samples[index] for index in normal], [name])


@pytest.mark.parametrize("name", METRICS)
def test_single_function_equals_the_registry(name: str) -> None:
    scores, labels, samples = make_set()
    expected = evaluate(scores, labels, samples, [name])[name]
    if name.endswith("_05"):
        assert getattr(metrics, name.removesuffix("_05"))(samples, limit=0.05) == expected
    elif METRICS[name].kind == "image":
        assert getattr(metrics, name)(scores, labels) == expected
    else:
        assert getattr(metrics, name)(samples) == expected


def test_oracles_are_the_metrics_that_choose_their_threshold_by_the_labels() -> None:
    assert {name for name, metric in METRICS.items() if metric.oracle} == {
        "image_f1_max",
        "pixel_f1_max",
    }


def test_evaluate_computes_all_metrics_together_as_one_by_one() -> None:
    data = make_set()
    together = evaluate(*data)
    assert list(together) == list(METRICS)
    assert together == {name: evaluate(*data, [name])[name] for name in METRICS}


def test_evaluate_needs_no_samples_for_image_metrics() -> None:
    scores, labels, _ = make_set()
    assert list(evaluate(scores, labels, None, ["image_ap", "image_auroc"])) == [
        "image_ap",
        "image_auroc",
    ]
    with pytest.raises(MetricError, match="samples is None"):
        evaluate(scores, labels, None)


def test_unknown_metrics_are_refused_with_the_nearest_named() -> None:
    with pytest.raises(MetricError, match=r"'pixel_app'\. Did you mean 'pixel_ap'"):
        evaluate(*make_set(), ["pixel_app"])


@pytest.mark.parametrize(
    ("index", "label", "message"),
    [
        (0, 1, "image 0 is labelled a defect and has regions without pixels"),
        (1, 0, "image 1 is labelled normal, but its mask marks"),
    ],
)
def test_masks_that_contradict_the_labels_are_refused(index: int, label: int, message: str) -> None:
    scores, labels, samples = make_set()
    labels = labels.copy()
    labels[index] = label
    with pytest.raises(MetricError, match=message):
        evaluate(scores, labels, samples, ["pixel_ap"])


def test_labels_and_samples_of_different_lengths_are_refused() -> None:
    scores, labels, samples = make_set()
    with pytest.raises(MetricError, match="5 labels for 4 samples"):
        evaluate(scores, labels, samples[:4], ["pixel_ap"])
