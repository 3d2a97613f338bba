"""The choice of the trials whose fusion weight is swept at the end."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from clsnf.study.winner import best_few


def trial(name: str, objective: float, **config: Any) -> dict[str, Any]:
    return {
        "trial": name,
        "objective": objective,
        "config": config,
        "figures": {"family_scar": objective},
    }


def names(trials: list[dict[str, Any]]) -> list[str]:
    return [t["trial"] for t in trials]


def test_trials_that_differ_in_the_fusion_weight_alone_are_one_candidate() -> None:
    trials = [
        trial("a", 0.5, fusion_weight=0.1, flow_depth=2),
        trial("b", 0.7, fusion_weight=0.9, flow_depth=2),
        trial("c", 0.6, fusion_weight=0.1, flow_depth=4),
        trial("d", 0.4, flow_depth=2, fusion_weight=0.3),
    ]
    assert names(best_few(trials, 3)) == ["b", "c"]
    assert names(best_few(trials, 1)) == ["b"]


def test_ties_go_to_the_earlier_trial() -> None:
    trials = [
        trial("a", 0.1, flow_depth=0),
        trial("b", 0.5, flow_depth=2),
        trial("c", 0.5, flow_depth=0),
        trial("d", 0.5, flow_depth=2),
    ]
    assert names(best_few(trials, 3)) == ["b", "c"]


def test_the_order_of_a_trials_settings_does_not_matter() -> None:
    trials = [
        trial("a", 0.5, flow_depth=2, finetune_epochs=4),
        trial("b", 0.6, finetune_epochs=4, flow_depth=2),
    ]
    assert names(best_few(trials, 3)) == ["b"]


TRIALS = st.lists(
    st.tuples(st.floats(0, 1), st.sampled_from([0, 2, 4]), st.floats(0, 1)).map(
        lambda t: trial("", t[0], flow_depth=t[1], fusion_weight=t[2])
    ),
    min_size=1,
)


@given(TRIALS, st.integers(1, 5))
def test_the_best_trial_leads_and_every_candidate_is_the_best_of_its_kind(
    trials: list[dict[str, Any]], most: int
) -> None:
    few = best_few(trials, most)
    assert few[0]["objective"] == max(t["objective"] for t in trials)
    assert [t["objective"] for t in few] == sorted((t["objective"] for t in few), reverse=True)
    depths = [t["config"]["flow_depth"] for t in few]
    assert (
        len(depths)
        == len(set(depths))
        == min(most, len({t["config"]["flow_depth"] for t in trials}))
    )
    for chosen in few:
        same = [
            t["objective"]
            for t in trials
            if t["config"]["flow_depth"] == chosen["config"]["flow_depth"]
        ]
        assert chosen["objective"] == max(same)
