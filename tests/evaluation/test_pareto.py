"""The Pareto front, held against its definition."""

from hypothesis import given
from hypothesis import strategies as st

from clsnf.evaluation.pareto import pareto_front

# Few distinct values: ties are the hard cases.
points = st.integers(1, 3).flatmap(
    lambda count: st.lists(st.lists(st.integers(0, 3), min_size=count, max_size=count), max_size=12)
)


def dominates(first: list[int], second: list[int]) -> bool:
    pairs = list(zip(first, second, strict=True))
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)


@given(points)
def test_the_front_is_every_point_that_no_other_dominates(values: list[list[int]]) -> None:
    assert pareto_front(values) == [
        index
        for index, point in enumerate(values)
        if not any(dominates(other, point) for other in values)
    ]


@given(points)
def test_every_point_off_the_front_is_dominated_by_one_on_it(values: list[list[int]]) -> None:
    front = pareto_front(values)
    for index, point in enumerate(values):
        assert index in front or any(dominates(values[other], point) for other in front)


def test_equal_points_are_all_on_the_front() -> None:
    assert pareto_front([[1.0, 2.0], [0.0, 3.0], [1.0, 2.0], [0.0, 2.0]]) == [0, 1, 2]


def test_no_points_have_no_front() -> None:
    assert pareto_front([]) == []
