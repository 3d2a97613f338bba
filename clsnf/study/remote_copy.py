"""A study whose folder is remote (``--out s3://bucket/runs/night``): every machine works in a local
copy of what it needs.

Unusual: nobody mirrors everything. The driver passes on what trials start from and what came out;
    workers fetch that once, share stages
through the remote folder, and pass on the winners. A copy belongs to one study, not to its place:
another study at the same URI is another copy, so that nothing old is ever taken for new.
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

# What the driver needs to go on with a study, and keeps up to date while it runs.
STATE = (
    "study.json",
    "optuna.journal",
    "trials.parquet",
    "summary.json",
    "finished",
    "ledger.jsonl",
)
_EVERY = 5.0  # seconds between looks at what has changed


def local_copy(name: str) -> Path:
    """Where the copy of this name lies on this machine."""
    return Path(tempfile.gettempdir()) / name


def copy_of(remote: RemoteFolder) -> Path:
    """Where the driver's copy of the study in a remote folder lies, or of the one that is to begin
    there.

    Raises:
        OutputError: the folder can't be read or written, or holds something that is no study.
    """
    begun = remote.read("study.json")
    if begun is None:
        if not remote.is_empty():
            raise OutputError(
                f"{without_secrets(remote.uri)} is in use, but holds no study to go on with: "
                "choose another --out."
            )
        remote.check_writable()
        return local_copy(f"clsnf-{secrets.token_hex(8)}")
    try:
        return local_copy(Path(json.loads(begun)["copy"]).name)
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(
            f"study.json in {without_secrets(remote.uri)} is damaged ({error}): choose another "
            "--out."
        ) from error


def fetch_state(remote: RemoteFolder, copy: Path) -> None:
    """Bring what the study wrote down before to this machine."""
    for entry in STATE:
        remote.pull(entry, copy / entry)


@contextmanager
def kept_up(remote: RemoteFolder | None, copy: Path) -> Iterator[None]:
    """Pass on the study's state every few seconds while the block runs, and at its end, however it
    ends.
    """
    if remote is None:
        yield
        return
    sent: dict[str, str] = {}

    def send() -> None:
        for entry in STATE:
            path = copy / entry
            if (
                path.is_file() and entry != "ledger.jsonl"
            ):  # workers write the ledger, under a lease
                digest = sha256_file(path)
                if sent.get(entry) != digest:
                    remote.push(path, entry)
                    sent[entry] = digest

    def try_to_send() -> None:
        with suppress(
            ClsnfError, OSError
        ):  # a network that fails for a moment: the next look may succeed, the last one must
            send()

    try:
        with call_periodically(try_to_send, _EVERY):
            yield
    finally:
        send()
