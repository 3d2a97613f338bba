"""Files and folders that appear whole or not at all."""

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

from clsnf.core.errors import OutputError


@contextmanager
def _named_where_the_disk_is_full(path: Path) -> Iterator[None]:
    try:
        yield
    except (
        Exception
    ) as error:  # libraries wrap it in errors of their own, which have its text alone
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or os.strerror(
            errno.ENOSPC
        ) in str(error):
            raise OutputError(
                f"{path} can't be written, because the disk is full: make room, and go on with "
                "the same command."
            ) from error
        raise


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write a file or folder to; it takes its place when the block
    ends without an error.

    A folder that stands there already is replaced.

    Raises:
        OutputError: the disk is full; nothing of the draft is left, and what stood there before
            still does.
    """
    with _named_where_the_disk_is_full(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.part"
    try:
        with _named_where_the_disk_is_full(path):
            yield draft
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
    finally:
        if draft.is_dir():
            shutil.rmtree(draft, ignore_errors=True)
        else:
            draft.unlink(missing_ok=True)


def check_writable(path: Path, *, folder: bool) -> None:
    """Refuse a place for a folder (or else a file) that could not be written, before the long work
    and without a trace.

    Raises:
        OutputError: naming what is in the way.
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


def write_json(path: Path, content: Any) -> None:
    """Write readable JSON, whole or not at all; figures that are not finite are refused
    (ValueError).
    """
    with atomic_write(path) as draft:
        draft.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
