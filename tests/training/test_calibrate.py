"""Thresholds keep their promise: the next normal image exceeds one at no more than the stated rate,
whatever the scores.
"""

import math
from fractions import Fraction
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clsnf.core.errors import MetricError
from clsnf.training.calibrate import p_value, threshold_from_normals

SCORES = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=200).map(
    lambda values: np.array(values, np.float32)
)
RATES = st.floats(0.001, 0.5)
USUAL = ("0.001", "0.002", "0.005", "0.01", "0.02", "0.05", "0.07", "0.1", "0.2", "0.3")


@given(SCORES, RATES)
def test_a_threshold_is_a_score_that_few_normals_exceed(scores: np.ndarray, rate: float) -> None:
    threshold = threshold_from_normals(scores, rate)
    assert threshold.value in scores.astype(float)
    assert (scores > threshold.value).mean() <= rate
    assert threshold.normals == len(scores)
    assert threshold.false_reject_rate == rate


@given(SCORES, st.floats(0.01, 0.4), st.randoms(use_true_random=False))
def test_a_threshold_depends_neither_on_the_order_nor_on_the_scale_of_scores(
    scores: np.ndarray, rate: float, random: Random
) -> None:
    shuffled = scores.tolist()
    random.shuffle(shuffled)
    assert threshold_from_normals(np.array(shuffled, np.float32), rate) == threshold_from_normals(
        scores, rate
    )
    doubled = threshold_from_normals(scores.astype(float) * 2, rate).value
    assert doubled == 2 * threshold_from_normals(scores, rate).value


@given(SCORES, RATES, RATES)
def test_a_lower_rate_never_has_a_lower_threshold(
    scores: np.ndarray, one: float, other: float
) -> None:
    low, high = (threshold_from_normals(scores, rate).value for rate in sorted((one, other)))
    assert low >= high


@pytest.mark.parametrize("rate", USUAL)
def test_the_rank_is_the_conformal_one_without_rounding_errors(rate: str) -> None:
    for n in range(1, 1100):
        expected = min(n, math.ceil((n + 1) * (1 - Fraction(rate))))
        assert threshold_from_normals(np.arange(1, n + 1), float(rate)).value == expected, n


@pytest.mark.parametrize(
    ("n", "supported"), [(9, 0.1), (19, 0.05), (98, 1 / 99), (99, 0.01), (500, 0.01)]
)
def test_few_normals_support_no_lower_rate_than_one_in_n_plus_one(n: int, supported: float) -> None:
    threshold = threshold_from_normals(np.arange(n), 0.01)
    assert threshold.supported_rate == pytest.approx(supported)
    if n < 99:
        assert threshold.value == n - 1  # the largest


@pytest.mark.parametrize(("n", "rate"), [(10, 0.2), (19, 0.05), (40, 0.1), (40, 0.01), (99, 0.01)])
def test_the_next_normal_exceeds_the_threshold_at_the_supported_rate(n: int, rate: float) -> None:
    """For scores without ties the rate is known exactly: 1 - k / (n + 1); here it is counted."""
    draws = np.random.default_rng(0).standard_cauchy((20_000, n + 1))
    thresholds = np.array([threshold_from_normals(draw[:n], rate).value for draw in draws])
    supported = threshold_from_normals(draws[0, :n], rate).supported_rate
    exceeded = float((draws[:, n] > thresholds).mean())
    spread = math.sqrt(supported / len(draws))
    assert exceeded <= supported + 4 * spread
    assert exceeded >= supported - 1 / (n + 1) - 4 * spread


@pytest.mark.parametrize("scores", [[], [math.nan], [0.1, math.nan], [0.2, math.inf]])
def test_no_scores_or_some_that_are_not_finite_are_refused(scores: list[float]) -> None:
    with pytest.raises(MetricError, match="finite scores") as caught:
        threshold_from_normals(np.array(scores), 0.1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_a_rate_that_is_none_is_refused(rate: float) -> None:
    with pytest.raises(MetricError, match="false-reject rate"):
        threshold_from_normals(np.arange(10), rate)


@pytest.mark.parametrize(("n", "rate"), [(20, 0.1), (45, 0.01), (200, 0.05)])
def test_the_interval_holds_the_true_rate_as_often_as_it_says(n: int, rate: float) -> None:
    """Of uniform scores the share above a threshold t is 1 - t."""
    draws = np.random.default_rng(1).random((4000, n))
    thresholds = [threshold_from_normals(draw, rate) for draw in draws]
    low, high = thresholds[0].interval
    true = 1 - np.array([threshold.value for threshold in thresholds])
    assert ((true >= low) & (true <= high)).mean() == pytest.approx(0.95, abs=0.015)


@given(st.integers(1, 2000), RATES)
def test_an_interval_lies_in_zero_to_one_and_around_what_is_expected(n: int, rate: float) -> None:
    threshold = threshold_from_normals(np.linspace(0, 1, n), rate)
    low, high = threshold.interval
    assert 0 <= low < high <= 1
    assert low < threshold.supported_rate


def test_a_p_value_is_the_share_of_scores_as_high_counted_with_the_image_itself() -> None:
    normals = np.array([0.1, 0.2, 0.2, 0.4])
    assert [p_value(score, normals) for score in (0.0, 0.2, 0.3, 0.5)] == [1.0, 0.8, 0.4, 0.2]
    assert p_value(0.5, np.empty(0)) == 1.0
