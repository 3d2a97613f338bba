"""A study whose folder is remote (``--out s3://bucket/runs/night``).

Every machine works in a local copy, and none copies everything. The driver uploads what trials
start from and the study's state. Workers download that once, share artifacts through the remote
folder, and upload the winners.

A copy has a random name that is stored in ``study.json``. Another study at the same URI therefore
gets another copy, and no machine takes old files for new ones.
"""

from __future__ import annotations

import json
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from clsnf.core.errors import ClsnfError, OutputError
from clsnf.core.hashing import sha256_file
from clsnf.core.periodic import call_periodically
from clsnf.core.remote import RemoteFolder
from clsnf.core.uris import without_secrets

# What the driver needs to resume a study, and uploads while it runs.
STATE = (
    "request.json",
    "study.json",
    "optuna.journal",
    "optuna.journal.torn",
    "trials.parquet",
    "summary.json",
    "finished",
    "ledger.jsonl",
)
_EVERY = 5.0  # seconds between uploads of what has changed


def local_copy(name: str) -> Path:
    """Where the copy of this name is on this machine."""
    return Path(tempfile.gettempdir()) / name


def driver_copy(remote: RemoteFolder) -> Path:
    """Where the driver's copy of the study in a remote folder is; a new place for a new study.

    Raises:
        OutputError: the folder can't be read or written, or holds something that is no study.
    """
    content = remote.read("study.json")
    if content is None:
        if not remote.is_empty():
            raise OutputError(
                f"{without_secrets(remote.uri)} is in use, but holds no study to go on with: "
                "choose another --out."
            )
        remote.check_writable()
        return local_copy(f"clsnf-{secrets.token_hex(8)}")
    try:
        return local_copy(Path(json.loads(content)["copy"]).name)
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(
            f"study.json in {without_secrets(remote.uri)} is damaged ({error}): choose another "
            "--out."
        ) from error


def fetch_state(remote: RemoteFolder, copy: Path) -> None:
    """Download the study's state to this machine."""
    for entry in STATE:
        remote.pull(entry, copy / entry)


@contextmanager
def upload_state(remote: RemoteFolder | None, copy: Path) -> Iterator[None]:
    """Upload the study's state every few seconds while the block runs, and once at its end."""
    if remote is None:
        yield
        return
    uploaded: dict[str, str] = {}

    def upload() -> None:
        for entry in STATE:
            path = copy / entry
            # The ledger and the folder "finished" are uploaded by the workers that write them.
            if path.is_file() and entry != "ledger.jsonl":
                digest = sha256_file(path)
                if uploaded.get(entry) != digest:
                    remote.push(path, entry)
                    uploaded[entry] = digest

    def try_to_upload() -> None:
        # The network may fail for a moment: the next upload may succeed, and the last one must.
        with suppress(ClsnfError, OSError):
            upload()

    try:
        with call_periodically(try_to_upload, _EVERY):
            yield
    finally:
        upload()
