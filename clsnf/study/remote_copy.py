"""A study whose folder is remote (``--out s3://bucket/runs/night``).

Every machine works in a local copy, and none copies everything. The driver uploads what trials
start from and the study's state. Workers download that once, share artifacts through the remote
folder, and upload the winners.

A copy has a random name that is stored in ``study.json``. Another study at the same URI therefore
gets another copy, and no machine takes old files for new ones. The driver deletes its copy when
all that is in it was uploaded, and no sooner: the Optuna journal in it may be the only one.
"""

from __future__ import annotations

import json
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clsnf.core.errors import ClsnfError, OutageError, OutputError
from clsnf.core.files import locked
from clsnf.core.hashing import sha256_file
from clsnf.core.patience import Patience, outage_line
from clsnf.core.periodic import call_periodically
from clsnf.core.remote import RemoteFolder
from clsnf.core.uris import without_secrets
from clsnf.study.driver_lease import DRIVER, DriverLease

REQUEST, JOURNAL = "request.json", "optuna.journal"
# What the driver needs to resume a study, and uploads while it runs.
STATE = (
    REQUEST,
    "study.json",
    JOURNAL,
    "optuna.journal.torn",
    "trials.parquet",
    "summary.json",
    "tracked.json",
    "finished",
    "ledger.jsonl",
)
_EVERY = 5.0  # seconds between uploads of what has changed


def local_copy(name: str) -> Path:
    """Where the copy of this name is on this machine."""
    return Path(tempfile.gettempdir()) / name


@dataclass
class DriverCopy:
    """The driver's copy of a remote study.

    Attributes:
        remote: the study's folder.
        path: of the copy.
        lease: on the remote folder.
        is_sent: whether the remote folder has all that is in the copy.
    """

    remote: RemoteFolder
    path: Path
    lease: DriverLease
    is_sent: bool = True
    _uploaded: dict[str, str] = field(default_factory=dict)  # entry -> its digest

    def upload(self) -> None:
        """Upload what changed.

        Raises:
            OutputError: another driver has taken the study over.
            OutageError: the remote folder does not answer.
        """
        if self.lease.is_lost:
            raise lease_lost(self.remote)
        for entry in STATE:
            path = self.path / entry
            # The ledger and the folder "finished" are uploaded by the workers that write them.
            if path.is_file() and entry != "ledger.jsonl":
                digest = sha256_file(path)
                if self._uploaded.get(entry) != digest:
                    self.remote.push(path, entry)
                    self._uploaded[entry] = digest


def lease_lost(remote: RemoteFolder) -> OutputError:
    """The error of a driver whose study was taken over."""
    return OutputError(
        f"Another driver has taken over the study in {without_secrets(remote.uri)}, because this "
        "one was not heard of for a while: this one ends."
    )


@contextmanager
def driver_copy(
    uri: str, resume: bool, patience: Patience, say: Callable[[str], None]
) -> Iterator[DriverCopy]:
    """Work in a copy of a remote study, and nobody else's; the copy is new for a new study.

    The state of the study is downloaded first. The copy is deleted at the end if it was uploaded.

    Args:
        uri: of the study's folder.
        resume: whether to go on with a study there.
        patience: with a remote folder that does not answer. A new study's has to answer at once:
            its URI may be wrong.
        say: gets a line where something takes long.

    Raises:
        OutputError: the folder can't be read or written, holds something that is no study, holds a
            study and `resume` is False, or another driver uses it right now.
    """
    remote, place = RemoteFolder(uri), without_secrets(uri)
    patient = remote.with_patience(patience)
    holds_study = (patient if resume else remote).read("study.json") is not None
    if holds_study and not resume:
        raise OutputError(
            f"{place} is in use: choose another --out, or say --resume {place} to go on with the "
            "study in it."
        )
    if not holds_study:
        if set(remote.names()) - {DRIVER}:
            raise OutputError(
                f"{place} is in use, but holds no study to go on with: choose another --out."
            )
        remote.check_writable()
    with DriverLease(remote, say).hold() as lease:
        path = _path_of_copy(patient)
        path.mkdir(parents=True, exist_ok=True)
        in_use = f"{place} is in use by another study right now, on this machine"
        with locked(path, f"{in_use}: choose another --out."):
            copy = DriverCopy(patient, path, lease)
            if not _is_ahead(copy):
                _fetch_state(patient, path)
            try:
                yield copy
            finally:
                if copy.is_sent:
                    shutil.rmtree(path, ignore_errors=True)


def _path_of_copy(remote: RemoteFolder) -> Path:
    content = remote.read("study.json")
    if content is None:
        return local_copy(f"clsnf-{secrets.token_hex(8)}")
    try:
        return local_copy(Path(json.loads(content)["copy"]).name)
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(
            f"study.json in {without_secrets(remote.uri)} is damaged ({error}): choose another "
            "--out."
        ) from error


def _is_ahead(copy: DriverCopy) -> bool:
    """Whether a copy that an earlier driver left here holds more trials than the remote folder.

    A journal only grows. If the remote one is the beginning of this one, nobody went on elsewhere.
    """
    local = copy.path / JOURNAL
    if not (copy.path / "study.json").is_file() or not local.is_file():
        return False
    here, there = local.read_bytes(), copy.remote.read(JOURNAL) or b""
    return len(here) > len(there) and here.startswith(there)


def _fetch_state(remote: RemoteFolder, copy: Path) -> None:
    for entry in STATE:
        remote.pull(entry, copy / entry)


@contextmanager
def upload_state(copy: DriverCopy, say: Callable[[str], None]) -> Iterator[None]:
    """Upload the study's state every few seconds while the block runs, and once at its end.

    Raises:
        OutageError: the last upload failed: the copy stays, and the message says where.
        OutputError: another driver has taken the study over.
    """
    impatient = DriverCopy(RemoteFolder(copy.remote.uri), copy.path, copy.lease)
    is_away = False

    def try_to_upload() -> None:
        nonlocal is_away
        try:
            impatient.upload()
        except (ClsnfError, OSError) as error:  # the next upload may succeed
            if not is_away and not copy.lease.is_lost:
                say(f"{outage_line(error)}: the study goes on, and its state is uploaded later")
            is_away = True
        else:
            if is_away:
                say(f"{without_secrets(copy.remote.uri)} answers again")
            is_away = False

    copy.is_sent = False
    try:
        with call_periodically(try_to_upload, _EVERY):
            yield
    finally:
        if copy.lease.is_lost:
            raise lease_lost(copy.remote)
        try:
            copy.upload()
        except OutageError as error:
            raise OutageError(
                f"{outage_line(error)}. What the study knows lies in {copy.path}: --resume on this "
                "machine uploads it."
            ) from error
        except KeyboardInterrupt as interrupt:
            raise KeyboardInterrupt(
                f"what the study knows lies in {copy.path}: --resume on this machine uploads it"
            ) from interrupt
        copy.is_sent = True


def remove_copies(name: str) -> None:
    """Delete the copies of this name on all nodes of the running Ray cluster."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    @ray.remote(num_cpus=0)
    def remove() -> None:
        shutil.rmtree(local_copy(name), ignore_errors=True)

    running: list[Any] = []
    for node in ray.nodes():
        if node["Alive"]:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            running.append(remove.options(scheduling_strategy=there).remote())
    with suppress(ray.exceptions.RayError):  # a node may go away: its files go with it, mostly
        ray.get(running, timeout=30)
