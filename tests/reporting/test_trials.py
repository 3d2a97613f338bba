"""What trials say together: importances of settings, and what sharing saved."""

import math
from typing import Any

import pytest

from clsnf.reporting.study_files import Product
from clsnf.reporting.trials import importances, saved_seconds
from clsnf.results import Measurements, TrialResult


def trials(count: int, objective: float | None = None, **config: Any) -> list[TrialResult]:
    """Trials whose objective rises with the setting ``decides``, or is always the same."""
    return [
        TrialResult(
            "p",
            i,
            "finished",
            objective=float(i % 7) if objective is None else objective,
            config={"decides": i % 7 / 7, "idle": i * 5 % 11 / 11, **config},
        )
        for i in range(count)
    ]


def test_the_setting_that_decides_has_the_importance() -> None:
    space = {name: {"type": "float", "low": 0.0, "high": 1.0} for name in ("decides", "idle")}
    found = importances(Product("p", trials=trials(40)), space)
    assert found["decides"] > 0.9
    assert sum(found.values()) == pytest.approx(1)
    assert found == importances(Product("p", trials=trials(40)), space), (
        "the same trials, the same importances"
    )


def test_importances_take_lists_and_words_and_leave_out_what_never_changed() -> None:
    own = trials(12, loss="soft")
    for trial in own:
        trial.config["levels"] = [[1, 2], [2, 3]][trial.number % 2]
    found = importances(
        Product("p", trials=own), {"levels": {"type": "choice", "values": [[1, 2], [2, 3]]}}
    )
    assert set(found) == {"decides", "idle", "levels"}


def test_too_few_trials_have_no_importances() -> None:
    assert importances(Product("p", trials=trials(3)), {}) == {}
    assert importances(Product("p", trials=trials(9, objective=0.5)), {}) == {}
    assert importances(Product("p", trials=trials(9, objective=math.nan)), {}) == {}


def shared(seconds: float, reused: int) -> TrialResult:
    work = {"trunk": seconds, "scoring": 0.5}
    measured = Measurements(seconds_by_kind=work, artifacts_reused=reused)
    return TrialResult("p", 0, "finished", measured=measured)


def test_what_sharing_saved_is_the_work_whose_results_trials_found() -> None:
    seconds = (10.0, 0.0, 0.0, 20.0)
    assert saved_seconds([shared(s, 1) for s in seconds]) == 30.0  # two, at the median of 10 and 20
    assert saved_seconds([shared(s, 0) for s in seconds]) is None
