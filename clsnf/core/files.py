"""Writing files and folders so that they appear complete or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from clsnf.core.errors import DiskFullError, OutputError


@contextmanager
def _reporting_a_full_disk(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if is_disk_full(error) and not isinstance(error, DiskFullError):
            raise DiskFullError(
                f"{path} can't be written, because the disk is full: make room, and go on with "
                "the same command."
            ) from error
        raise


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that a disk, or a user's share of it, is full."""
    # Libraries wrap the system's error in their own, in which only its text is left.
    is_full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    return is_full or os.strerror(errno.ENOSPC) in str(error)


@contextmanager
def atomic_write(path: Path, durable: bool = False) -> Iterator[Path]:
    """Write a file or folder completely or not at all.

    The block writes to the path that it is given, which lies beside `path`. When the block ends,
    that file or folder is moved to `path`, and replaces what was there. After an error the draft is
    deleted and `path` is as it was.

    Args:
        path: where it shall be.
        durable: of a file: it is on the disk before it takes its place, so that a power cut leaves
            the old one or the new one. Without, it may leave an empty or half-written one.

    Raises:
        DiskFullError: the disk is full.
    """
    with _reporting_a_full_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.part"
    try:
        with _reporting_a_full_disk(path):
            yield draft
            if durable:
                _sync(draft)
        if draft.is_dir() and path.is_dir():
            old = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.old"
            path.rename(old)
            try:
                draft.rename(path)
            except OSError:
                old.rename(path)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(draft, path)
            if durable:
                _sync(path.parent)
    finally:
        if draft.is_dir():
            shutil.rmtree(draft, ignore_errors=True)
        else:
            draft.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


@contextmanager
def locked(folder: Path, in_use: str) -> Iterator[None]:
    """Keep other processes on this machine, or on a shared disk, out of a folder.

    Args:
        folder: which has to exist.
        in_use: what the error says where another process is in it.

    Raises:
        OutputError: another process is in it.
    """
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise OutputError(in_use) from error


def check_writable(path: Path, *, folder: bool) -> None:
    """Check before long work that a folder (or else a file) can be written to `path`.

    Nothing is written.

    Raises:
        OutputError: it can't be written; the message says why.
    """
    place = next(known for known in (path, *path.parents) if os.path.exists(known))
    if place == path and path.is_dir() != folder:
        raise OutputError(
            f"{path} is a {'file' if folder else 'folder'}: give the name of a "
            f"{'folder' if folder else 'file'}."
        )
    if place != path and not place.is_dir():
        raise OutputError(f"{path} can't be made, because {place} is a file: give another place.")
    if not os.access(place, os.W_OK | (os.X_OK if place.is_dir() else 0)):
        raise OutputError(
            f"{path} can't be written, because {place} is read-only: give another place."
        )


def write_json(path: Path, content: Any, durable: bool = False) -> None:
    """Write indented JSON, completely or not at all; `durable` as in :func:`atomic_write`.

    Raises:
        ValueError: a number is not finite.
        DiskFullError: the disk is full.
    """
    with atomic_write(path, durable) as draft:
        draft.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
