"""What a category's failed trials say: which values to leave alone, and when to stop.

A value is left alone where all trials with it failed, three of them or more in the same way, and
most of the others did not. Where two values failed in the very same trials, nobody knows which of
them it was: neither is left alone until a trial tells them apart, and then the one that explains
more failures comes first.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from clsnf.results import choice_from_stored

_FAILURES_OF_A_VALUE = 3
_LEAST_TRIALS = 6  # a search of fewer is not stopped for its failures


@dataclass(frozen=True)
class AvoidedValue:
    """A value that is left alone.

    Attributes:
        name: of the setting.
        value: as Optuna stores it.
        trials: numbers of the trials with it; all failed.
        cause: of the failure that came most often.
    """

    name: str
    value: Any
    trials: frozenset[int]
    cause: str

    def __str__(self) -> str:
        return (
            f"{self.name}={_readable(self.value)} is left alone: all {len(self.trials)} trials "
            f"with it failed ({self.cause.rstrip('.')})"
        )


def _readable(value: Any) -> str:
    """A stored value; of a joint choice its settings."""
    found = choice_from_stored(value)
    if not isinstance(found, dict):
        return str(value)
    return "(" + ", ".join(f"{name}={one}" for name, one in found.items()) + ")"


def cause_of(trial: FrozenTrial) -> str:
    """Why a trial failed."""
    return str(trial.user_attrs.get("cause", "without a message"))


def _kind_of(trial: FrozenTrial) -> str:
    """The cause without its numbers: the same for failures of one kind."""
    return re.sub(r"\d+(\.\d+)?(e[+-]?\d+)?", "#", cause_of(trial))


def avoided_values(ended: Sequence[FrozenTrial]) -> list[AvoidedValue]:
    """The values that are left alone.

    Args:
        ended: the trials that ended, failed ones among them.
    """
    left = list(ended)
    found: list[AvoidedValue] = []
    while True:
        candidates = _always_failed(left)
        if not candidates:
            return found
        most = max(len(candidate.trials) for candidate in candidates)
        best = [candidate for candidate in candidates if len(candidate.trials) == most]
        alone = [
            own for own in best if not any(o.trials == own.trials for o in best if o is not own)
        ]
        if not alone:
            return found
        found.append(alone[0])
        left = [trial for trial in left if trial.number not in alone[0].trials]


def _always_failed(trials: Sequence[FrozenTrial]) -> list[AvoidedValue]:
    with_value: dict[tuple[str, str], list[FrozenTrial]] = {}
    for trial in trials:
        for name, value in trial.params.items():
            with_value.setdefault((name, repr(value)), []).append(trial)
    failed = sum(trial.state == TrialState.FAIL for trial in trials)
    found = []
    for (name, _), own in with_value.items():
        rest = len(trials) - len(own)
        if any(t.state != TrialState.FAIL for t in own) or 2 * (failed - len(own)) > rest - 1:
            continue  # where others fail as well, the value explains nothing
        (kind, times) = Counter(map(_kind_of, own)).most_common(1)[0]
        if times >= _FAILURES_OF_A_VALUE:
            cause = next(cause_of(trial) for trial in own if _kind_of(trial) == kind)
            numbers = frozenset(trial.number for trial in own)
            found.append(AvoidedValue(name, own[0].params[name], numbers, cause))
    return found


def why_stop(ended: Sequence[FrozenTrial], avoided: Sequence[AvoidedValue]) -> str | None:
    """Why a search must stop: half of its trials failed. None where it may go on.

    Trials with a value that is left alone do not count: what ended them will not come again.

    Args:
        ended: the trials that ended.
        avoided: what is left alone.
    """
    known = frozenset[int]().union(*(value.trials for value in avoided))
    counted = [trial for trial in ended if trial.number not in known]
    failed = [trial for trial in counted if trial.state == TrialState.FAIL]
    if len(counted) < _LEAST_TRIALS or 2 * len(failed) < len(counted):
        return None
    (kind, _) = Counter(map(_kind_of, failed)).most_common(1)[0]
    cause = next(cause_of(trial) for trial in failed if _kind_of(trial) == kind)
    return (
        f"the search stops, because {len(failed)} of {len(counted)} trials failed, most often with "
        f"{cause.rstrip('.')}: mend the cause and go on with --resume, or search another space in "
        "another --out, from the best trials of this one (--warm-start)"
    )
