"""What is suggested next: no point twice, nothing that always fails, and first what a user put in
line.
"""

import re
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.trial import TrialState

from clsnf.core.config import DetectorSettings
from clsnf.core.errors import OutputError
from clsnf.results import Measurements, trials_of_journal
from clsnf.study.folder import JOURNAL
from clsnf.study.space import DEFAULT_SPACE, Space
from clsnf.study.trials import CategoryTrials, SearchPlan, open_storage
from clsnf.study.warm_start import points_of_space

EPOCHS_AND_DEPTHS: dict[str, Any] = {
    "finetune_epochs": {"type": "choice", "values": [0, 2, 4, 6, 8, 10]},
    "flow_depth": {"type": "int", "low": 0, "high": 4, "step": 2},
}
WITH_PASSES = EPOCHS_AND_DEPTHS | {"flow.passes": {"type": "float", "low": 0.5, "high": 4.0}}


def open_trials(
    ranges: dict[str, Any],
    storage: BaseStorage | None = None,
    trials: int = 40,
    said: list[str] | None = None,
    **plan: Any,
) -> CategoryTrials:
    space = Space(ranges)
    made = SearchPlan(
        **{
            "distributions": space.distributions(),
            "trials": trials,
            "directions": {"pixel_ap": "maximize"},
            "seed": 0,
            "in_sequence": True,
            **plan,
        }
    )
    say = (lambda line: None) if said is None else said.append
    start = space.start(DetectorSettings())
    return CategoryTrials(storage or InMemoryStorage(), "nut", "nut", made, [start], say)


def worth(values: dict[str, Any]) -> Measurements:
    """Best with eight epochs and depth two."""
    value = 0.5 - 0.02 * abs(values.get("finetune_epochs", 8) - 8)
    value -= 0.03 * abs(values.get("flow_depth", 2) - 2)
    return Measurements({"pixel_ap": value}, {"scar": value})


def run(trials: CategoryTrials, most: int = 100, fails: Any = None) -> list[dict[str, Any]]:
    """Trials one by one until the search is over; `fails` says why one with such values fails."""
    seen: list[dict[str, Any]] = []
    while len(seen) < most and not trials.is_over:
        number, values = trials.begin()
        seen.append(values)
        cause = fails(values) if fails is not None else None
        if cause is None:
            trials.finish(number, worth(values))
        else:
            trials.fail(number, cause.format(number))
    return seen


def distinct(seen: list[dict[str, Any]]) -> int:
    return len({str(sorted(values.items())) for values in seen})


# ---- no point twice ----


@pytest.mark.parametrize("seed", range(3))
def test_a_finite_space_is_used_up_and_no_point_runs_twice(seed: int) -> None:
    said: list[str] = []
    trials = open_trials(EPOCHS_AND_DEPTHS, said=said, seed=seed)
    seen = run(trials)
    assert len(seen) == distinct(seen) == 18
    assert said == ["nut: the space is used up: all of its 18 points were tried"]
    assert trials.is_over
    assert len(said) == 1


def test_points_that_are_running_are_not_begun_again() -> None:
    trials = open_trials(EPOCHS_AND_DEPTHS, in_sequence=False)
    seen = [trials.begin()[1] for _ in range(18)]
    assert distinct(seen) == 18
    assert trials.is_over


def test_a_space_of_the_fusion_weight_alone_has_one_trial() -> None:
    trials = open_trials({"fusion_weight": {"type": "float", "low": 0.0, "high": 1.0}})
    assert run(trials) == [{}]


@pytest.mark.parametrize("ended", [1, 7, 17])
def test_a_resumed_search_suggests_what_an_undisturbed_one_would(ended: int) -> None:
    whole = run(open_trials(EPOCHS_AND_DEPTHS))
    storage = InMemoryStorage()
    seen = run(open_trials(EPOCHS_AND_DEPTHS, storage), most=ended)
    assert seen + run(open_trials(EPOCHS_AND_DEPTHS, storage)) == whole


def test_the_sampler_still_finds_the_best_point_early() -> None:
    places = []
    for seed in range(6):
        seen = run(open_trials(WITH_PASSES, seed=seed, trials=30), most=30)
        found = [worth(values).validation["pixel_ap"] for values in seen]
        places.append(sum(found[15:]) / 15 - sum(found[1:15]) / 14)
    assert sum(places) > 0, "later trials are better"


# ---- what fails ----


def test_a_value_that_failed_three_times_in_the_same_way_is_left_alone_and_named() -> None:
    said: list[str] = []
    trials = open_trials(WITH_PASSES, said=said)
    fails = lambda v: "OutOfMemoryError: tried {} MiB" if v["finetune_epochs"] == 10 else None  # noqa: E731
    seen = run(trials, most=40, fails=fails)
    assert sum(values["finetune_epochs"] == 10 for values in seen) == 3
    (line,) = said
    assert line.startswith(
        "nut: finetune_epochs=10 is left alone: all 3 trials with it failed (OutOfMemoryError: "
    )


def test_failures_teach_the_sampler() -> None:
    """A range of values always fails."""
    late = 0
    for seed in range(4):
        trials = open_trials(WITH_PASSES, seed=seed, trials=40)
        seen = run(trials, most=40, fails=lambda v: "no memory" if v["flow.passes"] > 3 else None)
        late += sum(values["flow.passes"] > 3 for values in seen[20:])
    assert late <= 4 * 4, "of 4 * 20; a sampler that does not learn goes there 23 times"


def test_a_failed_trial_stays_failed_in_the_storage() -> None:
    storage = InMemoryStorage()
    trials = open_trials(WITH_PASSES, storage)
    run(trials, most=10, fails=lambda v: "no" if v["flow_depth"] == 0 else None)
    states = {t.state for t in optuna.load_study(study_name="nut", storage=storage).trials}
    assert states == {TrialState.COMPLETE, TrialState.FAIL}


def test_a_search_of_which_half_failed_stops_says_so_and_goes_on_when_asked() -> None:
    said: list[str] = []
    storage = InMemoryStorage()
    seen = run(open_trials(WITH_PASSES, storage, said=said), fails=lambda v: "no disk")
    assert len(seen) == 6
    assert said == [
        "nut: the search stops, because 6 of 6 trials failed, most often with no disk: mend the "
        "cause and go on with --resume, or search another space in another --out, from the best "
        "trials of this one (--warm-start)"
    ]
    more = run(open_trials(WITH_PASSES, storage, said=said), most=10)
    assert len(more) == 10, "the failures before the stop no longer count"


# ---- what a user puts in line ----


@pytest.mark.parametrize("where", [None, "sqlite:///{}/studies.db"])
def test_enqueued_trials_run_once_first_and_with_their_values(
    where: str | None, tmp_path: Path
) -> None:
    where = where and where.format(tmp_path)
    before = open_trials(WITH_PASSES, open_storage(where, tmp_path))
    run(before, most=3)
    study = optuna.load_study(study_name="nut", storage=open_storage(where, tmp_path))
    study.enqueue_trial({"flow_depth": 4, "finetune_epochs": 10, "flow.passes": 1.25})
    study.enqueue_trial({"flow_depth": 0, "fusion_weight": 0.3})
    study.enqueue_trial({"flow_depth": 3})
    study.enqueue_trial({"flow_dept": 4})
    said: list[str] = []
    after = open_trials(WITH_PASSES, open_storage(where, tmp_path), said=said)
    seen = run(after, most=5)
    assert seen[0] == {"flow_depth": 4, "finetune_epochs": 10, "flow.passes": 1.25}
    assert seen[1]["flow_depth"] == 0
    assert seen[1].keys() == WITH_PASSES.keys(), "missing names are completed"
    assert distinct(seen) == 5
    assert [line.partition(":")[0] for line in said] == [
        "nut, trial 5 is left out",
        "nut, trial 6 is left out",
    ]
    assert "flow_depth=3 is outside the space" in said[0]
    assert "the space has no flow_dept" in said[1]
    again = open_trials(WITH_PASSES, open_storage(where, tmp_path))
    assert again.begun == 8, "trials that were left out do not count"


# ---- what Optuna's own tools see ----


def test_optunas_own_tools_see_values_attributes_and_lists(tmp_path: Path) -> None:
    ranges: dict[str, Any] = {
        "backbone.levels": {"type": "choice", "values": [[1, 2], [1, 2, 3]]},
        "flow.passes": {"type": "float", "low": 0.5, "high": 4.0},
    }
    trials = open_trials(ranges, open_storage(None, tmp_path))
    for _ in range(6):
        number, values = trials.begin()
        assert values["backbone.levels"] in ([1, 2], [1, 2, 3])
        trials.should_prune(number, 4, 0.1)
        value = 0.1 * len(values["backbone.levels"]) + 0.01 * values["flow.passes"]
        by_family = {"scar": {"pixel_ap": value, "image_auroc": 0.5}}
        sweep = [(0.0, 0.1), (0.5, value), (1.0, 0.2)]
        trials.finish(number, Measurements({"pixel_ap": value}, {"scar": value}, by_family, sweep))
    study = optuna.load_study(study_name="nut", storage=open_storage(None, tmp_path))
    assert study.best_trial.value == max(t.objective or 0 for t in trials.results())
    assert set(optuna.importance.get_param_importances(study)) == set(ranges)
    first = study.trials[0]
    assert first.params["backbone.levels"] == "[1, 2, 3]"
    assert first.user_attrs["metrics_by_family"]["scar"] == {
        "pixel_ap": first.value,
        "image_auroc": 0.5,
    }
    assert first.intermediate_values == {4: 0.1}
    (read, *_) = trials_of_journal(tmp_path / "optuna.journal")
    assert read == trials.results()[0]
    assert read.config["backbone.levels"] == [1, 2, 3]
    assert read.config["fusion_weight"] == 0.5


def test_trials_of_a_version_that_drew_the_weight_can_be_read_and_are_not_gone_on_with(
    tmp_path: Path,
) -> None:
    study = optuna.create_study(study_name="nut", storage=open_storage(None, tmp_path))
    trial = study.ask({"fusion_weight": optuna.distributions.FloatDistribution(0, 1)})
    study.tell(trial, 0.5)
    (read,) = trials_of_journal(tmp_path / "optuna.journal")
    assert read.config["fusion_weight"] == trial.params["fusion_weight"]
    with pytest.raises(OutputError, match="drew a fusion weight for each trial: choose another"):
        open_trials(DEFAULT_SPACE, open_storage(None, tmp_path))


# ---- what running trials are compared with ----


def test_running_trials_are_compared_by_the_best_density_of_their_images() -> None:
    trials = open_trials(WITH_PASSES)
    assert trials.best_densities() == {}, "no trial has finished: nothing is compared"
    for value, images, density in [(0.5, "64", "a"), (0.7, "64", "b"), (0.6, "64", "c")]:
        number, _ = trials.begin()
        measured = Measurements({"pixel_ap": value}, density=(images, density))
        trials.finish(number, measured)
    number, _ = trials.begin()
    trials.finish(number, Measurements({"pixel_ap": 0.1}, density=("96", "d")))
    assert trials.best_densities() == {"64": "b", "96": "d"}


def test_a_trial_is_compared_with_at_least_four_that_came_as_far() -> None:
    trials = open_trials(WITH_PASSES)
    for came_as_far in (False, False, True, True, True):
        number, values = trials.begin()
        assert not (came_as_far and trials.should_prune(number, 4, 0.5))
        trials.finish(number, worth(values))
    last, values = trials.begin()
    assert not trials.should_prune(last, 4, 0.1), "three others came as far"
    trials.finish(last, worth(values))
    last, _ = trials.begin()
    assert trials.should_prune(last, 4, 0.05)


def test_stopped_trials_count_so_that_a_quarter_is_stopped_and_not_ever_more() -> None:
    trials = open_trials(WITH_PASSES)
    for value in [0.5, 0.6, 0.7, 0.8, 0.1, 0.2, 0.3]:
        number, values = trials.begin()
        if trials.should_prune(number, 4, value):
            trials.stop(number, Measurements())
        else:
            trials.finish(number, worth(values))
    states = [trial.status for trial in trials.results()]
    assert states == ["finished"] * 4 + ["stopped"] * 2 + ["finished"]


# ---- what a trial took ----


def test_the_time_of_a_trial_that_was_begun_again_counts_from_then(tmp_path: Path) -> None:
    trials = open_trials(EPOCHS_AND_DEPTHS, open_storage(None, tmp_path))
    number, values = trials.begin()
    journal = tmp_path / JOURNAL
    earlier, changed = re.subn(
        r'"datetime_start": ?"[^"]+"', '"datetime_start":"2026-01-01T06:30:00"', journal.read_text()
    )
    assert changed == 1
    journal.write_text(earlier)  # the study was killed in the winter, and goes on now
    resumed = open_trials(EPOCHS_AND_DEPTHS, open_storage(None, tmp_path))
    assert resumed.begin() == (number, values)
    resumed.finish(number, worth(values))
    (stored,) = trials_of_journal(journal)
    assert stored == resumed.result(number)
    assert stored.wall_seconds is not None
    assert 0 <= stored.wall_seconds < 3600


# ---- warm start from another space ----


def test_earlier_points_of_a_wider_and_of_a_narrower_space_are_completed_and_said() -> None:
    space = Space(EPOCHS_AND_DEPTHS)
    start = space.start(DetectorSettings())
    said: list[str] = []
    wider: list[dict[str, Any]] = [{"flow_depth": 4, "finetune_epochs": 2, "flow.passes": 2.0}]
    found = points_of_space(wider, start, space.distributions(), said.append)
    assert found == [{"flow_depth": 4, "finetune_epochs": 2}]
    assert said == [
        "warm start: 1 of 1 earlier points are tried; flow.passes left out, as this space does not "
        "have it"
    ]
    said.clear()
    narrower = [{"flow_depth": 4}, {"flow_depth": 5}]
    found = points_of_space(narrower, start, space.distributions(), said.append)
    assert found == [{"flow_depth": 4, "finetune_epochs": start["finetune_epochs"]}]
    assert said == [
        "warm start: 1 of 2 earlier points are tried; finetune_epochs from the settings, as that "
        "space did not have it; flow_depth from the settings where the value is outside this space"
    ]
    said.clear()
    same = [{"flow_depth": 4, "finetune_epochs": 2}]
    assert points_of_space(same, start, space.distributions(), said.append) == same
    assert not said


# ---- joint choices ----

LARGE = {"backbone.name": "resnet18", "image.height": 96, "image.width": 96}
SMALL = {"backbone.name": "demo", "backbone.levels": [1, 2]}
NETWORK: dict[str, Any] = {
    "network": {"type": "choice", "values": [LARGE, SMALL]},
    "flow_depth": {"type": "choice", "values": [0, 1, 2, 3]},
}


def test_a_joint_choice_is_one_value_and_a_mapping_that_always_fails_is_left_alone() -> None:
    said: list[str] = []
    trials = open_trials(NETWORK, said=said)
    fails = lambda v: "OutOfMemoryError: {}" if v["network"] == SMALL else None  # noqa: E731
    seen = run(trials, fails=fails)
    assert sum(values["network"] == SMALL for values in seen) >= 3
    assert {values["flow_depth"] for values in seen if values["network"] == LARGE} == {0, 1, 2, 3}
    assert (
        any(
            line.startswith(
                "nut: network=(backbone.levels=[1, 2], backbone.name=demo) is left alone"
            )
            for line in said
        )
        or len(seen) == 8
    )
    assert distinct(seen) == len(seen)


@pytest.mark.parametrize(
    "ranges", [NETWORK, {"backbone.levels": {"type": "choice", "values": [[1, 2], [1, 2, 3]]}}]
)
def test_what_comes_next_is_known_as_settings_have_it(ranges: dict[str, Any]) -> None:
    trials = open_trials(ranges)
    while not trials.is_over:
        upcoming = trials.upcoming()
        number, values = trials.begin()
        assert upcoming == values
        trials.finish(number, worth(values))
    assert trials.begun > 1


@pytest.mark.parametrize("sampler", ["tpe", "gp", "random"])
def test_samplers_use_up_a_space_with_a_joint_choice(sampler: str) -> None:
    seen = run(open_trials(NETWORK, sampler=sampler))
    assert (len(seen), distinct(seen)) == (8, 8)


def test_running_trials_are_compared_with_those_of_the_same_image_size_alone() -> None:
    trials = open_trials(NETWORK, in_sequence=False)
    numbers: dict[str, list[int]] = {"resnet18": [], "demo": []}
    for _ in range(8):
        number, values = trials.begin()
        numbers[values["network"]["backbone.name"]].append(number)
    *others, last = numbers["demo"]
    for number in numbers["resnet18"]:
        assert not trials.should_prune(number, 4, 0.9)
        trials.finish(number, Measurements({"pixel_ap": 0.9}))
    assert not trials.should_prune(last, 4, 0.1), "four others were better, at another size"
    again = open_trials({"network": NETWORK["network"] | {"values": [SMALL, SMALL | {"seed": 1}]}})
    assert again.begin()[0] == 0
    assert len(others) == 3


def test_earlier_points_with_and_without_joint_choices_become_each_other() -> None:
    space, said = Space(NETWORK), list[str]()
    start = space.start(DetectorSettings())
    assert start["network"] == LARGE
    apart = [{"backbone.name": "demo", "backbone.levels": [1, 2], "flow_depth": 3}]
    found = points_of_space(apart, start, space.distributions(), said.append)
    assert (found, said) == ([{"network": SMALL, "flow_depth": 3}], [])
    other: list[dict[str, Any]] = [{"net": LARGE | {"seed": 2}, "flow_depth": 2}]
    found = points_of_space(other, start, space.distributions(), said.append)
    assert found == [{"network": LARGE, "flow_depth": 2}]
    assert "seed left out, as this space does not have it" in said[0]
    plain = Space({"backbone.name": {"type": "choice", "values": ["demo", "resnet18"]}})
    found = points_of_space(
        [{"network": SMALL}],
        plain.start(DetectorSettings()),
        plain.distributions(),
        lambda line: None,
    )
    assert found == [{"backbone.name": "demo"}]
