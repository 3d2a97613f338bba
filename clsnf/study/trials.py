"""A category's trials: an Optuna study in a storage.

The storage is the study's memory. A trial that ended is in it before anything else happens, so any
process may be killed at any moment.

The sampler keeps no state between trials. Each suggestion comes from a fresh sampler that is seeded
by the category and the trial's number, and that reads the trials in the storage. A study that is
resumed after a crash therefore suggests what an undisturbed one would.

No point is tried twice, because a trial's result is determined. What failed is told to the sampler
as worse than the worst that ended, and values that always fail are left alone
(:mod:`clsnf.study.failures`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
from optuna import Study, create_study, logging
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import BaseStorage, JournalStorage
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from clsnf.core.config import StudySettings
from clsnf.core.errors import OutputError
from clsnf.core.hashing import content_key
from clsnf.core.journal import PatientJournal, cut_damage, remove_stale_lock
from clsnf.core.patience import NO_PATIENCE, Patience
from clsnf.core.uris import is_uri
from clsnf.results import (
    BEGUN_AGAIN,
    LATENCY,
    Measurements,
    TrialResult,
    choice_from_stored,
    stored_choice,
    trial_result,
)
from clsnf.study.database import open_database
from clsnf.study.failures import AvoidedValue, avoided_values, why_stop
from clsnf.study.names import FUSION_WEIGHT, in_full
from clsnf.study.points import FreePoints, is_value, point_key
from clsnf.study.remote_copy import JOURNAL
from clsnf.study.samplers import SamplerOptions, make_sampler, suggest

Direction = Literal["maximize", "minimize"]

_ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
# Seconds for which a lock on a journal must not change to be taken for one of a killed process. The
# study's own journal has one writer, who holds the study's folder. Others may write another one.
_OWN_GRACE, _SHARED_GRACE = 1.0, 30.0
# Attributes of the Optuna study: the points to try first, and the number of the first trial after
# failures stopped the search.
_FIRST_POINTS, _STOPPED_AFTER = "first", "stopped_after"
MOST_SHARED = 2  # points of other categories that a category tries, after its first points
_NEVER_RAN = "never_ran"  # attribute of a trial that a user put in line with values out of range
_ATTEMPTS = 8  # to get a free point from the sampler, before one is picked by seed
# A trial is stopped on its way where at least so many others came as far, and it is worse than so
# many percent of them.
_PRUNING_NEEDS_TRIALS, _PRUNING_PERCENT = 4, 75.0


def open_storage(
    where: str | None,
    out: Path,
    say: Callable[[str], None] = lambda line: None,
    patience: Patience = NO_PATIENCE,
    is_known: bool = False,
) -> BaseStorage:
    """The storage of Optuna studies.

    A journal that a killed process left torn is cut after its last whole record, and its lock is
    removed. The caller holds the study's folder.

    Args:
        where: a database's URL (``sqlite:///studies.db``, ``postgresql://...``) or a journal file;
            None for a journal in `out`.
        out: the study's folder.
        say: gets a line for what was mended.
        patience: with outages of the storage, also while it is opened.
        is_known: the study has used it before, so that its place is right.

    Raises:
        OutageError: it was away for too long.
        OutputError: it can't be opened.
    """
    logging.set_verbosity(logging.WARNING)
    # In studies of earlier versions choices may be lists, such as a backbone's levels.
    warnings.filterwarnings(
        "ignore", "Choices for a categorical distribution should be", UserWarning
    )
    try:
        if where is not None and is_uri(where):
            return open_database(where, patience, is_known)
        path = out / JOURNAL if where is None else Path(where).absolute()
        if not path.parent.is_dir():
            raise OutputError(
                f"The Optuna storage {path} can't be made: there is no folder {path.parent}."
            )
        grace = _OWN_GRACE if where is None else _SHARED_GRACE
        return patience.wait_for(lambda: _open_journal(path, grace, say, patience))
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


def trial_seed(seed: int, category: str, number: int, attempt: int = 0) -> int:
    """A sampler's seed that does not depend on which other categories are studied."""
    content = [seed, category, number, *([attempt] if attempt else [])]
    return int(content_key(content)[:8], 16)


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
        sampler: a name, see :func:`clsnf.study.samplers.make_sampler`.
    """

    distributions: Mapping[str, BaseDistribution]
    trials: int
    directions: Mapping[str, Direction]
    seed: int
    in_sequence: bool
    sampler: str = "tpe"


class CategoryTrials:
    """Trials of one category.

    Args:
        storage: where the Optuna study is; it is made where it is missing.
        study_name: of the Optuna study.
        category: of the trials.
        plan: how trials are suggested.
        first_points: values to try first, in this order; those that are no point of the space are
            left out.
        say: gets a line for what a user should know.

    Attributes:
        begun: number of trials that were begun. Trials that a killed study left running count once
            they are begun again.

    Raises:
        OutputError: the Optuna study holds trials of an earlier version that can't be gone on with.
    """

    def __init__(
        self,
        storage: BaseStorage,
        study_name: str,
        category: str,
        plan: SearchPlan,
        first_points: Sequence[Mapping[str, Any]],
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.category = category
        self._plan = plan
        self._say, self._said, self._is_stopped = say, set[str](), False
        self._study: Study = create_study(
            storage=storage,
            study_name=study_name,
            directions=list(plan.directions.values()),
            load_if_exists=True,
        )
        with warnings.catch_warnings():
            # The names are for optuna-dashboard; nothing breaks if Optuna drops this function.
            warnings.simplefilter("ignore", ExperimentalWarning)
            self._study.set_metric_names(
                [name if name == LATENCY else f"validation_{name}" for name in plan.directions]
            )
        _check_version(category, self._all())
        if _FIRST_POINTS not in self._study.user_attrs:
            points = [_stored(point) for point in first_points]
            self._study.set_user_attr(
                _FIRST_POINTS, [point for point in points if self._is_point(point)]
            )
        self._to_restart = [trial.number for trial in self._all(TrialState.RUNNING)]
        self.begun = len(self._ended())

    # ---- what is known ----

    def _all(self, *states: TrialState) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False, states=states or None)

    def _ended(self) -> list[FrozenTrial]:
        return [t for t in self._all(*_ENDED) if _NEVER_RAN not in t.user_attrs]

    def _is_point(self, point: Mapping[str, Any]) -> bool:
        ranges = self._plan.distributions
        return point.keys() == ranges.keys() and all(
            is_value(ranges[name], value) for name, value in point.items()
        )

    def _avoided(self) -> list[AvoidedValue]:
        return avoided_values(self._ended())

    def _free_points(self) -> FreePoints:
        avoided: dict[str, list[Any]] = {}
        for found in self._avoided():
            avoided.setdefault(found.name, []).append(found.value)
            self._say_once(f"{self.category}: {found}")
        tried = {
            point_key(trial.params)
            for trial in self._all(*_ENDED, TrialState.RUNNING)
            if _NEVER_RAN not in trial.user_attrs
        }
        return FreePoints(self._plan.distributions, tried, avoided)

    def _say_once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self._say(line)

    @property
    def is_over(self) -> bool:
        """Whether no trial can be begun, although there may be less than were asked for.

        The space is used up, or half of the trials failed; the reason is said once.
        """
        if self._to_restart or self._all(TrialState.WAITING):
            return False
        free = self._free_points()
        if free.are_used_up:
            self._say_once(
                f"{self.category}: the space is used up: all of its {free.size:.0f} points were "
                "tried"
            )
            return True
        before = self._study.user_attrs.get(_STOPPED_AFTER, 0)
        since = [trial for trial in self._ended() if trial.number >= before]
        why = None if self._is_stopped else why_stop(since, self._avoided())
        if why is not None:
            self._is_stopped = True
            self._study.set_user_attr(_STOPPED_AFTER, len(self._all()))
            self._say(f"{self.category}: {why}")
        return self._is_stopped

    # ---- suggestions ----

    @property
    def next_number(self) -> int:
        """The next trial's number."""
        if self._to_restart:
            return self._to_restart[0]
        waiting = self._all(TrialState.WAITING)
        return waiting[0].number if waiting else len(self._all())

    def may_share(self) -> bool:
        """Whether the next trial is one that may try what is best for other categories."""
        if self._to_restart or self._all(TrialState.WAITING) or self._first_point() is not None:
            return False
        return len(self._all()) < len(self._study.user_attrs[_FIRST_POINTS]) + MOST_SHARED

    def is_new(self, point: Mapping[str, Any]) -> bool:
        """Whether values are a whole point of the space that was not tried."""
        return self._free_points().holds(_stored(point))

    def upcoming(self) -> dict[str, Any]:
        """The next trial's values, as settings have them; nothing is stored."""
        if self._to_restart:
            return dict(self.result(self._to_restart[0]).config)
        waiting = self._all(TrialState.WAITING)
        stored = None if waiting else self._first_point()
        if stored is None:
            stored = self._suggestion()
        if waiting:
            stored |= self._given(waiting[0])
        return {name: choice_from_stored(value) for name, value in stored.items()}

    def begin(self, point: Mapping[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        """The next trial's number and values, as settings have them.

        First of all come trials to restart, with their values, then those that a user put in line
        (``study.enqueue_trial``), then the first points, then what the sampler suggests.

        Args:
            point: the values of a trial that is neither to restart nor in line; None for those of
                the first points or the sampler.
        """
        number = self._begin_again() if self._to_restart else self._begin_waiting()
        if number is None:
            stored = _stored(point) if point is not None else self._first_point()
            if stored is None:
                stored = self._suggestion()
            # One write: after a crash the storage has the trial with all of its values, or no
            # trial.
            trial = create_trial(
                state=TrialState.RUNNING,
                params=stored,
                distributions=dict(self._plan.distributions),
            )
            storage = self._study._storage
            made = storage.create_new_trial(self._study._study_id, template_trial=trial)
            number = storage.get_trial_number_from_id(made)
        self.begun += 1
        return number, dict(self.result(number).config)

    def _begin_again(self) -> int:
        """Begin the first trial to restart; its time counts from now."""
        number = self._to_restart.pop(0)
        self._trial(number).set_user_attr(BEGUN_AGAIN, datetime.now().isoformat())
        return number

    def _first_point(self) -> dict[str, Any] | None:
        """The next one of the points to try first; None where all were tried."""
        free = self._free_points()
        points: list[dict[str, Any]] = self._study.user_attrs[_FIRST_POINTS]
        return next((point for point in points if free.holds(point)), None)

    def _suggestion(self) -> dict[str, Any]:
        """What a fresh sampler suggests next: a point that is free.

        It asks a copy of the study: for a moment, a study that is asked holds a trial without
        values.
        """
        plan, free = self._plan, self._free_points()
        copy = create_study(directions=list(plan.directions.values()))
        copy.add_trials(self._lessons())
        point: dict[str, Any] = {}
        for attempt in range(_ATTEMPTS):
            options = SamplerOptions(
                seed=trial_seed(plan.seed, self.category, self.begun, attempt),
                # A study of few trials must not spend all of them on random points.
                startup_trials=min(10, max(3, plan.trials // 3)),
                in_sequence=plan.in_sequence,
            )
            point = suggest(copy, make_sampler(plan.sampler, options), plan.distributions)
            if free.holds(point):
                return point
        seed = trial_seed(plan.seed, self.category, self.begun, _ATTEMPTS)
        if math.isfinite(free.size) and not free.are_used_up:
            return free.pick(seed)
        return free.without_avoided(point, seed)

    def _lessons(self) -> list[FrozenTrial]:
        """What the sampler reads: all trials, failed ones as worse than the worst that finished."""
        trials = self._all(*_ENDED, TrialState.RUNNING)
        finished = [t.values for t in trials if t.state == TrialState.COMPLETE]
        values = [
            _worse_than(column, direction)
            for column, direction in zip(
                zip(*finished, strict=True) if finished else [()] * len(self._plan.directions),
                self._plan.directions.values(),
                strict=True,
            )
        ]
        return [
            trial
            if trial.state != TrialState.FAIL
            else create_trial(
                state=TrialState.COMPLETE,
                params=trial.params,
                distributions=trial.distributions,
                values=values,
            )
            for trial in trials
            if _NEVER_RAN not in trial.user_attrs
        ]

    def _begin_waiting(self) -> int | None:
        """Begin the first trial that a user put in line; None where there is none.

        It stays in line until it has all of its values. Values that are no point of the space are
        said, and their trial fails without counting.
        """
        storage = self._study._storage
        for trial in self._all(TrialState.WAITING):
            given = self._given(trial)
            cause = self._why_no_point(given)
            if cause is not None:
                self._say(f"{self.category}, trial {trial.number} is left out: {cause}")
                storage.set_trial_user_attr(trial._trial_id, _NEVER_RAN, True)
                storage.set_trial_user_attr(trial._trial_id, "cause", cause)
                storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
                continue
            if given.keys() != self._plan.distributions.keys():
                given = self._suggestion() | given
            for name, distribution in self._plan.distributions.items():
                if name not in trial.params:
                    value = distribution.to_internal_repr(given[name])
                    storage.set_trial_param(trial._trial_id, name, value, distribution)
            storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
            return trial.number
        return None

    def _given(self, trial: FrozenTrial) -> dict[str, Any]:
        """The values of a trial that a user put in line."""
        return _stored(trial.params | trial.system_attrs.get("fixed_params", {}))

    def _why_no_point(self, given: Mapping[str, Any]) -> str | None:
        ranges = self._plan.distributions
        for name, value in given.items():
            if name not in ranges:
                return f"the space has no {name}; it has {', '.join(ranges) or 'no names'}."
            if not is_value(ranges[name], value):
                return f"{name}={value} is outside the space ({ranges[name]})."
        return None

    def restart(self, number: int) -> None:
        """Let a trial whose process was killed come next once more."""
        self._to_restart.insert(0, number)
        self.begun -= 1

    def _trial(self, number: int) -> Trial:
        return Trial(self._study, self._all()[number]._trial_id)

    def should_prune(self, number: int, step: int, value: float) -> bool:
        """Store what a trial would be worth after `step` epochs, and decide whether to stop it.

        A trial is stopped where it is worse than three quarters of the ended trials that came as
        far with images of the same size, those that were stopped there included: Optuna's pruners
        leave these out, and so judge ever more strictly. With several objectives none is.

        Args:
            number: of the trial.
            step: epochs that it has trained.
            value: what it would be worth.
        """
        if len(self._plan.directions) > 1:
            return False
        # A trial that was restarted reports the same step again.
        if step not in self._all()[number].intermediate_values:
            self._trial(number).report(value, step)
        size = _image_size(self._all()[number])
        others = [
            trial.intermediate_values[step]
            for trial in self._all(TrialState.COMPLETE, TrialState.PRUNED)
            if step in trial.intermediate_values and _image_size(trial) == size
        ]
        if len(others) < _PRUNING_NEEDS_TRIALS:
            return False
        best = max(self._all()[number].intermediate_values.values())
        return bool(best < np.percentile(others, 100.0 - _PRUNING_PERCENT))

    def best_densities(self) -> dict[str, str]:
        """Key of placed images -> key of the best trial's density maps of them."""
        finished = sorted(
            (
                t
                for t in self.results()
                if t.measured.density is not None and t.objective is not None
            ),
            key=lambda trial: trial.objective or 0.0,
        )
        return dict(t.measured.density for t in finished if t.measured.density is not None)

    def finish(self, number: int, measured: Measurements) -> None:
        """Store what a trial measured at its end, the objectives among it."""
        if measured.dropped:
            self._say(f"{self.category}, trial {number}: {dropped_line(measured.dropped)}")
        self._set_attributes(number, measured.attributes())
        values = [float(measured.value_of(name)) for name in self._plan.directions]
        self._study.tell(number, values)

    def stop(self, number: int, measured: Measurements) -> None:
        """Store that a trial was stopped on its way."""
        self._set_attributes(number, measured.attributes())
        self._study.tell(number, state=TrialState.PRUNED)

    def fail(self, number: int, cause: str, measured: Measurements | None = None) -> None:
        """Store that a trial failed, and why."""
        attributes = {} if measured is None else measured.attributes()
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


def dropped_line(names: Sequence[str]) -> str:
    """Words for damaged artifacts (``kind/key``) that were dropped."""
    what = "stored artifact was" if len(names) == 1 else "stored artifacts were"
    shown = ", ".join(f"stages/{name}" for name in names[:3])
    more = "" if len(names) <= 3 else f" and {len(names) - 3} more"
    return (
        f"{len(names)} {what} damaged, and computed anew ({shown}{more}): see to the disk if this "
        "comes again"
    )


def without_fusion_weight(config: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a trial's score maps."""
    return {name: value for name, value in config.items() if name != FUSION_WEIGHT}


def _stored(point: Mapping[str, Any]) -> dict[str, Any]:
    """A point as Optuna stores it; the fusion weight is no part of it: a sweep answers it."""
    return {name: stored_choice(value) for name, value in without_fusion_weight(point).items()}


def _image_size(trial: FrozenTrial) -> dict[str, Any]:
    """What a trial's values say of its images."""
    point = {name: choice_from_stored(value) for name, value in trial.params.items()}
    return {name: value for name, value in in_full(point).items() if name.startswith("image.")}


def _worse_than(values: Sequence[float], direction: Direction) -> float:
    """A little worse than the worst value."""
    worst, best = min(values, default=0.0), max(values, default=0.0)
    margin = 0.1 * (best - worst) or 1e-3
    return worst - margin if direction == "maximize" else best + margin


def _check_version(category: str, trials: Sequence[FrozenTrial]) -> None:
    """Refuse to go on with trials of earlier versions that can't be compared with this one's."""
    for trial in trials:
        ranges = trial.distributions
        lists = any(
            isinstance(choice, list)
            for own in ranges.values()
            if isinstance(own, CategoricalDistribution)
            for choice in own.choices
        )
        if FUSION_WEIGHT in ranges or lists:
            what = "stored lists as choices" if lists else "drew a fusion weight for each trial"
            raise OutputError(
                f"The trials of {category} were begun by an earlier version of clsnf, which {what}:"
                " choose another --out, and give this study's folder to --warm-start to begin with "
                "its best trials."
            )
