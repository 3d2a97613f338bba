"""One searcher for many categories: fair turns, the right number, and no category that sees another's trials."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.tune.search import Searcher

from clsnf.config import DetectorSettings
from clsnf.study.search import CATEGORY, PerCategorySearch, category_seed
from clsnf.study.space import DEFAULT_SPACE, Space

SPACE = Space(DEFAULT_SPACE)
START = SPACE.start(DetectorSettings())


@pytest.fixture(autouse=True)
def quiet() -> None:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)


def searcher(categories: list[str], trials: int = 6, seed: int = 0, in_sequence: bool = True) -> PerCategorySearch:
    return PerCategorySearch(categories, SPACE.distributions(), START, trials, "objective", seed, in_sequence)


def objective(config: dict[str, Any]) -> float:
    """Any function that tells settings apart."""
    return 1 - (config["fusion_weight"] - 0.3) ** 2 - 0.01 * config["flow_depth"] + 0.02 * config["finetune_epochs"]


def run(search: PerCategorySearch, most: int = 1000, prefix: str = "t") -> list[dict[str, Any]]:
    """Trials one at a time, as Tune would run them, until the searcher has no more."""
    seen = []
    for number in range(most):
        config = search.suggest(f"{prefix}{number}")
        if config == Searcher.FINISHED:
            break
        seen.append(config)
        search.on_trial_complete(f"{prefix}{number}", {"objective": objective(config)})
    return seen


def of(category: str, trials: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [trial for trial in trials if trial[CATEGORY] == category]


@settings(max_examples=15, deadline=None)
@given(categories=st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=4, unique=True), trials=st.integers(1, 5))
def test_every_category_gets_its_trials_in_turn(categories: list[str], trials: int) -> None:
    seen = run(searcher(categories, trials))
    assert Counter(trial[CATEGORY] for trial in seen) == dict.fromkeys(categories, trials)
    for start in range(0, len(seen), len(categories)):
        assert [trial[CATEGORY] for trial in seen[start : start + len(categories)]] == categories


def test_every_categorys_first_trial_is_the_start_point() -> None:
    seen = run(searcher(["screw", "tire"], 2))
    assert seen[:2] == [{CATEGORY: "screw", **START}, {CATEGORY: "tire", **START}]


def test_turns_stay_fair_while_many_trials_run_at_once() -> None:
    search = searcher(["a", "b", "c"], 2, in_sequence=False)
    handed = [search.suggest(f"t{i}") for i in range(7)]
    assert [h[CATEGORY] for h in handed[:6]] == ["a", "b", "c", "a", "b", "c"]
    assert handed[6] == Searcher.FINISHED


@settings(max_examples=25, deadline=None)
@given(at_once=st.integers(1, 3), order=st.lists(st.integers(0, 2), max_size=12))
def test_trials_in_sequence_are_the_same_however_long_each_takes(at_once: int, order: list[int]) -> None:
    """`order` says which of the running trials ends next."""
    categories = ["a", "b", "c"]
    search = searcher(categories, 4)
    running: dict[str, dict[str, Any]] = {}
    seen: list[dict[str, Any]] = []
    ends = iter([*order, *[0] * 12])
    for number in range(100):
        config = search.suggest(f"t{number}") if len(running) < at_once else None
        if isinstance(config, dict):
            running[f"t{number}"] = config
            seen.append(config)
        elif running:
            name = list(running)[next(ends) % len(running)]
            search.on_trial_complete(name, {"objective": objective(running.pop(name))})
        else:
            break
    assert len(seen) == 12
    for category in categories:
        assert of(category, seen) == run(searcher([category], 4))


def test_a_category_is_suggested_the_same_alone_or_with_others() -> None:
    alone = run(searcher(["tire"], 8))
    together = of("tire", run(searcher(["screw", "tire", "nut"], 8)))
    assert alone == together
    assert len({str(trial) for trial in alone}) > 1


def test_seeds_and_names_decide_the_suggestions() -> None:
    first = of("a", run(searcher(["a"], seed=0)))
    assert of("a", run(searcher(["a"], seed=0))) == first
    assert of("a", run(searcher(["a"], seed=1)))[1:] != first[1:]
    other = [{**trial, CATEGORY: "a"} for trial in run(searcher(["b"], seed=0))]
    assert other[1:] != first[1:]


def test_the_seed_of_a_category_is_fixed() -> None:
    """Another value here changes every study's trials."""
    assert category_seed(0, "screw") == 2091048485
    assert category_seed(1, "screw") != category_seed(0, "screw")
    assert 0 <= category_seed(2**32 - 1, "ü" * 100) < 2**32


def test_the_sampler_learns_from_its_category() -> None:
    weights = [trial["fusion_weight"] for trial in run(searcher(["a"], 40))]
    late = [abs(w - 0.3) for w in weights[20:]]
    early = [abs(w - 0.3) for w in weights[1:10]]
    assert sum(late) / len(late) < sum(early) / len(early)


def test_a_failed_trial_counts_and_the_search_goes_on() -> None:
    search = searcher(["a", "b"], 4)
    handed = []
    for number in range(9):
        config = search.suggest(f"t{number}")
        if config == Searcher.FINISHED:
            break
        handed.append(config)
        if config[CATEGORY] == "a":
            search.on_trial_complete(f"t{number}", error=True)
        else:
            search.on_trial_complete(f"t{number}", {"objective": objective(config)})
    assert Counter(h[CATEGORY] for h in handed) == {"a": 4, "b": 4}
    assert of("b", handed) == run(searcher(["b"], 4)), "another category's failures must not be felt"


def test_a_saved_search_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    whole = run(searcher(["a", "b"], 6))

    search = searcher(["a", "b"], 6)
    before = run(search, most=5)
    search.save(str(tmp_path / "state.pkl"))
    restored = searcher(["a", "b"], 6)
    restored.restore(str(tmp_path / "state.pkl"))
    assert before + run(restored, prefix="later") == whole


def test_a_search_saved_while_trials_run_takes_their_results(tmp_path: Path) -> None:
    search = searcher(["a", "b"], 3, in_sequence=False)
    running = {f"t{i}": search.suggest(f"t{i}") for i in range(3)}
    search.save(str(tmp_path / "state.pkl"))
    restored = searcher(["a", "b"], 3, in_sequence=False)
    restored.restore(str(tmp_path / "state.pkl"))
    for name, config in running.items():
        restored.on_trial_complete(name, {"objective": objective(config)})
    assert [trial[CATEGORY] for trial in run(restored, prefix="later")] == ["b", "a", "b"]
