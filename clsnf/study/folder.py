"""A study's folder: its files, for the driver and for workers on other machines.

::

    summary.json             the results, category by category
    trials.parquet           every trial
    study.json               what the study is: settings, space, data
    request.json             what the user asked for, which --resume repeats
    optuna.journal           the trials while the study runs (unless another storage was named)
    optuna.journal.torn      what a killed process left after the last whole record of the journal
    winners/<category>/      the winning detector
    front/<category>/        the detectors on the Pareto front, with several objectives
    examples/<category>.png  pictures of the winner's answers
    validation/<category>/   the validation defects, in MVTec AD's layout
    evidence/<category>/     what a report needs (see evidence.py)
    finished/                each category's result, as soon as it is known
    ledger.jsonl             when the test images were unlocked, and for what
    tables/                  where the images of a category are
    stages/                  artifacts of training, found by content
    tracked.json             which runs the trackers (TensorBoard, MLflow, W&B) have
    tune/tensorboard/        the trials, for TensorBoard
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from clsnf.core.errors import OutputError
from clsnf.core.files import check_writable
from clsnf.core.hashing import content_key
from clsnf.core.ledger import record_unlock
from clsnf.core.patience import Patience
from clsnf.core.progress import Progress, silent
from clsnf.core.remote import RemoteFolder
from clsnf.core.uris import join_uri
from clsnf.data.sources import read_bytes
from clsnf.results import FinishedCategory, WinnerResult, read_result, write_result, write_table
from clsnf.study.lease_actor import ActorLeases, ActorNotes
from clsnf.study.progress_notes import FileNotes, Notes
from clsnf.study.remote_copy import JOURNAL, REQUEST, local_copy
from clsnf.training.artifacts import ArtifactStore
from clsnf.training.prepare import rows_of


@dataclass(frozen=True)
class StudyFolder:
    """The files of a study; it travels to the workers.

    Attributes:
        driver_path: the folder on the driver's machine, absolute. :attr:`path` is the one on the
            machine that asks.
        uri: of the study's folder where machines share no file system; None where they do. Each
            machine then works in a local copy.
        patience: seconds for which a remote folder that does not answer is waited for.
    """

    driver_path: str
    uri: str | None = None
    patience: float = 0.0

    @property
    def path(self) -> Path:
        """The study's folder on this machine."""
        if self.uri is None:
            return Path(self.driver_path)
        return local_copy(Path(self.driver_path).name)

    def location_of(self, name: str) -> str:
        """The path or URI under which a user finds the entry `name` of the study's folder."""
        return str(self.path / name) if self.uri is None else join_uri(self.uri, name)

    @property
    def _remote(self) -> RemoteFolder | None:
        return None if self.uri is None else RemoteFolder(self.uri, Patience(self.patience))

    def publish(self, *names: str) -> None:
        """Copy files and folders, as far as they exist, from this machine to the remote folder."""
        remote = self._remote
        if remote is not None:
            for name in names:
                if (self.path / name).exists():
                    remote.push(self.path / name, name)

    def fetch(self, name: str) -> Path:
        """The local path of a file or folder, copied from the remote folder where it is missing."""
        path, remote = self.path / name, self._remote
        if remote is not None and not path.exists():
            remote.pull(name, path)
        return path

    def _delete(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)
        if self._remote is not None:
            self._remote.delete(name)

    # ---- artifacts ----

    @property
    def leases(self) -> ActorLeases | None:
        """Leases for machines that share no file system; None where leases are files."""
        return None if self.uri is None else self._actor_leases(Patience(self.patience))

    def _actor_leases(self, patience: Patience) -> ActorLeases:
        return ActorLeases(Path(self.driver_path).name, patience)

    @property
    def notes(self) -> Notes:
        """The workers' notes for the driver."""
        if self.uri is None:
            return FileNotes(self.path)
        return ActorNotes(Path(self.driver_path).name)

    def artifacts(self, progress: Progress = silent) -> ArtifactStore:
        """The artifacts that the study's trials share.

        Args:
            progress: told where the store or the leases are waited for.
        """
        if self.uri is None:
            return ArtifactStore(self.path / "stages")
        patience = Patience(self.patience, lambda line: progress(line, 0, 1))
        remote = RemoteFolder(self.uri, patience).below("stages")
        return ArtifactStore(self.path / "stages", remote, self._actor_leases(patience))

    # ---- tables of images ----

    def write_train_table(self, category: str, table: pa.Table) -> None:
        """Write what a trial may see: the normals.

        While trials run, no file of the study says where the test images are.
        """
        for kind in ("test", "validation"):  # of an earlier run: the folder may have been moved
            self._delete(_table_name(category, kind))
        not_test = pa.compute.not_equal(table["split"], "test")
        self._write_table(category, "train", table.filter(not_test))

    def draw_validation_set(self, category: str, draw: Callable[[Path], pa.Table]) -> None:
        """Make a category's validation set where no process has made it yet.

        Args:
            category: its name.
            draw: makes the set in a folder, or finds it there, and returns its table.
        """
        name, table = f"validation/{category}", _table_name(category, "validation")
        with self.leases.hold(f"validation-{category}") if self.leases else nullcontext():
            if self.fetch(table).exists():
                return
            self.fetch(name)
            drawn = draw(self.path / name)
            self.publish(name)
            self._write_table(
                category, "validation", _relocated(drawn, self.path, Path(self.driver_path))
            )

    def write_test_table(self, category: str, table: pa.Table) -> None:
        """Write where the test images are, once no trial of the category will run any more."""
        self._write_table(category, "test", rows_of(table, "test"))

    def _write_table(self, category: str, kind: str, rows: pa.Table) -> None:
        name = _table_name(category, kind)
        write_table(self.path / name, rows)
        self.publish(name)

    def train_table(self, category: str) -> pa.Table:
        """Normals of the splits ``fit`` and ``validation``."""
        return pq.read_table(self.fetch(_table_name(category, "train")))

    def validation_table(self, category: str) -> pa.Table:
        """Validation normals and validation defects."""
        table = pq.read_table(self.fetch(_table_name(category, "validation")))
        self.fetch(f"validation/{category}")
        return _relocated(table, Path(self.driver_path), self.path)

    def unlock_test_table(self, category: str, purpose: str) -> pa.Table:
        """The test images, for use after selection; `purpose` goes into the ledger."""
        path = self.fetch(_table_name(category, "test"))
        if pq.read_metadata(path).num_rows:
            self._record_unlock(category, purpose)
        return pq.read_table(path)

    def _record_unlock(self, category: str, purpose: str) -> None:
        if self.uri is None or self.leases is None:
            record_unlock(self.path, category, purpose)
            return
        with self.leases.hold("ledger"):  # one file for all workers
            (self.path / "ledger.jsonl").unlink(missing_ok=True)
            self.fetch("ledger.jsonl")
            record_unlock(self.path, category, purpose)
            self.publish("ledger.jsonl")

    # ---- results of categories ----

    def read_finished(self, category: str, rests_on: str, test: str) -> WinnerResult | None:
        """The winner that the study found before it was interrupted.

        None where it did not come that far, where the file is damaged, or where a hash is not the
        stored one. The winner was then chosen from other trials or by another rule (`rests_on`),
        or evaluated on other images (`test`, by :func:`images_key`).
        """
        try:
            found = read_result(FinishedCategory, self.path / "finished" / f"{category}.json")
        except OutputError:
            return None
        same = found.rests_on == rests_on and found.test in (None, test)
        return found.result if same else None

    def write_finished(self, category: str, rests_on: str, result: WinnerResult, test: str) -> None:
        """Write a category's winner, for :meth:`read_finished`, and publish its files."""
        name = f"finished/{category}.json"
        write_result(self.path / name, FinishedCategory(rests_on, result, test))
        self.publish(
            f"winners/{category}",
            f"examples/{category}.png",
            f"front/{category}",
            f"evidence/{category}",
            name,  # last: where it is, all else is
        )


def images_key(table: pa.Table) -> str:
    """Hash of labelled images, whatever their places and order.

    Masks count by their contents.
    """
    columns = ("sha256", "label", "defect_type", "mask_path")
    rows = zip(*(table[name].to_pylist() for name in columns), strict=True)
    return content_key(
        sorted(
            [sha, label, kind or "", "" if mask is None else sha256(read_bytes(mask)).hexdigest()]
            for sha, label, kind, mask in rows
        )
    )


def _table_name(category: str, kind: str) -> str:
    return f"tables/{category}.{kind}.parquet"


def _relocated(table: pa.Table, before: Path, after: Path) -> pa.Table:
    """The table with paths below the folder `before` turned into paths below `after`."""
    if before == after:
        return table
    for name in ("path", "mask_path"):
        paths = [
            None if path is None else str(after / Path(path).relative_to(before))
            for path in table[name].to_pylist()
        ]
        column = pa.array(paths, table.schema.field(name).type)
        table = table.set_column(table.column_names.index(name), table.schema.field(name), column)
    return table


def check_folder(out: Path, resume: bool, name: str | None = None) -> None:
    """Refuse a folder that holds other things; nothing is written.

    Args:
        out: the study's folder.
        resume: whether to go on with a study in it.
        name: what the user calls the folder, for messages; `out` where None.

    Raises:
        OutputError: the folder holds something and `resume` is False, it holds no study to resume,
            or it can't be made.
    """
    check_writable(out, folder=True)
    if not out.exists() or all(_is_left_of_a_start(entry) for entry in out.iterdir()):
        return
    if not resume:
        raise OutputError(
            f"{name or out} is in use: choose another --out, or say --resume {name or out} to go "
            "on with the study in it."
        )
    if not (out / "study.json").is_file():
        raise OutputError(f"{name or out} holds no study to go on with: choose another --out.")


def _is_left_of_a_start(entry: Path) -> bool:
    """Whether an entry may be all that a process left which was killed before ``study.json``."""
    if entry.name == JOURNAL:
        return entry.stat().st_size == 0
    names = (".lock", REQUEST, f"{JOURNAL}.lock", "tracked.json")
    return entry.name in names or entry.suffix == ".part"


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
