"""A category's trials: an Optuna study in a storage.

The storage is the study's memory. A trial that ended is in it before anything else happens, so any
process may be killed at any moment.

The sampler keeps no state between trials. Each suggestion comes from a fresh sampler that is seeded
by the category and the trial's number, and that reads the trials in the storage. A study that is
resumed after a crash therefore suggests what an undisturbed one would.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from optuna import Study, create_study, logging
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.pruners import PercentilePruner
from optuna.samplers import TPESampler
from optuna.storages import BaseStorage, JournalStorage
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from clsnf.core.config import StudySettings
from clsnf.core.errors import OutputError
from clsnf.core.hashing import content_key
from clsnf.core.journal import PatientJournal, cut_damage, remove_stale_lock
from clsnf.core.patience import NO_PATIENCE, Patience
from clsnf.core.uris import is_uri
from clsnf.results import LATENCY, Measurements, TrialResult, trial_result
from clsnf.study.database import open_database
from clsnf.study.folder import JOURNAL

Direction = Literal["maximize", "minimize"]

_ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
# Seconds for which a lock on a journal must not change to be taken for one of a killed process. The
# study's own journal has one writer, who holds the study's folder. Others may write another one.
_OWN_GRACE, _SHARED_GRACE = 1.0, 30.0
_FIRST_POINTS = "first"  # the Optuna study's attribute that holds the points to try first
MOST_SHARED = 2  # points of other categories that a category tries, after its first points
# A trial is pruned when at least this many other trials came as far, and it is not among the best
# 75 percent of them.
_PRUNING_NEEDS_TRIALS = 4
_PRUNING_KEEPS_PERCENT = 75.0


def open_storage(
    where: str | None,
    out: Path,
    say: Callable[[str], None] = lambda line: None,
    patience: Patience = NO_PATIENCE,
) -> BaseStorage:
    """The storage of Optuna studies.

    A journal that a killed process left torn is cut after its last whole record, and its lock is
    removed. The caller holds the study's folder.

    Args:
        where: a database's URL (``sqlite:///studies.db``, ``postgresql://...``) or a journal file;
            None for a journal in `out`.
        out: the study's folder.
        say: gets a line for what was mended.
        patience: with outages of the storage, once it is open.

    Raises:
        OutputError: it can't be opened.
    """
    logging.set_verbosity(logging.WARNING)
    # Choices may be lists, such as a backbone's levels: every storage keeps them, as JSON.
    warnings.filterwarnings(
        "ignore", "Choices for a categorical distribution should be", UserWarning
    )
    try:
        if where is not None and is_uri(where):
            return open_database(where, patience)
        path = out / JOURNAL if where is None else Path(where).absolute()
        if not path.parent.is_dir():
            raise OutputError(
                f"The Optuna storage {path} can't be made: there is no folder {path.parent}."
            )
        grace = _OWN_GRACE if where is None else _SHARED_GRACE
        return _open_journal(path, grace, say, patience)
    except OutputError:
        raise
    except (OSError, ImportError, StorageInternalError, ValueError) as error:
        raise OutputError(_cant_open(where, error)) from error
    except Exception as error:  # the database's driver has errors of its own
        if type(error).__module__.startswith("sqlalchemy"):
            raise OutputError(_cant_open(where, error)) from error
        raise


def _open_journal(
    path: Path, grace: float, say: Callable[[str], None], patience: Patience
) -> JournalStorage:
    if remove_stale_lock(path, grace):
        say(f"{path.name}: the lock of a process that was killed is removed")
    cut = cut_damage(path)
    if cut is not None:
        damage, aside = cut
        say(
            f"{path.name} is torn: what follows its last whole record ({damage}) is left out, and "
            f"kept in {aside.name}; a trial whose end was there runs again"
        )
    try:
        return JournalStorage(PatientJournal(path, patience))
    except OSError:
        raise
    except Exception as error:  # records that are whole may contradict each other
        raise OutputError(
            f"The Optuna journal {path} is damaged ({type(error).__name__}: {error}): put an "
            "earlier copy in its place, or begin another study with another --out."
        ) from error


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


def directions_of(study: StudySettings) -> dict[str, Direction]:
    """The objectives' names, each with the direction of better values."""
    return {name: "minimize" if name == LATENCY else "maximize" for name in study.objectives}


@dataclass(frozen=True)
class SearchPlan:
    """How the trials of every category are suggested.

    Attributes:
        distributions: name of a setting -> Optuna distribution.
        trials: number of trials of a category, as far as it is known; decides how many of the first
            are drawn at random.
        directions: as :func:`directions_of` gives them.
        seed: of the study.
        in_sequence: whether a category never has two trials at once.
    """

    distributions: Mapping[str, BaseDistribution]
    trials: int
    directions: Mapping[str, Direction]
    seed: int
    in_sequence: bool


class CategoryTrials:
    """Trials of one category.

    Args:
        storage: where the Optuna study is; it is made where it is missing.
        study_name: of the Optuna study.
        category: of the trials.
        plan: how trials are suggested.
        first_points: values to try first, in this order; those that are no point of the space are
            left out.

    Attributes:
        begun: number of trials that were begun. Trials that a killed study left running count once
            they are begun again.
    """

    def __init__(
        self,
        storage: BaseStorage,
        study_name: str,
        category: str,
        plan: SearchPlan,
        first_points: Sequence[Mapping[str, Any]],
    ) -> None:
        self.category = category
        self._plan = plan
        self._study: Study = create_study(
            storage=storage,
            study_name=study_name,
            directions=list(plan.directions.values()),
            load_if_exists=True,
            pruner=PercentilePruner(_PRUNING_KEEPS_PERCENT, n_startup_trials=_PRUNING_NEEDS_TRIALS),
        )
        with warnings.catch_warnings():
            # The names are for optuna-dashboard; nothing breaks if Optuna drops this function.
            warnings.simplefilter("ignore", ExperimentalWarning)
            self._study.set_metric_names(
                [name if name == LATENCY else f"validation_{name}" for name in plan.directions]
            )
        if not self._all():
            points = [dict(point) for point in first_points if _is_point(point, plan.distributions)]
            distinct = [point for n, point in enumerate(points) if point not in points[:n]]
            self._study.set_user_attr(_FIRST_POINTS, distinct)
        self._to_restart = [trial.number for trial in self._all(TrialState.RUNNING)]
        self.begun = len(self._all(*_ENDED))

    def _all(self, *states: TrialState) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False, states=states or None)

    @property
    def next_number(self) -> int:
        """The next trial's number."""
        return self._to_restart[0] if self._to_restart else len(self._all())

    def may_share(self) -> bool:
        """Whether the next trial is one that may try what is best for other categories."""
        first = len(self._study.user_attrs[_FIRST_POINTS])
        return not self._to_restart and first <= len(self._all()) < first + MOST_SHARED

    def is_new(self, point: Mapping[str, Any]) -> bool:
        """Whether values are a whole point of the space that teaches something.

        A point that differs from an earlier one in the fusion weight alone does not: weights are
        swept at the end.
        """
        whole = point.keys() == self._plan.distributions.keys()
        tried = [without_fusion_weight(trial.params) for trial in self._all()]
        return (
            whole
            and _is_point(point, self._plan.distributions)
            and without_fusion_weight(point) not in tried
        )

    def upcoming(self) -> dict[str, Any]:
        """The next trial's values; nothing is stored."""
        number = self.next_number
        if self._to_restart:
            return dict(self._all()[number].params)
        points: list[dict[str, Any]] = self._study.user_attrs[_FIRST_POINTS]
        point = points[number] if number < len(points) else {}
        if point.keys() == self._plan.distributions.keys():
            return point
        return self._suggestion() | point

    def begin(self, point: Mapping[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        """The next trial's number and values; first of all, a trial to restart, with its values.

        Args:
            point: a new trial's values; None for those of :meth:`upcoming`.
        """
        if self._to_restart:
            self.begun += 1
            number = self._to_restart.pop(0)
            return number, dict(self._all()[number].params)
        number, point = len(self._all()), dict(self.upcoming() if point is None else point)
        self.begun += 1
        # One write: after a crash the storage has the trial with all of its values, or no trial.
        distributions = dict(self._plan.distributions)
        trial = create_trial(state=TrialState.RUNNING, params=point, distributions=distributions)
        self._study.add_trial(trial)
        return number, dict(self._all()[number].params)

    def _suggestion(self) -> dict[str, Any]:
        """What a fresh sampler suggests next.

        It asks a copy of the study: for a moment, a study that is asked holds a trial without
        values.
        """
        copy = create_study(directions=list(self._plan.directions.values()))
        copy.add_trials(self._all())
        copy.sampler = TPESampler(
            seed=trial_seed(self._plan.seed, self.category, self.begun),
            multivariate=True,
            # A study of few trials must not spend all of them on random points.
            n_startup_trials=min(10, max(3, self._plan.trials // 3)),
            constant_liar=not self._plan.in_sequence,
        )
        return dict(copy.ask(dict(self._plan.distributions)).params)

    def restart(self, number: int) -> None:
        """Let a trial whose process was killed come next once more."""
        self._to_restart.insert(0, number)
        self.begun -= 1

    def _trial(self, number: int) -> Trial:
        return Trial(self._study, self._all()[number]._trial_id)

    def should_prune(self, number: int, step: int, value: float) -> bool:
        """Store the objective that a trial has after `step` epochs, and decide whether to stop it.

        A trial is stopped where it is worse than three quarters of the trials that came as far.
        With several objectives none is.
        """
        if len(self._plan.directions) > 1:
            return False
        trial = self._trial(number)
        # A trial that was restarted reports the same step again.
        if step not in self._all()[number].intermediate_values:
            trial.report(value, step)
        return trial.should_prune()

    def finish(self, number: int, measured: Measurements) -> None:
        """Store what a trial measured at its end, the objectives among it."""
        self._set_attributes(number, measured.flat())
        values = [float(measured.value_of(name)) for name in self._plan.directions]
        self._study.tell(number, values)

    def stop(self, number: int, measured: Measurements) -> None:
        """Store that a trial was stopped on its way."""
        self._set_attributes(number, measured.flat())
        self._study.tell(number, state=TrialState.PRUNED)

    def fail(self, number: int, cause: str, measured: Measurements | None = None) -> None:
        """Store that a trial failed, and why; the sampler learns nothing from it."""
        attributes = {} if measured is None else measured.flat()
        self._set_attributes(number, attributes | {"cause": cause})
        self._study.tell(number, state=TrialState.FAIL)

    def _set_attributes(self, number: int, attributes: Mapping[str, Any]) -> None:
        trial = self._trial(number)
        for name, value in attributes.items():
            if not (isinstance(value, float) and not math.isfinite(value)):
                trial.set_user_attr(name, value)

    def result(self, number: int) -> TrialResult:
        """The result of a trial that was begun."""
        return trial_result(self.category, self._all()[number])

    def results(self) -> list[TrialResult]:
        """The results of all trials that ended, by number."""
        return [trial_result(self.category, trial) for trial in self._all(*_ENDED)]


def without_fusion_weight(config: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a trial's score maps."""
    return {name: value for name, value in config.items() if name != "fusion_weight"}


def _is_point(values: Mapping[str, Any], distributions: Mapping[str, BaseDistribution]) -> bool:
    try:
        return all(
            distributions[name]._contains(distributions[name].to_internal_repr(value))
            for name, value in values.items()
        )
    except (KeyError, ValueError, TypeError):
        return False
