"""The choice of the trials whose fusion weight is swept at the end."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from clsnf.results import Measurements, TrialResult
from clsnf.study.winner import best_trials


def trial(number: int, objective: float, **config: Any) -> TrialResult:
    measured = Measurements(families={"scar": objective})
    return TrialResult(
        "nut", number, "finished", objective=objective, config=config, measured=measured
    )


def numbers(trials: list[TrialResult]) -> list[int]:
    return [t.number for t in trials]


def test_trials_that_differ_in_the_fusion_weight_alone_are_one_candidate() -> None:
    trials = [
        trial(0, 0.5, fusion_weight=0.1, flow_depth=2),
        trial(1, 0.7, fusion_weight=0.9, flow_depth=2),
        trial(2, 0.6, fusion_weight=0.1, flow_depth=4),
        trial(3, 0.4, flow_depth=2, fusion_weight=0.3),
    ]
    assert numbers(best_trials(trials, 3)) == [1, 2]
    assert numbers(best_trials(trials, 1)) == [1]


def test_ties_go_to_the_earlier_trial() -> None:
    trials = [
        trial(0, 0.1, flow_depth=0),
        trial(1, 0.5, flow_depth=2),
        trial(2, 0.5, flow_depth=0),
        trial(3, 0.5, flow_depth=2),
    ]
    assert numbers(best_trials(trials, 3)) == [1, 2]


def test_the_order_of_a_trials_settings_does_not_matter() -> None:
    trials = [
        trial(0, 0.5, flow_depth=2, finetune_epochs=4),
        trial(1, 0.6, finetune_epochs=4, flow_depth=2),
    ]
    assert numbers(best_trials(trials, 3)) == [1]


TRIALS = st.lists(
    st.tuples(st.floats(0, 1), st.sampled_from([0, 2, 4]), st.floats(0, 1)).map(
        lambda t: trial(0, t[0], flow_depth=t[1], fusion_weight=t[2])
    ),
    min_size=1,
)


@given(TRIALS, st.integers(1, 5))
def test_the_best_trial_leads_and_every_candidate_is_the_best_of_its_kind(
    trials: list[TrialResult], most: int
) -> None:
    best = best_trials(trials, most)

    def value(trial: TrialResult) -> float:
        return trial.measured.families["scar"]

    assert value(best[0]) == max(map(value, trials))
    assert list(map(value, best)) == sorted(map(value, best), reverse=True)
    depths = [t.config["flow_depth"] for t in best]
    kinds = {t.config["flow_depth"] for t in trials}
    assert len(depths) == len(set(depths)) == min(most, len(kinds))
    for chosen in best:
        same = [t for t in trials if t.config["flow_depth"] == chosen.config["flow_depth"]]
        assert value(chosen) == max(map(value, same))
