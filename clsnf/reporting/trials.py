"""What a category's trials say together: importances of settings, seconds, what sharing saved."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from optuna import create_study, logging
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.trial import TrialState, create_trial

from clsnf.reporting.formats import is_finite
from clsnf.reporting.study_files import Product, Record
from clsnf.results import TrialResult

LEAST_TRIALS = 4  # fewer have no importances
_TREES = 32
_NEVER_SHARED = ("waiting", "storing", "scoring")  # kinds of work that every trial does itself
_DID_ITSELF = 0.05  # seconds: a trial that spent less on a kind of work found its result


def importances(product: Product, space: Mapping[str, Record]) -> dict[str, float]:
    """Share of the objective's variance that each setting explains; the shares sum to 1.

    Computed by Optuna's fANOVA (Hutter et al., ICML 2014). Empty for fewer than
    :data:`LEAST_TRIALS` finished trials, or where all have the same objective.
    """
    trials = [trial for trial in product.finished_trials if is_finite(trial.objective)]
    names = [
        name
        for name in product.parameters
        if len({_as_text(trial.config.get(name)) for trial in trials}) > 1
    ]
    if len(trials) < LEAST_TRIALS or len({trial.objective for trial in trials}) < 2 or not names:
        return {}
    logging.set_verbosity(logging.WARNING)
    distributions = {
        name: _distribution(space.get(name) or {}, [trial.config.get(name) for trial in trials])
        for name in names
    }
    study = create_study(direction="maximize")
    for trial in trials:
        params = {
            name: _as_text(trial.config.get(name))
            if isinstance(distribution, CategoricalDistribution)
            else trial.config[name]
            for name, distribution in distributions.items()
        }
        study.add_trial(
            create_trial(
                state=TrialState.COMPLETE,
                params=params,
                distributions=distributions,
                value=trial.objective,
            )
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = get_param_importances(
            study, evaluator=FanovaImportanceEvaluator(n_trees=_TREES, seed=0)
        )
    return {name: float(value) for name, value in found.items() if is_finite(value)}


def _distribution(given: Record, values: Sequence[Any]) -> BaseDistribution:
    """As the space's file has it; from the values themselves where it does not."""
    if given.get("type") in ("int", "float") and all(
        is_finite(v) and given["low"] <= v <= given["high"] for v in values
    ):
        if given["type"] == "int":
            return IntDistribution(
                given["low"], given["high"], log=bool(given.get("log")), step=given.get("step") or 1
            )
        return FloatDistribution(
            given["low"], given["high"], log=bool(given.get("log")), step=given.get("step")
        )
    if given.get("type") != "choice" and all(is_finite(v) for v in values):
        return FloatDistribution(float(min(values)), float(max(values)))
    return CategoricalDistribution(sorted({_as_text(value) for value in values}))


def _as_text(value: Any) -> str:
    """A choice as a text, because Optuna takes no lists."""
    return json.dumps(value)


def seconds_by_kind(trials: Sequence[TrialResult]) -> dict[str, float]:
    """Seconds of all trials by kind of work, the longest first."""
    sums: dict[str, float] = {}
    for trial in trials:
        for kind, seconds in trial.measured.seconds_by_kind.items():
            if is_finite(seconds):
                sums[kind] = sums.get(kind, 0.0) + seconds
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def saved_seconds(trials: Sequence[TrialResult]) -> float | None:
    """An estimate of the time that the trials saved by sharing artifacts.

    Each kind of work whose result a trial found is counted at the median time of those trials that
    did it themselves. None where no artifact was reused.
    """
    if not any(trial.measured.artifacts_reused for trial in trials):
        return None
    total = 0.0
    for kind in seconds_by_kind(trials):
        if kind in _NEVER_SHARED:
            continue
        spent = [trial.measured.seconds_by_kind.get(kind, 0.0) for trial in trials]
        did = [seconds for seconds in spent if seconds > _DID_ITSELF]
        total += (len(spent) - len(did)) * float(np.median(did)) if did else 0.0
    return total
