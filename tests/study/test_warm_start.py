"""Beginning where an earlier study ended."""

from pathlib import Path

import pytest

from clsnf.core.errors import DataError
from clsnf.results import TrialResult, TrialStatus, write_trials
from clsnf.study.space import Space
from clsnf.study.trials import CategoryTrials, SearchPlan, open_storage
from clsnf.study.warm_start import best_points, points_of_others, read_earlier_trials


def trial(category: str, number: int, objective: float | None, depth: int) -> TrialResult:
    status: TrialStatus = "failed" if objective is None else "finished"
    return TrialResult(category, number, status, objective=objective, config={"flow_depth": depth})


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """The folder of an earlier study."""
    nut = [trial("nut", n, *t) for n, t in enumerate([(0.5, 2), (0.9, 0), (None, 4), (0.7, 6)])]
    others = [trial("nut", 4, 0.1, 2), trial("bolt", 0, 0.99, 4)]
    write_trials(tmp_path / "earlier" / "trials.parquet", nut + others)
    return tmp_path / "earlier"


def test_the_best_finished_trials_of_the_category_are_tried_first(earlier: Path) -> None:
    trials = read_earlier_trials(earlier)
    own = [{"flow_depth": 0}, {"flow_depth": 6}, {"flow_depth": 2}]
    assert best_points(trials, "nut") == [*own, {"flow_depth": 4}], "then the best of others"
    assert best_points(trials, "screw") == [{"flow_depth": 0}, {"flow_depth": 4}]
    assert read_earlier_trials(None) == []


def test_what_won_on_more_of_the_others_comes_first() -> None:
    def won(category: str, objective: float, depth: int, weight: float) -> TrialResult:
        config = {"flow_depth": depth, "fusion_weight": weight}
        return TrialResult(category, 0, "finished", objective=objective, config=config)

    trials = [
        won("a", 0.9, 2, 0.1),
        won("a", 0.8, 6, 0.1),
        won("b", 0.1, 4, 0.2),
        won("c", 0.2, 4, 0.3),
        won("mine", 1.0, 8, 0.3),
    ]
    assert points_of_others(trials, "mine") == [{"flow_depth": 4}, {"flow_depth": 2}]


def test_points_that_the_new_space_does_not_have_are_left_out(
    earlier: Path, tmp_path: Path
) -> None:
    space = Space({"flow_depth": {"type": "choice", "values": [0, 2, 4]}})
    first_points = [
        {"flow_depth": 4},
        *best_points(read_earlier_trials(earlier), "nut"),
        {"fusion_weight": 0.3},
        {"flow_depth": "two"},
    ]
    plan = SearchPlan(space.distributions(), 9, {"pixel_ap": "maximize"}, 0, in_sequence=True)
    trials = CategoryTrials(open_storage(None, tmp_path), "nut", "nut", plan, first_points)
    assert [trials.begin()[1]["flow_depth"] for _ in range(3)] == [4, 0, 2]


def test_a_folder_without_a_study_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no trials of an earlier study to start from"):
        read_earlier_trials(tmp_path)
    (tmp_path / "trials.parquet").write_text("no table")
    with pytest.raises(DataError, match=r"no readable trials.parquet or optuna.journal"):
        read_earlier_trials(tmp_path)
