"""A study that ends in time: when that is, what still fits, and what is stopped."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from optuna.storages import InMemoryStorage
from ray.tune.search import Searcher

from clsnf.core.config import DetectorSettings, StudySettings
from clsnf.core.errors import SettingsError
from clsnf.results import Measurements, TrialResult
from clsnf.study.allocation import FLOOR, Allocation
from clsnf.study.cluster import ray_session
from clsnf.study.deadline import Costs, Deadline, Work, parse_deadline, read_winner_seconds
from clsnf.study.reports import TrialReport
from clsnf.study.search import (
    CATEGORY,
    NUMBER,
    DeadlineCallback,
    FailureCallback,
    PerCategorySearch,
)
from clsnf.study.space import DEFAULT_SPACE, Space
from clsnf.study.trials import CategoryTrials, SearchPlan, open_storage

SPACE = Space(DEFAULT_SPACE)
NOON = datetime(2026, 11, 27, 12, 0)


@pytest.mark.parametrize(
    ("until", "at"),
    [
        ("13:30", NOON + timedelta(hours=1.5)),
        ("06:30", NOON + timedelta(hours=18.5)),
        ("12:00", NOON + timedelta(days=1)),
        ("2026-11-28T06:30", NOON + timedelta(hours=18.5)),
        ("2026-12-01 00:00:30", datetime(2026, 12, 1, 0, 0, 30)),
    ],
)
def test_until_is_the_next_such_time(until: str, at: datetime) -> None:
    assert parse_deadline(until, None, NOON) == at.timestamp()


def test_hours_count_from_now() -> None:
    assert parse_deadline(None, 0.05, NOON) == NOON.timestamp() + 180
    assert parse_deadline(None, None, NOON) is None


@pytest.mark.parametrize(
    ("until", "hours", "message"),
    [
        ("soon", None, "--until 'soon' is no time: give one such as 06:30 or 2026-11-28T06:30"),
        ("25:00", None, "--until '25:00' is no time"),
        ("2026-11-28", None, "is no time"),
        ("2026-11-27T11:59", None, "--until 2026-11-27T11:59 is over already"),
        (None, 0.0, "--hours is 0.0: it must be above 0"),
        (None, float("nan"), "--hours is nan"),
        ("06:30", 8.0, "give one of them"),
    ],
)
def test_a_time_that_makes_no_sense_is_refused(
    until: str | None, hours: float | None, message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        parse_deadline(until, hours, NOON)


# ---- costs ----


def config(epochs: int = 4, depth: int = 2, weight: float = 0.5) -> dict[str, Any]:
    return {"finetune_epochs": epochs, "flow_depth": depth, "fusion_weight": weight}


def trial(
    category: str, number: int, seconds: float, values: dict[str, Any], objective: float = 0.5
) -> TrialResult:
    measured = Measurements(seconds=seconds)
    return TrialResult(
        category, number, "finished", objective=objective, config=values, measured=measured
    )


def some_costs(**more: Any) -> Costs:
    costs = Costs({"nut": 10, "bolt": 20, "new": 30}, **more)
    for number, (seconds, values) in enumerate(
        [(100.0, config()), (40.0, config(8)), (30.0, config(8, 4)), (1.0, config(8, 4, 0.9))]
    ):
        costs.add(trial("nut", number, seconds, values))
    return costs


@pytest.mark.parametrize(
    ("values", "work"),
    [
        (config(weight=0.1), "weighing"),
        (config(depth=0), "flows"),
        (config(0), "decay"),
        (config() | {"finetune.learning_rate": 1e-3}, "training"),
        (config() | {"flow.passes": 2.0}, "flows"),
    ],
)
def test_what_a_trial_must_compute_follows_from_its_values(
    values: dict[str, Any], work: Work
) -> None:
    assert some_costs().work_of("nut", values) == work
    assert some_costs().work_of("new", values) == "training"
    assert some_costs(reuse=False).work_of("nut", values) == "training"


def test_a_trial_costs_what_trials_with_the_same_work_took() -> None:
    costs = some_costs()
    dear, flows, cheap = (
        costs.trial("nut", values) for values in (config(0), config(depth=0), config(weight=0.1))
    )
    assert dear == 40 * 1.25, "with a margin"
    assert flows == 30 * 1.25
    assert cheap == 1.25


def test_a_category_without_such_trials_costs_what_others_cost_an_image() -> None:
    costs = some_costs()
    assert costs.trial("new", config()) == 3 * 100 * 1.25
    costs.add(trial("bolt", 0, 50.0, config()))
    assert costs.trial("bolt", config(0)) == 2 * 40 * 1.25, "others with the same work come first"
    assert Costs({"nut": 10}).trial("nut", config()) is None


def test_work_that_nobody_did_costs_what_more_work_cost() -> None:
    costs = Costs({"nut": 10})
    costs.add(trial("nut", 0, 100.0, config()))
    assert costs.trial("nut", config(depth=4)) == 125


def test_failed_and_stopped_trials_tell_no_costs() -> None:
    costs = Costs({"nut": 10})
    costs.add(TrialResult("nut", 0, "failed", config=config(), measured=Measurements(seconds=1)))
    assert costs.trial("nut", config()) is None


def test_winners_cost_what_they_took_before_or_what_trials_suggest() -> None:
    costs = some_costs(winner_seconds={"bolt": 12.0})
    assert costs.winner("bolt") == 15
    assert costs.winner("nut") >= 100
    deadline = Deadline(1000.0, costs, at_once=1, clock=lambda: 0.0)
    one, both = deadline.kept(["bolt"]), deadline.kept(["bolt", "nut"])
    assert 0 == deadline.kept([]) < one < both
    assert both - one == costs.winner("nut")
    assert Deadline(1000.0, costs, 2, lambda: 0.0).kept(["bolt", "nut"]) < both


def test_without_an_earlier_run_nothing_is_known_of_winners(tmp_path: Path) -> None:
    assert read_winner_seconds([tmp_path, tmp_path / "none"], ["nut"]) == {}


# ---- a search that ends in time ----


@dataclass
class Night:
    """A made-up study whose trials take made-up time."""

    hours: float
    seconds: dict[str, float]  # category -> of a training; flows take a half of it, weighing 20 s
    study: StudySettings = field(default_factory=lambda: StudySettings(trials=None))
    now: float = 0.0
    lines: list[str] = field(default_factory=list)
    storage: Any = field(default_factory=InMemoryStorage)

    def __post_init__(self) -> None:
        self.costs = Costs(dict.fromkeys(self.seconds, 10))
        self.real = Costs(dict.fromkeys(self.seconds, 10))
        self.deadline = Deadline(self.hours * 3600, self.costs, 1, lambda: self.now)
        plan = SearchPlan(SPACE.distributions(), 16, {"pixel_ap": "maximize"}, 0, True)
        start = SPACE.start(DetectorSettings())
        self.trials_of = {
            c: CategoryTrials(self.storage, c, c, plan, [start]) for c in self.seconds
        }
        allocation = Allocation(self.study, self.deadline, self.lines.append)
        self.search = PerCategorySearch(self.trials_of, allocation, True)

    def takes(self, category: str, values: dict[str, Any]) -> float:
        whole = self.seconds[category]
        work = self.real.work_of(category, values)
        return {"training": whole, "decay": whole / 2, "flows": whole / 2, "weighing": 20.0}[work]

    def run(self) -> Iterator[dict[str, Any]]:
        for number in range(10_000):
            found = self.search.suggest(f"t{number}")
            if found == Searcher.FINISHED:
                return
            category = found[CATEGORY]
            values = {n: v for n, v in found.items() if n not in (CATEGORY, NUMBER)}
            seconds = self.takes(category, values)
            self.now += seconds
            measured = Measurements({"pixel_ap": values["fusion_weight"]}, seconds=seconds)
            report = TrialReport(values["fusion_weight"], measured=measured)
            self.search.on_trial_complete(f"t{number}", report.to_tune())
            self.real.add(trial(category, found[NUMBER], seconds, values))
            yield found


@pytest.mark.parametrize("hours", [0.1, 0.3, 0.6])
def test_a_search_leaves_time_for_its_winners(hours: float) -> None:
    night = Night(hours, {"a": 60.0, "b": 100.0, "c": 30.0})
    seen = list(night.run())
    winners = 0.7 * (60 + 100 + 30) + 15  # as measured
    assert night.now + winners <= hours * 3600
    assert night.now > 0.4 * hours * 3600, "and does not waste the night"
    assert {s[CATEGORY] for s in seen} <= {"a", "b", "c"}
    if hours >= 0.3:
        counts = {c: sum(s[CATEGORY] == c for s in seen) for c in "abc"}
        assert min(counts.values()) >= FLOOR
    (line,) = night.lines
    assert line.startswith("no more trials: ")
    assert "winners, evidence and report need" in line


def test_cheap_trials_still_fit_when_dear_ones_do_not() -> None:
    night = Night(0.2, {"a": 100.0})
    seen = list(night.run())
    assert len(seen) > FLOOR
    assert night.now <= 720


def test_trials_are_a_limit_when_the_clock_is_too() -> None:
    night = Night(100.0, {"a": 60.0, "b": 60.0}, StudySettings(trials=4))
    assert len(list(night.run())) == 8
    assert night.lines == []


def test_the_first_trial_begins_while_nothing_is_known_and_none_after_the_end() -> None:
    night = Night(0.1, {"a": 10_000.0})
    assert len(list(night.run())) == 1
    late = Night(0.1, {"a": 1.0}, now=361.0)
    assert list(late.run()) == []
    assert late.lines[0].startswith("no more trials: ")


def test_trials_under_way_when_time_is_up_wait_to_be_begun_again() -> None:
    night = Night(0.1, {"a": 50.0, "b": 50.0})
    search = night.search
    first = search.suggest("t0")
    assert not search.time_is_up()
    night.now = 359.0
    assert search.time_is_up()
    for _ in range(4):  # a killed process counts as no attempt any more
        search.on_trial_complete("t0", error=True)
        search.on_trial_failed("t0", "its process was killed")
    assert search.time_is_up(), "with no trial under way there is time again, but it stays over"
    assert search.suggest("t1") == Searcher.FINISHED
    assert night.trials_of["a"].results() == []
    assert night.lines == [
        f"no more trials: {night.deadline.name} is in 1 s, and winners, evidence and report need "
        "15 s",
        "time is up: 1 trial under way is stopped; --resume runs what is left",
    ]
    again = Night(10.0, {"a": 50.0, "b": 50.0}, storage=night.storage)
    assert again.search.suggest("t0") == first


@pytest.mark.slow
def test_a_trial_that_runs_over_is_killed_and_ray_goes_on(tmp_path: Path) -> None:
    """Real Tune and a trial that never ends: the clock jumps once it runs."""
    import ray
    from ray import tune

    running = tmp_path / "running"

    def endless(values: dict[str, Any]) -> None:
        running.touch()
        time.sleep(3600)

    def clock() -> float:
        return 999.0 if running.exists() else 0.0

    plan = SearchPlan(SPACE.distributions(), 16, {"pixel_ap": "maximize"}, 0, True)
    storage = open_storage(None, tmp_path)
    trials = CategoryTrials(storage, "a", "a", plan, [SPACE.start(DetectorSettings())])
    lines: list[str] = []
    deadline = Deadline(1000.0, Costs({"a": 10}), 1, clock)
    allocation = Allocation(StudySettings(trials=None), deadline, lines.append)
    search = PerCategorySearch({"a": trials}, allocation, True)
    with ray_session(None):
        tune.Tuner(
            tune.with_resources(endless, {"CPU": 1}),
            tune_config=tune.TuneConfig(
                search_alg=search, num_samples=-1, max_concurrent_trials=1, reuse_actors=True
            ),
            run_config=tune.RunConfig(
                storage_path=str(tmp_path / "tune"),
                verbose=0,
                callbacks=[FailureCallback(search), DeadlineCallback(search)],
            ),
        ).fit()

        @ray.remote(num_cpus=1)
        def winner() -> str:
            return "found"

        assert ray.get(winner.remote(), timeout=120) == "found", "its place is free"
    assert trials.results() == []
    assert "time is up: 1 trial under way is stopped; --resume runs what is left" in lines
    again = CategoryTrials(open_storage(None, tmp_path), "a", "a", plan, [])
    assert again.begun == 0
    assert again.begin() == (0, SPACE.start(DetectorSettings()))
