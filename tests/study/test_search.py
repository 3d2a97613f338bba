"""One searcher for many categories: fair turns, the right number, and no category that sees
another's trials.
"""

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.trial import TrialState
from ray.tune.experiment import Trial
from ray.tune.search import Searcher

from clsnf.core.config import DetectorSettings, StudySettings
from clsnf.core.errors import OutageError, OutputError
from clsnf.results import Measurements, TrialResult
from clsnf.study.allocation import Allocation
from clsnf.study.pause import Pause
from clsnf.study.reports import TrialReport
from clsnf.study.search import (
    CATEGORY,
    MAX_ATTEMPTS,
    NUMBER,
    ForgetfulCallback,
    PerCategorySearch,
)
from clsnf.study.space import DEFAULT_SPACE, Space
from clsnf.study.trials import CategoryTrials, SearchPlan, open_storage, trial_seed
from tests.support.searching import run_overlapping

SPACE = Space(DEFAULT_SPACE | {"flow.passes": {"type": "float", "low": 0.5, "high": 4.0}})
START = SPACE.start(DetectorSettings())


def search_plan(
    space: Space = SPACE, trials: int = 6, seed: int = 0, in_sequence: bool = True
) -> SearchPlan:
    return SearchPlan(space.distributions(), trials, {"pixel_ap": "maximize"}, seed, in_sequence)


def every(trials: int) -> Allocation:
    """So many trials of every category."""
    return Allocation(StudySettings(trials=trials))


def searcher(
    categories: list[str],
    trials: int = 6,
    seed: int = 0,
    in_sequence: bool = True,
    storage: BaseStorage | None = None,
) -> PerCategorySearch:
    storage = storage or InMemoryStorage()
    plan = search_plan(SPACE, trials, seed, in_sequence)
    trials_of = {c: CategoryTrials(storage, c, c, plan, [START]) for c in categories}
    return PerCategorySearch(trials_of, every(trials), in_sequence)


def report(objective: float, step: int | None = None) -> dict[str, Any]:
    """What a trial reports to Tune."""
    measured = Measurements(validation={"pixel_ap": objective})
    return TrialReport(objective, step, measured=measured).to_tune()


def failure(cause: str, traceback: str | None = None) -> dict[str, Any]:
    measured = Measurements(traceback=traceback)
    return TrialReport(0.0, failure=cause, measured=measured).to_tune()


def objective(config: dict[str, Any]) -> float:
    """Any function that tells settings apart."""
    return (
        1
        - (config["flow.passes"] - 1.3) ** 2
        - 0.01 * config["flow_depth"]
        + 0.02 * config["finetune_epochs"]
    )


def run(search: PerCategorySearch, most: int = 1000, prefix: str = "t") -> list[dict[str, Any]]:
    """Trials one at a time, as Tune would run them, until the searcher has no more."""
    seen = []
    for number in range(most):
        config = search.suggest(f"{prefix}{number}")
        if config == Searcher.FINISHED:
            break
        seen.append(config)
        search.on_trial_complete(f"{prefix}{number}", report(objective(config)))
    return seen


def of(category: str, trials: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [trial for trial in trials if trial[CATEGORY] == category]


@settings(max_examples=15, deadline=None)
@given(
    categories=st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=4, unique=True),
    trials=st.integers(1, 5),
)
def test_every_category_gets_its_trials_in_turn(categories: list[str], trials: int) -> None:
    seen = run(searcher(categories, trials))
    assert Counter(trial[CATEGORY] for trial in seen) == dict.fromkeys(categories, trials)
    for start in range(0, len(seen), len(categories)):
        assert [trial[CATEGORY] for trial in seen[start : start + len(categories)]] == categories


def test_every_categorys_first_trial_is_the_start_point() -> None:
    seen = run(searcher(["screw", "tire"], 2))
    assert seen[:2] == [
        {CATEGORY: "screw", NUMBER: 0, **START},
        {CATEGORY: "tire", NUMBER: 0, **START},
    ]


def test_turns_stay_fair_while_many_trials_run_at_once() -> None:
    search = searcher(["a", "b", "c"], 2, in_sequence=False)
    handed = [search.suggest(f"t{i}") for i in range(6)]
    assert [h[CATEGORY] for h in handed] == ["a", "b", "c", "a", "b", "c"]
    assert search.suggest("t6") is None, "a trial that runs may have to run again"
    for i in range(6):
        search.on_trial_complete(f"t{i}", report(0.5))
    assert search.suggest("t6") == Searcher.FINISHED


@settings(max_examples=25, deadline=None)
@given(at_once=st.integers(1, 3), order=st.lists(st.integers(0, 2), max_size=12))
def test_trials_in_sequence_are_the_same_however_long_each_takes(
    at_once: int, order: list[int]
) -> None:
    """`order` says which of the running trials ends next."""
    categories = ["a", "b", "c"]
    search = searcher(categories, 4)
    seen = run_overlapping(search, lambda config: report(objective(config)), at_once, order)
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


def test_the_seed_of_a_trial_is_fixed() -> None:
    """Another value here changes every study's trials."""
    assert trial_seed(0, "screw", 3) == 1651795452
    assert (
        len(
            {
                trial_seed(0, "screw", 3),
                trial_seed(1, "screw", 3),
                trial_seed(0, "tire", 3),
                trial_seed(0, "screw", 4),
            }
        )
        == 4
    )
    assert 0 <= trial_seed(2**32 - 1, "ü" * 100, 10**6) < 2**32


def test_the_sampler_learns_from_its_category() -> None:
    passes = [trial["flow.passes"] for trial in run(searcher(["a"], 40))]
    late = [abs(p - 1.3) for p in passes[20:]]
    early = [abs(p - 1.3) for p in passes[1:10]]
    assert sum(late) / len(late) < sum(early) / len(early)


@pytest.mark.parametrize("way", ["reported", "killed"])
def test_a_failed_trial_counts_and_the_search_goes_on(way: str) -> None:
    search = searcher(["a", "b"], 4)
    handed = []
    for number in range(50):
        config = search.suggest(f"t{number}")
        if config == Searcher.FINISHED:
            break
        handed.append(config)
        if config[CATEGORY] == "b":
            search.on_trial_complete(f"t{number}", report(objective(config)))
        elif way == "reported":
            search.on_trial_complete(f"t{number}", failure("TrainingError: no"))
        else:
            search.on_trial_complete(f"t{number}", error=True)
            search.on_trial_failed(f"t{number}", "killed")
    expected = {"reported": 4, "killed": 4 * MAX_ATTEMPTS}[way]
    assert Counter(h[CATEGORY] for h in handed) == {"a": expected, "b": 4}
    if way == "killed":
        assert [h[NUMBER] for h in of("a", handed)] == [
            n for n in range(4) for _ in range(MAX_ATTEMPTS)
        ]
    assert of("b", handed) == run(searcher(["b"], 4)), (
        "another category's failures must not be felt"
    )


@pytest.mark.parametrize("stored", [False, True])
def test_a_trial_that_tune_ends_twice_does_not_stop_the_search(
    stored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tune calls on_trial_complete again, with error=True, where the first call raised."""
    trials = CategoryTrials(InMemoryStorage(), "a", "a", search_plan(trials=4), [START])
    calls = Counter[int]()

    def storage_is_locked(number: int, measured: Measurements) -> None:
        calls[number] += 1
        if stored:
            finish(number, measured)
        raise OSError("database is locked")

    told: list[TrialResult] = []
    search = PerCategorySearch({"a": trials}, every(4), in_sequence=True, ended=told.append)
    finish = trials.finish
    first = search.suggest("t0")
    monkeypatch.setattr(trials, "finish", storage_is_locked)
    with pytest.raises(OSError, match="locked"):
        search.on_trial_complete("t0", report(0.5))
    monkeypatch.undo()
    search.on_trial_complete("t0", error=True)
    search.on_trial_failed("t0", "OSError: database is locked")
    seen = run(search, prefix="later")
    expected = [1, 2, 3] if stored else [0, 1, 2, 3]
    assert [trial[NUMBER] for trial in seen] == expected
    assert stored or seen[0] == first, "it is begun again as it was"
    assert [t.status for t in trials.results()] == ["finished"] * 4
    assert sorted(t.number for t in told) == [0, 1, 2, 3], "each is told of once"
    assert calls == {0: 1}


STORAGES = [None, "studies.journal", "sqlite:///{}/studies.db"]


@pytest.mark.parametrize("where", STORAGES)
@pytest.mark.parametrize("ended", [0, 1, 5, 11])
def test_a_search_that_was_killed_goes_on_as_if_nothing_had_happened(
    where: str | None, ended: int, tmp_path: Path
) -> None:
    whole = run(searcher(["a", "b"], 6))
    if where is not None:
        where = where.format(tmp_path) if "://" in where else str(tmp_path / where)
    before = searcher(["a", "b"], 6, storage=open_storage(where, tmp_path))
    seen = run(before, most=ended)
    lost = before.suggest("killed while it ran")
    after = searcher(["a", "b"], 6, storage=open_storage(where, tmp_path))
    assert after.left == 12 - ended
    assert sorted(map(str, seen + run(after))) == sorted(map(str, whole))
    assert str(lost) in map(str, whole), "a trial under way is begun again as it was"


def test_a_trial_is_in_the_storage_with_all_of_its_values_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process may be killed between any two writes: none of them may leave a trial that has begun
    without its values.
    """
    storage = open_storage(None, tmp_path)
    search = searcher(["a"], 6, storage=storage)
    run(search, most=4)
    seen = []
    for name in (
        "create_new_trial",
        "set_trial_param",
        "set_trial_state_values",
        "set_trial_system_attr",
    ):
        write = getattr(storage, name)

        def written(*arguments: Any, write: Any = write, **more: Any) -> Any:
            result = write(*arguments, **more)
            (study,) = open_storage(None, tmp_path).get_all_studies()
            trials = open_storage(None, tmp_path).get_all_trials(study._study_id)
            seen.append([t.params for t in trials if t.state == TrialState.RUNNING])
            return result

        monkeypatch.setattr(storage, name, written)
    handed = search.suggest("next")
    values = {name: value for name, value in handed.items() if name not in (CATEGORY, NUMBER)}
    assert seen
    assert all(running == [values] for running in seen)


def test_several_trials_under_way_are_begun_again_and_none_is_lost(tmp_path: Path) -> None:
    search = searcher(["a", "b"], 3, in_sequence=False, storage=open_storage(None, tmp_path))
    running = [search.suggest(f"t{i}") for i in range(3)]
    search.on_trial_complete("t1", report(objective(running[1])))
    again = searcher(["a", "b"], 3, in_sequence=False, storage=open_storage(None, tmp_path))
    seen = run(again)
    assert [trial for trial in seen if trial in running] == [running[0], running[2]]
    assert sorted((t[CATEGORY], t[NUMBER]) for t in [running[1], *seen]) == [
        (c, n) for c in "ab" for n in range(3)
    ]


def test_the_result_of_a_trial_is_reported_and_stored(tmp_path: Path) -> None:
    reported: list[TrialResult] = []
    trials = CategoryTrials(open_storage(None, tmp_path), "a", "a", search_plan(trials=4), [START])
    search = PerCategorySearch({"a": trials}, every(4), True, ended=reported.append)
    measured = Measurements(validation={"pixel_ap": 0.5}, families={"scar": 0.25}, seconds=2.0)
    reports: list[dict[str, Any]] = [
        TrialReport(0.5, measured=measured).to_tune() | {"time_total_s": 1.0},
        report(0.1, step=4),
        failure("no", "..."),
    ]
    for number, found in enumerate(reports):
        search.suggest(f"t{number}")
        search.on_trial_complete(f"t{number}", found)
    for attempt in range(MAX_ATTEMPTS):
        search.suggest(f"killed{attempt}")
        search.on_trial_complete(f"killed{attempt}", error=True)
        search.on_trial_failed(f"killed{attempt}", "killed")
    assert reported == trials.results()
    assert [t.status for t in reported] == ["finished", "stopped", "failed", "failed"]
    assert [t.objective for t in reported] == [0.5, None, None, None]
    assert [t.cause for t in reported] == [None, None, "no", "killed"]
    assert reported[0].measured == measured
    assert reported[0].wall_seconds is not None
    assert reported[0].wall_seconds > 0
    assert reported[0].config == START
    assert reported[2].measured.traceback == "..."


def test_a_trial_far_behind_others_that_came_as_far_is_stopped_and_no_earlier() -> None:
    search = searcher(["a", "b"], 20, in_sequence=False)
    for number in range(4):
        search.suggest(f"t{number}")  # a, b, a, b
    assert not search.should_prune("t0", report(0.0, step=4)), "there is nobody to compare with"
    assert not search.should_prune("t0", report(0.0)), "a trial at its end has nothing to stop"
    for number in range(4, 16):
        config = search.suggest(f"t{number}")
        search.should_prune(
            f"t{number}", report(number / 100 if config[CATEGORY] == "a" else 0.9, step=4)
        )
        search.on_trial_complete(f"t{number}", report(0.5))
    assert search.should_prune("t2", report(0.03, step=4))
    assert not search.should_prune("t2", report(0.03, step=8)), "nobody came so far"
    handed = search.suggest("t16")
    assert handed[CATEGORY] in "ab"
    value = report(0.2, step=4)
    assert search.should_prune("t16", value) == (handed[CATEGORY] == "b"), (
        "only its own category's trials count"
    )


@pytest.mark.parametrize(
    "where",
    ["sqlite:////no/such/folder/studies.db", "nothing://here", "no/such/folder/studies.journal"],
)
def test_a_storage_that_cannot_be_opened_is_one_line(where: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="The Optuna storage") as raised:
        open_storage(where, tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("where", [None, "sqlite:///{}/studies.db"])
def test_choices_may_be_lists(
    where: str | None, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    space = Space({"backbone.levels": {"type": "choice", "values": [[1], [1, 2], [1, 2, 3]]}})
    start = space.start(DetectorSettings())
    where = where and where.format(tmp_path)

    def open_trials() -> CategoryTrials:
        storage = open_storage(where, tmp_path)
        return CategoryTrials(storage, "a", "a", search_plan(space, trials=8), [start])

    first = open_trials()
    for _ in range(6):
        number, values = first.begin()
        assert values["backbone.levels"] in ([1], [1, 2], [1, 2, 3])
        quality = 0.1 * len(values["backbone.levels"])
        first.finish(number, Measurements(validation={"pixel_ap": quality}))
    again = open_trials()
    assert again.results() == first.results()
    assert again.results()[0].config == {"backbone.levels": [1, 2, 3]}
    assert not [w for w in recwarn if "Choices" in str(w.message)]


# ---- outages ----


class Clock:
    """Seconds that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def outage(cause: str = "the disk is full") -> dict[str, Any]:
    return TrialReport(0.0, failure=cause, is_outage=True).to_tune()


def pausing(trials: int = 2, has_room: bool = True) -> tuple[PerCategorySearch, Clock, list[str]]:
    """A searcher of one category whose outages may last a minute."""
    clock, said = Clock(), list[str]()
    storage = InMemoryStorage()
    own = CategoryTrials(storage, "nut", "nut", search_plan(trials=trials), [START])
    pause = Pause(60.0, said.append, lambda: has_room, clock)
    return PerCategorySearch({"nut": own}, every(trials), False, pause=pause), clock, said


def test_a_trial_that_met_an_outage_is_no_trial_and_runs_again() -> None:
    search, clock, said = pausing()
    first = search.suggest("t0")
    search.on_trial_complete("t0", outage())
    assert search.left == 2
    assert search.is_paused
    assert search.suggest("t1") is None, "it waits"
    clock.now = 10
    again = search.suggest("t1")
    assert again == first
    assert search.name("t1") == "nut-0-again-1"
    assert search.suggest("t2") is None, "one trial at a time tries whether the outage is over"
    search.on_trial_complete("t1", report(0.5))
    assert not search.is_paused
    assert search.suggest("t2")[NUMBER] == 1
    assert said == [
        "nut, trial 0: the disk is full: trials wait until that is mended, for at most 60 s",
        "trials go on after 10 s",
    ]


def test_an_outage_that_lasts_too_long_ends_the_search_and_leaves_the_trials() -> None:
    search, clock, _ = pausing()
    search.suggest("t0")
    search.on_trial_complete("t0", outage())
    clock.now = 30
    search.suggest("t1")
    clock.now = 100
    assert search.suggest("t2") is None, "a trial that runs may find that it is over"
    search.on_trial_complete("t1", outage())
    assert search.suggest("t2") == Searcher.FINISHED
    assert str(search.outage) == "the disk is full"
    assert search.left == 2


def test_while_the_disk_is_full_nothing_is_tried() -> None:
    search, clock, _ = pausing(has_room=False)
    search.suggest("t0")
    search.on_trial_complete("t0", outage())
    clock.now = 50
    assert search.suggest("t1") is None


def test_a_storage_that_is_away_for_too_long_ends_the_search(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    search, _, _ = pausing()
    search.suggest("t0")

    def away(*_: object) -> None:
        raise OutageError("database is locked")

    monkeypatch.setattr(CategoryTrials, "finish", away)
    search.on_trial_complete("t0", report(0.5))
    search.on_trial_complete("t0", None, error=True)  # Tune says it twice
    assert str(search.outage) == "database is locked"
    assert search.suggest("t1") == Searcher.FINISHED


def test_a_trial_that_hangs_twice_has_failed_and_a_lost_node_does_not_count() -> None:
    search, _, _ = pausing(trials=1)
    for number in range(2 * MAX_ATTEMPTS):
        search.suggest(f"lost{number}")
        search.on_trial_failed(f"lost{number}", "its node has died", is_lost=True)
    for number in range(2):
        assert search.left == 1
        search.suggest(f"hung{number}")
        search.on_trial_hung(f"hung{number}", 1800)
        search.on_trial_failed(f"hung{number}", "Its process was killed.")
    assert search.left == 0
    (own,) = search._trials_of.values()
    assert own.result(0).status == "failed"
    assert own.result(0).cause == "It made no progress for 30 min, and was ended."


def test_tune_keeps_no_history_of_the_metrics_of_a_trial_that_ended() -> None:
    trial = Trial("a stub", stub=True)
    trial.update_last_result(
        {f"metric_{n}": float(n) for n in range(200)} | {"training_iteration": 1}
    )
    whole = len(pickle.dumps(trial.run_metadata.__dict__.copy()))
    before = dict(trial.last_result)
    ForgetfulCallback().on_trial_complete(0, [trial], trial)
    assert trial.last_result == before
    assert trial.metric_analysis == {}
    assert trial.metric_n_steps == {}
    assert len(pickle.dumps(trial.run_metadata.__dict__.copy())) < whole / 3


def test_artifacts_that_a_trial_found_damaged_are_one_line_and_stay_with_it() -> None:
    said: list[str] = []
    plan = search_plan()
    trials = CategoryTrials(InMemoryStorage(), "a", "a", plan, [], said.append)
    search = PerCategorySearch({"a": trials}, every(4), in_sequence=True)
    search.suggest("t0")
    measured = Measurements({"pixel_ap": 0.5}, dropped=("flows/ab", "finetuned/cd"))
    search.on_trial_complete("t0", TrialReport(0.5, measured=measured).to_tune())
    assert said == [
        "a, trial 0: 2 stored artifacts were damaged, and computed anew (stages/flows/ab, "
        "stages/finetuned/cd): see to the disk if this comes again"
    ]
    (result,) = trials.results()
    assert result.measured.dropped == ("flows/ab", "finetuned/cd")
    assert TrialResult.from_row(result.to_row()) == result
