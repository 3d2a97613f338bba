"""A category's trials, in an Optuna study that lies in a storage: what was tried, what came out,
what to try next.

The storage is the study's memory: a trial that ended is in it before anything else happens, so that
any process may be killed at any moment. Unusual: the sampler has no state of its own to lose. Each
suggestion comes from a fresh sampler, seeded by the category and the trial's number, that sees the
trials in the storage; a study that goes on after a crash therefore suggests what an undisturbed one
would.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from optuna import Study, create_study, logging
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.pruners import PercentilePruner
from optuna.samplers import TPESampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from clsnf.core.errors import OutputError
from clsnf.core.hashing import content_key
from clsnf.core.uris import is_uri

STATUS = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "stopped", TrialState.FAIL: "failed"}
JOURNAL = "optuna.journal"
_FIRST = "first"  # the study's attribute that holds the points to try first
# A trial is hopeless when it is in the worst quarter of at least this many others that came as far.
_COMPARED_WITH = 4
_KEPT_PERCENT = 75.0


def open_storage(where: str | None, out: Path) -> BaseStorage:
    """The storage of Optuna studies.

    Args:
        where: a database's URL (``sqlite:///studies.db``, ``postgresql://...``) or a journal file;
            None for a journal in `out`.

    Raises:
        OutputError: it can't be opened.
    """
    logging.set_verbosity(logging.WARNING)
    # Choices may be lists, such as a backbone's levels: every storage keeps JSON.
    warnings.filterwarnings(
        "ignore", "Choices for a categorical distribution should be", UserWarning
    )
    try:
        if where is not None and is_uri(where):
            return RDBStorage(where)
        path = out / JOURNAL if where is None else Path(where).absolute()
        if not path.parent.is_dir():
            raise OutputError(
                f"The Optuna storage {path} can't be made: there is no folder {path.parent}."
            )
        return JournalStorage(JournalFileBackend(str(path)))
    except OutputError:
        raise
    except (OSError, ImportError, StorageInternalError, ValueError) as error:
        raise OutputError(_cant_open(where, error)) from error
    except Exception as error:  # the database's driver has errors of its own
        if type(error).__module__.startswith("sqlalchemy"):
            raise OutputError(_cant_open(where, error)) from error
        raise


def _cant_open(where: str | None, error: Exception) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    scheme = "" if where is None else where.partition("://")[0] if is_uri(where) else where
    return (
        f"The Optuna storage ({scheme}) can't be opened ({line}): give a file, or a URL such as "
        "sqlite:////absolute/studies.db."
    )


def trial_seed(seed: int, category: str, number: int) -> int:
    """A sampler's seed that does not depend on which other categories are studied."""
    return int(content_key([seed, category, number])[:8], 16)


class History:
    """Trials of one category.

    Args:
        storage: where the Optuna study lies; it is made where it is missing.
        name: of the Optuna study.
        category: of the trials.
        distributions: name to Optuna distribution.
        first: values to try first, in this order; those that are no point of the space are left
            out.
        trials: how many there will be; decides how many of the first are drawn at random.
        objectives: names of results, each with ``maximize`` or ``minimize``.
        seed: of the study.
        in_sequence: never two trials at once.

    Attributes:
        given: number of trials that were begun; those that a killed study left under way count once
            they are begun again.
    """

    def __init__(
        self,
        storage: BaseStorage,
        name: str,
        category: str,
        distributions: Mapping[str, BaseDistribution],
        first: Sequence[Mapping[str, Any]],
        trials: int,
        objectives: Mapping[str, Literal["maximize", "minimize"]],
        seed: int,
        in_sequence: bool,
    ) -> None:
        self.category = category
        self._distributions, self._objectives = dict(distributions), dict(objectives)
        self._trials, self._seed, self._in_sequence = trials, seed, in_sequence
        self._study: Study = create_study(
            storage=storage,
            study_name=name,
            directions=list(objectives.values()),
            load_if_exists=True,
            pruner=PercentilePruner(_KEPT_PERCENT, n_startup_trials=_COMPARED_WITH),
        )
        with (
            warnings.catch_warnings()
        ):  # the names are for optuna-dashboard; should they go away one day, nothing is lost
            warnings.simplefilter("ignore", ExperimentalWarning)
            self._study.set_metric_names(list(objectives))
        if not self._all():
            points = [dict(values) for values in first if _is_point(values, self._distributions)]
            self._study.set_user_attr(
                _FIRST,
                [values for index, values in enumerate(points) if values not in points[:index]],
            )
        self._left = [trial.number for trial in self._all(TrialState.RUNNING)]
        self.given = len(self._all(*STATUS))

    def _all(self, *states: TrialState) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False, states=states or None)

    def begin(self) -> tuple[int, dict[str, Any]]:
        """The next trial: its number and values. One that a killed study left under way comes
        first, as it was.
        """
        self.given += 1
        if self._left:
            number = self._left.pop(0)
            return number, dict(self._all()[number].params)
        number = len(self._all())
        first: list[dict[str, Any]] = self._study.user_attrs[_FIRST]
        given = first[number] if number < len(first) else {}
        values = given if given.keys() == self._distributions.keys() else self._sampled() | given
        # In one step: whoever goes on after a crash finds all of a trial's values, or no such
        # trial.
        self._study.add_trial(
            create_trial(state=TrialState.RUNNING, params=values, distributions=self._distributions)
        )
        return number, dict(self._all()[number].params)

    def _sampled(self) -> dict[str, Any]:
        """What a fresh sampler suggests next. It asks a copy of the study: asking leaves a trial
        without values for a moment.
        """
        copy = create_study(directions=list(self._objectives.values()))
        copy.add_trials(self._all())
        copy.sampler = TPESampler(
            seed=trial_seed(self._seed, self.category, self.given - 1),
            multivariate=True,
            # Few trials must not all be spent on random points.
            n_startup_trials=min(10, max(3, self._trials // 3)),
            constant_liar=not self._in_sequence,
        )
        return dict(copy.ask(self._distributions).params)

    def begin_again(self, number: int) -> None:
        """Let a trial whose process was killed come next once more."""
        self._left.insert(0, number)
        self.given -= 1

    def _trial(self, number: int) -> Trial:
        return Trial(self._study, self._all()[number]._trial_id)

    def is_hopeless(self, number: int, step: int, value: float) -> bool:
        """Note how good a trial is on its way, and whether to stop it: it is worse than three
        quarters of those that came as far.
        """
        if len(self._objectives) > 1:
            return False
        trial = self._trial(number)
        if (
            step not in self._all()[number].intermediate_values
        ):  # a trial that was begun again says so twice
            trial.report(value, step)
        return trial.should_prune()

    def end(self, number: int, result: Mapping[str, Any], notes: Mapping[str, Any]) -> None:
        """Keep what a trial came to.

        Args:
            number: of the trial.
            result: holds the objectives; without them the trial was stopped early.
            notes: what else to keep, under its names.
        """
        self._note(number, notes)
        values = [result.get(name) for name in self._objectives]
        if all(value is not None for value in values):
            self._study.tell(number, [float(value) for value in values if value is not None])
        else:
            self._study.tell(number, state=TrialState.PRUNED)

    def fail(self, number: int, cause: str, notes: Mapping[str, Any] | None = None) -> None:
        """Keep that a trial failed, and why; the sampler learns nothing from it."""
        self._note(number, {**(notes or {}), "cause": cause})
        self._study.tell(number, state=TrialState.FAIL)

    def _note(self, number: int, notes: Mapping[str, Any]) -> None:
        trial = self._trial(number)
        for name, value in notes.items():
            if not (isinstance(value, float) and not math.isfinite(value)):
                trial.set_user_attr(name, value)

    def record(self, number: int) -> dict[str, Any]:
        """What is known of an ended trial; see :meth:`records`."""
        return self._record(self._all()[number])

    def records(self) -> list[dict[str, Any]]:
        """All ended trials by number: category, trial, status (``finished``, ``stopped`` or
        ``failed``), cause, objective (the first of the objectives, None where the trial did not
        finish), seconds (of its work), wall_seconds (from suggestion to result), config,
        figures."""
        return [self._record(trial) for trial in self._all() if trial.state in STATUS]

    def _record(self, trial: FrozenTrial) -> dict[str, Any]:
        notes = dict(trial.user_attrs)
        return {
            "category": self.category,
            "trial": trial.number,
            "status": STATUS[trial.state],
            "cause": notes.pop("cause", None),
            "objective": trial.values[0] if trial.state == TrialState.COMPLETE else None,
            "seconds": notes.pop("seconds", None),
            "wall_seconds": None if trial.duration is None else trial.duration.total_seconds(),
            "config": dict(trial.params),
            "figures": notes,
        }


def _is_point(values: Mapping[str, Any], distributions: Mapping[str, BaseDistribution]) -> bool:
    try:
        return all(
            distributions[name]._contains(distributions[name].to_internal_repr(value))
            for name, value in values.items()
        )
    except (KeyError, ValueError, TypeError):
        return False
