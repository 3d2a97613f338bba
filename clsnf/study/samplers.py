"""Samplers by name: Optuna's own, and any class by its import path.

A study's samplers keep no state. Each suggestion comes from a fresh one that is seeded by the
category and the trial's number, and that reads the trials in the storage. A sampler that learns
from its own state between two suggestions (a population in memory, say) begins anew each time.
"""

from __future__ import annotations

import importlib
import inspect
import logging as python_logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, RandomSampler, TPESampler

from clsnf.core.errors import SettingsError, nearest


@dataclass(frozen=True)
class SamplerOptions:
    """What samplers of a study are made with.

    Attributes:
        seed: of the suggestion.
        startup_trials: number of trials that are drawn at random before the sampler learns.
        in_sequence: whether trials run one at a time.
    """

    seed: int
    startup_trials: int
    in_sequence: bool


def _tpe(options: SamplerOptions) -> BaseSampler:
    return TPESampler(
        seed=options.seed,
        multivariate=True,
        n_startup_trials=options.startup_trials,
        constant_liar=not options.in_sequence,
    )


SAMPLERS: dict[str, Callable[[SamplerOptions], BaseSampler]] = {
    "tpe": _tpe,
    "gp": lambda options: GPSampler(
        seed=options.seed,
        n_startup_trials=options.startup_trials,
        deterministic_objective=True,
    ),
    "cmaes": lambda options: CmaEsSampler(
        seed=options.seed, n_startup_trials=options.startup_trials, warn_independent_sampling=False
    ),
    "random": lambda options: RandomSampler(seed=options.seed),
}


def make_sampler(name: str, options: SamplerOptions) -> BaseSampler:
    """A fresh sampler.

    Args:
        name: of :data:`SAMPLERS`, or ``package.module:Class``; the class gets ``seed`` where it
            takes one.
        options: what it is made with.

    Raises:
        SettingsError: there is no such sampler, or it can't be made.
    """
    if name in SAMPLERS:
        with _quiet():
            return SAMPLERS[name](options)
    found = _class_of(name)
    takes_seed = "seed" in inspect.signature(found).parameters
    try:
        sampler = found(seed=options.seed) if takes_seed else found()
    except Exception as error:  # of somebody else's code
        raise SettingsError(f"The sampler {name} can't be made: {_line(error)}.") from error
    if not isinstance(sampler, BaseSampler):
        raise SettingsError(
            f"The sampler {name} is a {type(sampler).__name__}: expected a class derived from "
            "optuna.samplers.BaseSampler."
        )
    return sampler


def _class_of(name: str) -> Any:
    module, colon, attribute = name.partition(":")
    if not colon:
        raise SettingsError(
            f"The sampler is {name!r}.{nearest(name, SAMPLERS)} Or give a class of your own as "
            "package.module:Class."
        )
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a module may raise anything
        raise SettingsError(f"The sampler {name} can't be imported: {_line(error)}.") from error


def check_sampler(
    name: str,
    directions: Sequence[Literal["maximize", "minimize"]],
    distributions: Mapping[str, BaseDistribution],
) -> None:
    """Let the sampler suggest a few trials of a made-up study, so that no real one fails by it.

    Raises:
        SettingsError: there is no such sampler, a package is missing, or it does not take the
            space or the number of objectives.
    """
    with _quiet():
        study = optuna.create_study(directions=list(directions))
        for number in range(3):
            study.sampler = make_sampler(name, SamplerOptions(number, 1, in_sequence=True))
            try:
                trial = study.ask(dict(distributions))
                study.tell(trial, [float(number)] * len(directions))
            except Exception as error:  # of Optuna, or of somebody else's code
                line = f"--sampler {name} can't suggest trials of this study: {_line(error)}"
                if name == "cmaes" and isinstance(error, ImportError):
                    line = "--sampler cmaes needs a package: pip install 'clsnf[cmaes]'"
                raise SettingsError(f"{line}.") from error


def suggest(
    study: optuna.Study, sampler: BaseSampler, distributions: Mapping[str, BaseDistribution]
) -> dict[str, Any]:
    """What a sampler suggests next for a study in memory, which is as before afterwards."""
    study.sampler = sampler
    with _quiet():
        trial = study.ask(dict(distributions))
    study.tell(trial, state=optuna.trial.TrialState.FAIL)  # samplers learn nothing from those
    return dict(trial.params)


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings about what is experimental in Optuna, or how a sampler falls back on another."""
    logger = python_logging.getLogger("optuna")
    level = logger.level
    logger.setLevel(python_logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'without a message'}".rstrip(".")
