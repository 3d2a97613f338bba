"""Several objectives: which trials are on the Pareto front."""

from hypothesis import given
from hypothesis import strategies as st

from clsnf.core.config import StudySettings
from clsnf.results import Measurements, TrialResult
from clsnf.study.pareto import front_of
from clsnf.study.trials import directions_of

STUDY = StudySettings(objectives=("pixel_ap", "latency"))


def trial(number: int, quality: float, latency: float) -> TrialResult:
    measured = Measurements(validation={"pixel_ap": quality}, latency=latency)
    return TrialResult("nut", number, "finished", objective=quality, measured=measured)


def front(trials: list[TrialResult]) -> list[int]:
    return [trial.number for trial in front_of(trials, STUDY)]


def test_latency_is_lowered_and_metrics_are_raised() -> None:
    assert directions_of(STUDY) == {"pixel_ap": "maximize", "latency": "minimize"}
    trials = [
        trial(0, 0.5, 10),
        trial(1, 0.4, 5),
        trial(2, 0.4, 6),
        trial(3, 0.6, 20),
        trial(4, 0.5, 11),
    ]
    assert front(trials) == [3, 0, 1]


def test_equal_trials_are_all_on_the_front() -> None:
    assert front([trial(0, 0.5, 10), trial(1, 0.5, 10)]) == [0, 1]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_every_trial_is_on_the_front_or_dominated_by_one_that_is(
    values: list[tuple[int, int]],
) -> None:
    kept = front([trial(n, quality, latency) for n, (quality, latency) in enumerate(values)])
    assert kept

    def dominates(a: tuple[int, int], b: tuple[int, int]) -> bool:
        return a != b and a[0] >= b[0] and a[1] <= b[1]

    for n, own in enumerate(values):
        assert (n in kept) != any(dominates(values[k], own) for k in kept)
