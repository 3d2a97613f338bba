"""Reading ``request.json``, which the driver writes beside ``study.json`` (see run.py).

It repeats what a user asked for, so that ``--resume RUN`` is enough. It decides nothing: whether a
study goes on with the same data and settings is checked against ``study.json``.
"""

from __future__ import annotations

import json
from pathlib import Path

from clsnf.core.errors import OutputError
from clsnf.core.remote import RemoteFolder
from clsnf.core.uris import is_uri, without_secrets
from clsnf.results import StoredRequest, from_plain
from clsnf.study.remote_copy import REQUEST

_AGAIN = (
    "say what the study was begun with once more, --out {out} --resume with --data and all other "
    "options, and the file is made anew"
)


def read_request(out: Path | str) -> StoredRequest:
    """What was asked of the study in a folder.

    Args:
        out: the study's folder, or its URI.

    Raises:
        OutputError: there is no study, it is of an earlier version, or the file is damaged.
    """
    name = without_secrets(str(out)) if is_uri(out) else str(out)
    remedy = _AGAIN.format(out=name)
    content = _read(out, REQUEST)
    if content is None:
        if _read(out, "study.json") is None:
            raise OutputError(
                f"{name} holds no study to go on with: give the folder of one, or begin one with "
                "--out."
            )
        raise OutputError(
            f"The study in {name} does not say what was asked for (no {REQUEST}; earlier versions "
            f"did not write it): {remedy}."
        )
    try:
        plain = json.loads(content)
    except ValueError as error:
        raise OutputError(f"{REQUEST} in {name} is damaged ({error}): {remedy}.") from error
    return from_plain(StoredRequest, plain, f"{REQUEST} in {name}", remedy)


def _read(out: Path | str, name: str) -> bytes | None:
    """The bytes of a file in the study's folder; None where there is none."""
    if isinstance(out, str):
        return RemoteFolder(out).read(name)
    path = out / name
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise OutputError(f"{path} can't be read ({error.strerror}).") from error
