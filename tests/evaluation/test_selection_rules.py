"""Contract of every selection rule, and what each is for."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from clsnf.core.errors import SettingsError
from clsnf.evaluation.selection_rules import RULES, check_rule, order, pick

VALUES = arrays(
    float,
    st.tuples(st.integers(1, 6), st.integers(1, 5)),
    elements=st.integers(0, 8).map(lambda n: n / 8),
)
every_rule = pytest.mark.parametrize("rule", RULES)


@every_rule
@given(VALUES)
def test_a_rule_scores_every_candidate_and_picks_the_first_of_the_best(
    rule: str, values: np.ndarray
) -> None:
    scores = RULES[rule].score(values)
    assert scores.shape == (len(values),)
    ordered = order(rule, values.tolist())
    assert sorted(ordered) == list(range(len(values)))
    assert ordered[0] == pick(rule, values.tolist()) == int(np.argmax(scores))


@every_rule
@given(VALUES, st.data())
def test_a_candidate_that_is_better_on_every_family_is_never_left_behind(
    rule: str, values: np.ndarray, data: st.DataObject
) -> None:
    best = values.max(axis=0) + 0.5
    place = data.draw(st.integers(0, len(values)))
    assert pick(rule, np.insert(values, place, best, axis=0).tolist()) == place


@every_rule
@given(VALUES, st.randoms())
def test_the_order_of_the_families_does_not_matter(
    rule: str, values: np.ndarray, random: object
) -> None:
    flipped = values[:, ::-1]
    np.testing.assert_allclose(RULES[rule].score(flipped), RULES[rule].score(values))


def test_what_each_rule_guards_against() -> None:
    """The first candidate owes its mean to one easy family; the third fails on one."""
    values = [[0.2, 0.2, 0.2, 1.0], [0.35, 0.35, 0.35, 0.4], [0.5, 0.5, 0.05, 0.41]]
    assert {rule: pick(rule, values) for rule in RULES} == {
        "mean": 0,
        "worst": 1,
        "leave_one_out": 1,
        "rank": 2,
    }


def test_leaving_one_family_out_takes_the_one_that_flatters_most() -> None:
    assert RULES["leave_one_out"].score(np.array([[0.1, 0.3, 0.8]])) == pytest.approx([0.2])


def test_an_unknown_rule_is_refused_with_the_nearest_one() -> None:
    check_rule("worst")
    with pytest.raises(
        SettingsError, match=r"The selection rule is 'wurst'\. Did you mean 'worst'"
    ):
        check_rule("wurst")
