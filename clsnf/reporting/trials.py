"""What a category's trials say together: which parameter mattered, which trials no other beats,
what sharing saved.
"""

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

LEAST_TRIALS = 4  # with fewer there is nothing to say
_TREES = 32


def importances(product: Product, space: Mapping[str, Record]) -> dict[str, float]:
    """Share of the objective's variance that each parameter explains, summing to 1: fANOVA (Hutter
    et al., ICML 2014) by Optuna.

    Empty for fewer than :data:`LEAST_TRIALS` finished trials, or where all came to the same.
    """
    trials = [trial for trial in product.finished_trials if is_finite(trial.get("objective"))]
    names = [
        n for n in product.parameters if len({_choice(t.get(f"config/{n}")) for t in trials}) > 1
    ]
    if len(trials) < LEAST_TRIALS or len({trial["objective"] for trial in trials}) < 2 or not names:
        return {}
    logging.set_verbosity(logging.WARNING)
    kinds = {
        name: _distribution(space.get(name) or {}, [t[f"config/{name}"] for t in trials])
        for name in names
    }
    study = create_study(direction="maximize")
    for trial in trials:
        values = {name: trial[f"config/{name}"] for name in names}
        params = {
            n: _choice(v) if isinstance(kinds[n], CategoricalDistribution) else v
            for n, v in values.items()
        }
        study.add_trial(
            create_trial(
                state=TrialState.COMPLETE,
                params=params,
                distributions=kinds,
                value=trial["objective"],
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
    return CategoricalDistribution(sorted({_choice(value) for value in values}))


def _choice(value: Any) -> str:
    return json.dumps(value)


def pareto(rows: Sequence[Record], objectives: Mapping[str, int]) -> list[Record]:
    """The rows that no other one is at least as good as in every objective and better in one.

    Args:
        rows: hold the objectives; those with one that is not finite are left out.
        objectives: key -> 1 where more is better, -1 where less is.
    """
    known = [row for row in rows if all(is_finite(row.get(name)) for name in objectives)]
    values = np.array(
        [[sign * row[name] for name, sign in objectives.items()] for row in known]
    ).reshape(len(known), -1)
    return [
        row
        for row, own in zip(known, values, strict=True)
        if not ((values >= own).all(axis=1) & (values > own).any(axis=1)).any()
    ]


def seconds_by_kind(trials: Sequence[Record]) -> dict[str, float]:
    """Seconds of trials by kind of work, the longest first."""
    sums: dict[str, float] = {}
    for trial in trials:
        for name, value in trial.items():
            if name.startswith("seconds_") and is_finite(value):
                sums[name.removeprefix("seconds_")] = (
                    sums.get(name.removeprefix("seconds_"), 0.0) + value
                )
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def saved_seconds(trials: Sequence[Record]) -> float | None:
    """About how long the finished trials would have taken beyond what they took, had each done all
    of its work itself.

    Each kind of work that a trial found done is counted at the median time of the same product's
    trials that did it: an estimate. None where nothing was reused.
    """
    if not any(trial.get("stages_reused") for trial in trials):
        return None
    total = 0.0
    for kind in seconds_by_kind(trials):
        if kind in ("waiting", "storing", "scoring"):
            continue
        spent = [trial.get(f"seconds_{kind}") or 0.0 for trial in trials]
        did = [value for value in spent if value > 0.05]
        total += (len(spent) - len(did)) * float(np.median(did)) if did else 0.0
    return total
