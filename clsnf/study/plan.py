"""A study on disk: where things lie, and what a trial on another machine must be told to do its part.

<out>/summary.json            what came out, category by category
<out>/trials.parquet          every trial
<out>/optuna.journal          the same while the study runs, as Optuna studies (unless another storage was named)
<out>/winners/<category>/     the winning detector
<out>/examples/<category>.png pictures of its answers
<out>/validation/<category>/  the validation defects, in MVTec AD's layout
<out>/finished/               each category's part of the summary, as soon as it is known
<out>/ledger.jsonl            when the test images were looked at, and for what
<out>/stages/                 finished work, found by content
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clsnf.config import DetectorSettings, StudySettings, from_dict
from clsnf.data.stream_choice import StreamChoice
from clsnf.errors import OutputError
from clsnf.fingerprint import check_place, content_key, write_json, written_whole
from clsnf.ledger import note_unlocked
from clsnf.training.prepare import rows_of


@dataclass(frozen=True)
class StudyPlan:
    """What every process of a study knows; plain types only, it travels to the workers.

    Attributes:
        out: the study's folder, absolute.
        settings: :class:`DetectorSettings` as plain types.
        study: :class:`StudySettings` as plain types.
        leaving_epochs: numbers of joint epochs that some trial may ask for.
        rungs: epochs of the trunk at which trials are compared with others on their way.
        fusion_weights: what is swept at the end.
        textures: folder of texture pictures, or None.
        device: ``auto``, ``cpu``, ``cuda``, ``mps``.
        threads: CPU threads of a trial.
        stream: what brings the images to training.
    """

    out: str
    settings: dict[str, Any]
    study: dict[str, Any]
    leaving_epochs: tuple[int, ...]
    rungs: tuple[int, ...]
    fusion_weights: tuple[float, ...]
    textures: str | None
    device: str
    threads: int
    stream: StreamChoice = field(default_factory=lambda: StreamChoice("memory", ""))

    @property
    def detector_settings(self) -> DetectorSettings:
        return from_dict(DetectorSettings, self.settings)

    @property
    def study_settings(self) -> StudySettings:
        return from_dict(StudySettings, self.study)

    @property
    def stages(self) -> Path:
        return Path(self.out) / "stages"

    def _table(self, category: str, name: str) -> Path:
        return Path(self.out) / "tables" / f"{category}.{name}.parquet"

    def write_tables(self, category: str, table: pa.Table, validation: pa.Table) -> None:
        """Write what a trial may see (normals to fit and validate on, validation defects) apart from the test images."""
        for name, rows in (("train", table.filter(pa.compute.not_equal(table["split"], "test"))), ("test", rows_of(table, "test"))):
            write_table(self._table(category, name), rows)
        write_table(self._table(category, "validation"), validation)

    def train_table(self, category: str) -> pa.Table:
        """Normals of the splits ``fit`` and ``validation``."""
        return pq.read_table(self._table(category, "train"))

    def validation_table(self, category: str) -> pa.Table:
        """Validation normals and validation defects."""
        return pq.read_table(self._table(category, "validation"))

    def _finished(self, category: str, trials: list[dict[str, Any]]) -> tuple[Path, str]:
        """Where a category's result lies, and what it must rest on."""
        study = self.study_settings
        rests_on = [[trial["trial"] for trial in trials], study.selection, study.refine, list(study.objectives)]
        return Path(self.out) / "finished" / f"{category}.json", content_key(rests_on)

    def finished(self, category: str, trials: list[dict[str, Any]]) -> dict[str, Any] | None:
        """What the study said of a category with these finished trials before it was interrupted; None if it did not come so far."""
        path, rests_on = self._finished(category, trials)
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError):
            return None
        return content["result"] if content["rests_on"] == rests_on else None

    def keep_finished(self, category: str, trials: list[dict[str, Any]], result: dict[str, Any]) -> None:
        """Write down a category's result, for :meth:`finished`."""
        path, rests_on = self._finished(category, trials)
        write_json(path, {"rests_on": rests_on, "result": result})

    def unlock_test_table(self, category: str, purpose: str) -> pa.Table:
        """The test images, for after selection: the ledger says when and what for."""
        if pq.read_metadata(self._table(category, "test")).num_rows:
            note_unlocked(Path(self.out), category, purpose)
        return pq.read_table(self._table(category, "test"))


def write_table(path: Path, table: pa.Table) -> None:
    """Write Parquet, whole or not at all."""
    with written_whole(path) as draft:
        pq.write_table(table, draft)


def check_folder(out: Path, resume: bool) -> None:
    """Refuse a study's folder that holds other things, before the long work and without a trace.

    Raises:
        OutputError: it holds something and `resume` was not said, it holds no study to resume, or it can't be made.
    """
    check_place(out, folder=True)
    if not out.exists() or all(entry.name == ".lock" for entry in out.iterdir()):
        return
    if not resume:
        raise OutputError(f"{out} is in use: choose another --out, or say --resume to go on with the study in it.")
    if not (out / "study.json").is_file():
        raise OutputError(f"{out} holds no study to go on with: choose another --out.")


def claim_folder(out: Path, resume: bool) -> None:
    """Make the study's folder.

    Raises:
        OutputError: see :func:`check_folder`.
    """
    check_folder(out, resume)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out} can't be made ({error.strerror}): choose another --out.") from error
