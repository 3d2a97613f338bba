"""Several objectives: which trials no other one beats."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from clsnf.core.config import StudySettings
from clsnf.study.pareto import front, objectives_of

OBJECTIVES = objectives_of(StudySettings(objectives=("pixel_ap", "latency")))


def trial(number: int, quality: float, latency: float) -> dict[str, Any]:
    return {"trial": number, "figures": {"validation_pixel_ap": quality, "latency": latency}}


def test_latency_is_lowered_and_figures_are_raised() -> None:
    assert OBJECTIVES == {"validation_pixel_ap": "maximize", "latency": "minimize"}
    trials = [
        trial(0, 0.5, 10),
        trial(1, 0.4, 5),
        trial(2, 0.4, 6),
        trial(3, 0.6, 20),
        trial(4, 0.5, 11),
    ]
    assert [t["trial"] for t in front(trials, OBJECTIVES)] == [3, 0, 1]


def test_equal_trials_are_all_on_the_front() -> None:
    assert len(front([trial(0, 0.5, 10), trial(1, 0.5, 10)], OBJECTIVES)) == 2


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_every_trial_is_on_the_front_or_beaten_by_one_that_is(
    values: list[tuple[int, int]],
) -> None:
    trials = [trial(n, quality, latency) for n, (quality, latency) in enumerate(values)]
    kept = {t["trial"] for t in front(trials, OBJECTIVES)}
    assert kept

    def beats(a: tuple[int, int], b: tuple[int, int]) -> bool:
        return a != b and a[0] >= b[0] and a[1] <= b[1]

    for n, own in enumerate(values):
        assert (n in kept) != any(beats(values[k], own) for k in kept)
