"""A study on disk: where things lie, and what a trial on another machine must be told to do its
part.

<out>/summary.json            what came out, category by category
<out>/trials.parquet          every trial
<out>/optuna.journal          the same while the study runs, as Optuna studies (unless another
storage was named)
<out>/winners/<category>/     the winning detector
<out>/examples/<category>.png pictures of its answers
<out>/validation/<category>/  the validation defects, in MVTec AD's layout
<out>/evidence/<category>/    what a report needs: scores of every image, defects one by one, the
baseline, cases to look at
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

from clsnf.core.config import DetectorSettings, StudySettings, from_dict
from clsnf.core.errors import OutputError
from clsnf.core.files import atomic_write, check_writable, write_json
from clsnf.core.hashing import content_key
from clsnf.core.ledger import record_unlock
from clsnf.core.remote import RemoteFolder
from clsnf.core.uris import join_uri
from clsnf.streams.choice import StreamChoice
from clsnf.study.lease_actor import BookedLeases
from clsnf.study.remote_copy import local_copy
from clsnf.training.artifacts import ArtifactStore
from clsnf.training.prepare import rows_of


@dataclass(frozen=True)
class StudyPlan:
    """What every process of a study knows; plain types only, it travels to the workers.

    Attributes:
        out: the study's folder, absolute; a worker's own is :attr:`folder`.
        settings: :class:`DetectorSettings` as plain types.
        study: :class:`StudySettings` as plain types.
        leaving_epochs: numbers of joint epochs that some trial may ask for.
        rungs: epochs of the trunk at which trials are compared with others on their way.
        fusion_weights: what is swept at the end.
        textures: folder of texture pictures, or None.
        device: ``auto``, ``cpu``, ``cuda``, ``mps``.
        threads: CPU threads of a trial.
        stream: what brings the images to training.
        remote: URI of the study's folder where machines share no file system; `out` is then the
            driver's copy of it.
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
    remote: str | None = None

    @property
    def folder(self) -> Path:
        """The study's folder on this machine."""
        return Path(self.out) if self.remote is None else local_copy(Path(self.out).name)

    def place_of(self, name: str) -> str:
        """Where a person finds what lies at `name` in the study's folder."""
        return str(self.folder / name) if self.remote is None else join_uri(self.remote, name)

    def _fetch(self, name: str) -> Path:
        """A file or folder of the study on this machine, fetched where it is not there yet."""
        path = self.folder / name
        if self.remote is not None and not path.exists():
            RemoteFolder(self.remote).pull(name, path)
        return path

    def publish(self, *names: str) -> None:
        """Pass on files and folders of this machine's copy, as far as they are there."""
        if self.remote is not None:
            remote = RemoteFolder(self.remote)
            for name in names:
                if (self.folder / name).exists():
                    remote.push(self.folder / name, name)

    @property
    def leases(self) -> BookedLeases | None:
        """Leases for machines that share no file system; None where files do."""
        return None if self.remote is None else BookedLeases(Path(self.out).name)

    def store(self, scratch: Path | None = None) -> ArtifactStore:
        """The stages of the study, or those of one trial in a folder of its own."""
        if scratch is not None:
            return ArtifactStore(scratch)
        remote = None if self.remote is None else RemoteFolder(self.remote).below("stages")
        return ArtifactStore(self.folder / "stages", remote, self.leases)

    @property
    def detector_settings(self) -> DetectorSettings:
        return from_dict(DetectorSettings, self.settings)

    @property
    def study_settings(self) -> StudySettings:
        return from_dict(StudySettings, self.study)

    def _table(self, category: str, name: str) -> Path:
        return self._fetch(f"tables/{category}.{name}.parquet")

    def write_tables(self, category: str, table: pa.Table, validation: pa.Table) -> None:
        """Write what a trial may see: normals to fit and validate on, validation defects. Where the
        test images are, no trial can know.
        """
        self._discard(f"tables/{category}.test.parquet")  # of an earlier run
        self._write(category, "train", table.filter(pa.compute.not_equal(table["split"], "test")))
        self._write(category, "validation", validation)
        self.publish(f"validation/{category}")

    def write_test_table(self, category: str, table: pa.Table) -> None:
        """Write where the test images are, once no trial of the category will run any more."""
        self._write(category, "test", rows_of(table, "test"))

    def _write(self, category: str, name: str, rows: pa.Table) -> None:
        file = f"tables/{category}.{name}.parquet"
        write_table(self.folder / file, rows)
        self.publish(file)

    def _discard(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)
        if self.remote is not None:
            RemoteFolder(self.remote).delete(name)

    def train_table(self, category: str) -> pa.Table:
        """Normals of the splits ``fit`` and ``validation``."""
        return pq.read_table(self._table(category, "train"))

    def validation_table(self, category: str) -> pa.Table:
        """Validation normals and validation defects."""
        table = pq.read_table(self._table(category, "validation"))
        self._fetch(f"validation/{category}")
        return _moved(table, Path(self.out), self.folder)

    def _finished(self, category: str, trials: list[dict[str, Any]]) -> tuple[Path, str]:
        """Where a category's result lies, and what it must rest on."""
        study = self.study_settings
        rests_on = [
            [trial["trial"] for trial in trials],
            study.selection,
            study.refine,
            list(study.objectives),
        ]
        return self.folder / "finished" / f"{category}.json", content_key(rests_on)

    def finished(self, category: str, trials: list[dict[str, Any]]) -> dict[str, Any] | None:
        """What the study said of a category with these finished trials before it was interrupted;
        None if it did not come so far.
        """
        path, rests_on = self._finished(category, trials)
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError):
            return None
        return content["result"] if content["rests_on"] == rests_on else None

    def keep_finished(
        self, category: str, trials: list[dict[str, Any]], result: dict[str, Any]
    ) -> None:
        """Write down a category's result, for :meth:`finished`."""
        path, rests_on = self._finished(category, trials)
        write_json(path, {"rests_on": rests_on, "result": result})
        for name in (
            f"winners/{category}",
            f"examples/{category}.png",
            f"front/{category}",
            f"evidence/{category}",
        ):
            self.publish(name)
        self.publish(f"finished/{category}.json")  # last: with it, all is there

    def unlock_test_table(self, category: str, purpose: str) -> pa.Table:
        """The test images, for after selection: the ledger says when and what for."""
        if pq.read_metadata(self._table(category, "test")).num_rows:
            self._note_unlocked(category, purpose)
        return pq.read_table(self._table(category, "test"))

    def _note_unlocked(self, category: str, purpose: str) -> None:
        if self.remote is None or self.leases is None:
            record_unlock(self.folder, category, purpose)
            return
        with self.leases.hold("ledger"):  # one file for all workers
            (self.folder / "ledger.jsonl").unlink(missing_ok=True)
            self._fetch("ledger.jsonl")
            record_unlock(self.folder, category, purpose)
            self.publish("ledger.jsonl")


def _moved(table: pa.Table, before: Path, now: Path) -> pa.Table:
    """The table with the paths below one folder led to another."""
    if before == now:
        return table
    for name in ("path", "mask_path"):
        moved = [
            None if path is None else str(now / Path(path).relative_to(before))
            for path in table[name].to_pylist()
        ]
        table = table.set_column(
            table.column_names.index(name),
            table.schema.field(name),
            pa.array(moved, table.schema.field(name).type),
        )
    return table


def write_table(path: Path, table: pa.Table) -> None:
    """Write Parquet, whole or not at all."""
    with atomic_write(path) as draft:
        pq.write_table(table, draft)


def check_folder(out: Path, resume: bool, name: str | None = None) -> None:
    """Refuse a study's folder that holds other things, before the long work and without a trace.
    `name` is what a person calls it.

    Raises:
        OutputError: it holds something and `resume` was not said, it holds no study to resume, or
            it can't be made.
    """
    check_writable(out, folder=True)
    if not out.exists() or all(entry.name == ".lock" for entry in out.iterdir()):
        return
    if not resume:
        raise OutputError(
            f"{name or out} is in use: choose another --out, or say --resume to go on with the "
            "study in it."
        )
    if not (out / "study.json").is_file():
        raise OutputError(f"{name or out} holds no study to go on with: choose another --out.")


def claim_folder(out: Path, resume: bool) -> None:
    """Make the study's folder.

    Raises:
        OutputError: see :func:`check_folder`.
    """
    check_folder(out, resume)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{out} can't be made ({error.strerror}): choose another --out."
        ) from error
