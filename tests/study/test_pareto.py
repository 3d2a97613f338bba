"""Several objectives: which candidates are on the Pareto front."""

from hypothesis import given
from hypothesis import strategies as st

from clsnf.core.config import StudySettings
from clsnf.results import TrialResult
from clsnf.study.candidates import Candidate
from clsnf.study.pareto import front_of
from clsnf.study.trials import directions_of

STUDY = StudySettings(objectives=("pixel_ap", "latency"))


def trial(number: int, quality: float, latency: float, weight: float = 0.5) -> Candidate:
    own = TrialResult("nut", number, "finished", objective=quality)
    objectives = {"pixel_ap": quality, "latency": latency}
    return Candidate(own, weight, 0.1, (quality,), objectives)


def front(candidates: list[Candidate]) -> list[int]:
    return [candidate.trial.number for candidate in front_of(candidates, STUDY)]


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


def test_of_a_trials_equal_weights_the_first_is_on_the_front() -> None:
    candidates = [trial(0, 0.5, 10, 0.2), trial(0, 0.5, 10, 0.3), trial(0, 0.4, 10, 0.4)]
    assert front_of(candidates, STUDY) == candidates[:1]


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
