"""The trials of a study that has not ended: from its Optuna journal, in the shape of
``trials.parquet``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optuna import logging
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

_STATUS = {
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "stopped",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "under way",
}


def trials_of_journal(path: Path) -> list[dict[str, Any]]:
    """Records of all begun trials; the name of an Optuna study there is its category's."""
    logging.set_verbosity(logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(path)))
    return [
        _record(study.study_name.rpartition("/")[2], trial)
        for study in storage.get_all_studies()
        for trial in storage.get_all_trials(study._study_id, deepcopy=False)
        if trial.state in _STATUS
    ]


def _record(category: str, trial: FrozenTrial) -> dict[str, Any]:
    notes = dict(trial.user_attrs)
    return {
        "category": category,
        "trial": trial.number,
        "status": _STATUS[trial.state],
        "cause": notes.pop("cause", None),
        "objective": trial.values[0] if trial.state == TrialState.COMPLETE else None,
        "seconds": notes.pop("seconds", None),
        "wall_seconds": None if trial.duration is None else trial.duration.total_seconds(),
        **{f"config/{name}": value for name, value in trial.params.items()},
        **notes,
    }
