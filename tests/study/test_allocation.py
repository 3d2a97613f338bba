"""Whose turn it is, when a search ends, and what categories tell each other."""

import itertools
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.storages import InMemoryStorage
from ray.tune.search import Searcher

from clsnf.core.config import DetectorSettings, StudySettings
from clsnf.core.errors import SettingsError
from clsnf.results import Measurements, TrialResult
from clsnf.study.allocation import FLOOR, Allocation, expected_best, expected_gains, growth
from clsnf.study.reports import TrialReport
from clsnf.study.search import CATEGORY, NUMBER, PerCategorySearch
from clsnf.study.space import Space
from clsnf.study.trials import CategoryTrials, SearchPlan
from tests.support.searching import run_overlapping

SPACE = Space(
    {
        "flow.passes": {"type": "float", "low": 0.5, "high": 1.5},
        "finetune_epochs": {"type": "choice", "values": list(range(12))},
        "flow_depth": {"type": "choice", "values": [0, 2, 4, 6]},
    }
)


def trial(
    category: str, number: int, objective: float | None = 0.5, seconds: float = 1.0
) -> TrialResult:
    status = "failed" if objective is None else "finished"
    measured = Measurements(seconds=seconds)
    return TrialResult(category, number, status, objective=objective, measured=measured)  # type: ignore[arg-type]


def searcher(
    categories: list[str], study: StudySettings, in_sequence: bool = True, lines: Any = None
) -> PerCategorySearch:
    plan = SearchPlan(SPACE.distributions(), 6, {"pixel_ap": "maximize"}, 0, in_sequence)
    storage, start = InMemoryStorage(), SPACE.start(DetectorSettings())
    trials_of = {c: CategoryTrials(storage, c, c, plan, [start]) for c in categories}
    say = (lambda line: None) if lines is None else lines.append
    return PerCategorySearch(trials_of, Allocation(study, say=say), in_sequence)


def report(objective: float) -> dict[str, Any]:
    measured = Measurements(validation={"pixel_ap": objective}, seconds=1.0)
    return TrialReport(objective, measured=measured).to_tune()


def run(search: PerCategorySearch, objective: Any) -> list[dict[str, Any]]:
    """Trials one at a time, until the searcher has no more."""
    seen: list[dict[str, Any]] = []
    for number in range(200):
        config = search.suggest(f"t{number}")
        if config == Searcher.FINISHED:
            return seen
        seen.append(config)
        search.on_trial_complete(f"t{number}", report(objective(config)))
    raise AssertionError("the search does not end")


# ---- the estimate of the gain ----


@given(st.lists(st.floats(0, 1), min_size=1, max_size=7), st.data())
def test_the_expected_best_is_the_mean_over_all_subsets(
    values: list[float], data: st.DataObject
) -> None:
    of = data.draw(st.integers(1, len(values)))
    subsets = [max(subset) for subset in itertools.combinations(values, of)]
    assert expected_best(values, of) == pytest.approx(sum(subsets) / len(subsets))


@given(st.lists(st.floats(0, 1), min_size=2, max_size=9), st.randoms())
def test_growth_is_no_loss_and_the_order_of_trials_does_not_matter(
    values: list[float], random: Any
) -> None:
    found = growth(values)
    assert found >= 0
    random.shuffle(values)
    assert growth(values) == found


def test_the_gain_falls_with_trials_and_grows_with_their_spread() -> None:
    assert growth([0.5]) == growth([0.5, 0.5, 0.5]) == 0
    values = {"wide": [0.1, 0.5, 0.9], "narrow": [0.4, 0.5, 0.6], "long": [0.1, 0.5, 0.9] * 4}
    gains = expected_gains(values, dict.fromkeys(values, 0))
    assert gains["wide"] > gains["narrow"] > gains["long"] > 0
    assert expected_gains(values, dict.fromkeys(values, 1))["wide"] < gains["wide"]


# ---- turns ----


def test_with_trials_for_each_category_turns_are_fair_whatever_the_gains() -> None:
    allocation = Allocation(StudySettings(trials=9))
    for number, value in enumerate([0.1, 0.5, 0.9, 0.2]):
        allocation.add(trial("a", number, value))
        allocation.add(trial("b", number, 0.5))
    assert allocation.turns({"a": 4, "b": 4}, {"a": 0, "b": 0}) == ["a", "b"]
    assert allocation.turns({"a": 5, "b": 4}, {"a": 0, "b": 0}) == ["b", "a"]
    assert allocation.turns({"a": 4, "b": 4}, {"a": 1, "b": 0}) == ["b", "a"]
    assert allocation.turns({"a": 9, "b": 4}, {"a": 0, "b": 0}) == ["b"]
    assert allocation.left({"a": 9, "b": 4}) == 5


def test_a_shared_budget_goes_where_most_is_to_gain_after_a_floor_for_each() -> None:
    study = StudySettings(trials=None, total_trials=30)

    def objective(config: dict[str, Any]) -> float:
        spread = {"flat": 0.0, "narrow": 0.01, "wide": 0.5}[config[CATEGORY]]
        return 0.4 + spread * config["flow.passes"]

    seen = run(searcher(["flat", "narrow", "wide"], study), objective)
    assert [s[CATEGORY] for s in seen[: 3 * FLOOR]] == ["flat", "narrow", "wide"] * FLOOR
    counts = Counter(s[CATEGORY] for s in seen)
    assert sum(counts.values()) == 30
    assert FLOOR < counts["flat"] <= counts["narrow"] < counts["wide"]
    assert run(searcher(["flat", "narrow", "wide"], study), objective) == seen, "nothing is random"


def test_a_budget_that_is_smaller_than_the_floors_is_shared_fairly() -> None:
    seen = run(searcher(["a", "b", "c"], StudySettings(total_trials=7)), lambda config: 0.5)
    assert [s[CATEGORY] for s in seen] == ["a", "b", "c"] * 2 + ["a"]
    both = run(searcher(["a", "b"], StudySettings(trials=4, total_trials=99)), lambda config: 0.5)
    assert Counter(s[CATEGORY] for s in both) == {"a": 4, "b": 4}


def test_failed_trials_use_up_the_budget() -> None:
    allocation = Allocation(StudySettings(trials=None, total_trials=8))
    for number in range(4):
        allocation.add(trial("broken", number, None))
        allocation.add(trial("good", number, number / 10))
    assert allocation.turns({"broken": 4, "good": 3}, {"broken": 0, "good": 0})[0] == "good"
    assert allocation.turns({"broken": 4, "good": 4}, {"broken": 0, "good": 0}) == []
    assert allocation.left({"broken": 4, "good": 3}) == 1


# ---- target and plateau ----


def test_a_search_ends_at_its_target_and_says_so() -> None:
    lines: list[str] = []
    study = StudySettings(trials=8, target=0.9)
    seen = run(
        searcher(["a", "b"], study, lines=lines),
        lambda config: 0.95 if config[CATEGORY] == "a" and config[NUMBER] == 2 else 0.5,
    )
    assert Counter(s[CATEGORY] for s in seen) == {"a": 3, "b": 8}
    assert lines == ["a: no more trials: pixel_ap 0.9500 reaches the target, 0.9"]


def test_a_search_ends_at_a_plateau_and_says_so() -> None:
    lines: list[str] = []
    study = StudySettings(trials=20, plateau=4)
    seen = run(
        searcher(["a", "b"], study, lines=lines),
        lambda config: min(config[NUMBER], 2 if config[CATEGORY] == "a" else 5) / 10,
    )
    assert Counter(s[CATEGORY] for s in seen) == {"a": 7, "b": 10}
    assert lines == [
        "a: no more trials: pixel_ap 0.2000 was not improved by 4 trials (plateau)",
        "b: no more trials: pixel_ap 0.5000 was not improved by 4 trials (plateau)",
    ]


def test_target_and_plateau_hold_for_earlier_trials_and_not_for_failed_ones() -> None:
    allocation = Allocation(StudySettings(target=0.5, plateau=2))
    for number in range(5):
        allocation.add(trial("broken", number, None))
    allocation.add(trial("good", 0, 0.6))
    assert allocation.turns({"broken": 5, "good": 1}, {"broken": 0, "good": 0}) == ["broken"]


@pytest.mark.parametrize(
    "given", [{"total_trials": -1}, {"plateau": -1}, {"target": float("nan")}, {"trials": 0}]
)
def test_limits_that_make_no_sense_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=next(iter(given))):
        StudySettings(**given)


# ---- what won on others ----


def peak(config: dict[str, Any]) -> float:
    """Every category is best at the same point, which is hard to find."""
    at = config["finetune_epochs"] == 7 and config["flow_depth"] == 6
    return 0.9 if at else 0.001 * config["finetune_epochs"]


def test_a_category_tries_what_won_on_others_after_its_first_point() -> None:
    study = StudySettings(trials=3, share_points=True)
    search = searcher(["a", "b", "c"], study)
    start = SPACE.start(DetectorSettings())

    def objective(config: dict[str, Any]) -> float:
        return 0.9 if config[CATEGORY] == "a" and config[NUMBER] == 1 else 0.1

    seen = run(search, objective)
    first = [s for s in seen if s[NUMBER] == 0]
    assert [{n: s[n] for n in start} for s in first] == [start] * 3
    won = next(s for s in seen if s[CATEGORY] == "a" and s[NUMBER] == 1)
    third = [s for s in seen if s[NUMBER] == 2]
    assert [{n: s[n] for n in start} == {n: won[n] for n in start} for s in third] == [
        False,
        True,
        True,
    ]


@settings(max_examples=15, deadline=None)
@given(at_once=st.integers(1, 3), order=st.lists(st.integers(0, 2), max_size=18))
def test_shared_points_are_the_same_however_long_each_trial_takes(
    at_once: int, order: list[int]
) -> None:
    categories = ["a", "b", "c"]
    study = StudySettings(trials=4, share_points=True)
    expected = run(searcher(categories, study), peak)
    search = searcher(categories, study)
    seen = run_overlapping(search, lambda config: report(peak(config)), at_once, order)
    assert sorted(map(str, seen)) == sorted(map(str, expected))


def test_by_default_no_category_sees_anothers_points() -> None:
    together = run(searcher(["a", "b"], StudySettings(trials=5)), peak)
    alone = run(searcher(["b"], StudySettings(trials=5)), peak)
    assert [s for s in together if s[CATEGORY] == "b"] == alone
