"""Image metrics against scikit-learn, and against values worked out by hand."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from clsnf.core.errors import MetricError
from clsnf.metrics import image_ap, image_auroc, image_f1_max

METRICS = [image_auroc, image_ap, image_f1_max]

# Scores from five values: nearly every score is tied, within its class and across.
tied_sets = st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=60).filter(
    lambda rows: 0 < sum(label for _, label in rows) < len(rows)
)


@given(tied_sets)
def test_image_metrics_equal_scikit_learn_under_heavy_ties(rows: list[tuple[int, bool]]) -> None:
    scores = np.array([score for score, _ in rows], np.float32)
    labels = np.array([label for _, label in rows])
    precision, recall, _ = precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-300)
    assert image_auroc(scores, labels) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert image_ap(scores, labels) == pytest.approx(
        average_precision_score(labels, scores), abs=1e-12
    )
    assert image_f1_max(scores, labels) == pytest.approx(f1.max(), abs=1e-12)


def test_image_metrics_equal_values_worked_out_by_hand() -> None:
    scores, labels = [0.9, 0.7, 0.7, 0.4, 0.1], [1, 0, 1, 1, 0]
    # Pairs won of 6: 0.9 wins 2; 0.7 wins one and half of the tie; 0.4 wins one.
    assert image_auroc(scores, labels) == pytest.approx(4.5 / 6)
    # Thresholds 0.9, 0.7, 0.4: precisions 1, 2/3, 3/4, each gaining a third of the recall.
    assert image_ap(scores, labels) == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)
    # F1 there: 2/4, 4/6, 6/7.
    assert image_f1_max(scores, labels) == pytest.approx(6 / 7)


def test_float64_scores_are_not_rounded_to_float32() -> None:
    assert image_auroc([1.0, 1.0 + 1e-12], [0, 1]) == 1.0


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([], [], "no images"),
        ([1, 2], [1, 1], "all 2 images are defects"),
        ([1, 2], [0, 0], "all 2 images are normal"),
        ([1, 2, 3], [0, 1], r"shape \(3,\), labels \(2,\)"),
        ([1, 2, 3], [0, 1, 2], "0 normal or 1 defect"),
        ([1, float("nan")], [0, 1], "score of image 1 is nan"),
        ([float("inf"), 1], [0, 1], "score of image 0 is inf"),
        ([[1], [2]], [[0], [1]], r"must be \(N,\)"),
    ],
)
def test_undefined_image_metrics_are_refused(
    metric: Callable[..., float], scores: list[float], labels: list[int], message: str
) -> None:
    with pytest.raises(MetricError, match=message):
        metric(scores, labels)
