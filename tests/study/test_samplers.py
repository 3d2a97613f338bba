"""Samplers by name and by import path, checked before the long work."""

import sys
from pathlib import Path
from typing import Any

import optuna
import pytest

from clsnf.core.config import DetectorSettings
from clsnf.core.errors import SettingsError
from clsnf.results import Measurements
from clsnf.study.samplers import check_sampler
from clsnf.study.space import DEFAULT_SPACE, Space
from clsnf.study.trials import CategoryTrials, SearchPlan

SPACE = Space(DEFAULT_SPACE | {"flow.passes": {"type": "float", "low": 0.5, "high": 4.0}})

OWN = """
from optuna.samplers import RandomSampler

class Own(RandomSampler):
    def __init__(self, seed=None):
        super().__init__(seed)

class NoSampler:
    pass
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_samplers.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_samplers", raising=False)
    return "own_samplers"


def suggested(sampler: str, most: int = 6) -> list[dict[str, Any]]:
    plan = SearchPlan(
        SPACE.distributions(), 12, {"pixel_ap": "maximize"}, 0, in_sequence=True, sampler=sampler
    )
    storage = optuna.storages.InMemoryStorage()
    seen = []
    for number in range(most):
        # A process of its own for each trial: what is suggested depends on the storage alone.
        trials = CategoryTrials(storage, "nut", "nut", plan, [SPACE.start(DetectorSettings())])
        seen.append(trials.begin()[1])
        trials.finish(number, Measurements({"pixel_ap": seen[-1]["flow.passes"] / 4}))
    return seen


@pytest.mark.parametrize("name", ["tpe", "random", "gp", "own"])
def test_a_sampler_suggests_the_same_with_the_same_seed(name: str, own_module: str) -> None:
    sampler = f"{own_module}:Own" if name == "own" else name
    check_sampler(sampler, ["maximize"], SPACE.distributions())
    seen = suggested(sampler)
    assert seen == suggested(sampler)
    assert len({str(values) for values in seen}) == len(seen)


def test_a_space_of_the_fusion_weight_alone_needs_nothing_of_a_sampler() -> None:
    for name in ("tpe", "random", "gp"):
        check_sampler(name, ["maximize"], {})


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tpee", "The sampler is 'tpee'. Did you mean 'tpe'?"),
        ("no_such_package:Sampler", "can't be imported: ModuleNotFoundError: No module named"),
        ("own_samplers:Missing", "can't be imported: AttributeError"),
        ("own_samplers:NoSampler", "expected a class derived from optuna.samplers.BaseSampler"),
    ],
)
def test_what_is_no_sampler_is_refused_in_one_line(name: str, said: str, own_module: str) -> None:
    with pytest.raises(SettingsError) as raised:
        check_sampler(name, ["maximize"], SPACE.distributions())
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_package_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "cmaes", None)
    with pytest.raises(SettingsError, match=r"--sampler cmaes needs a package: pip install"):
        check_sampler("cmaes", ["maximize"], SPACE.distributions())
