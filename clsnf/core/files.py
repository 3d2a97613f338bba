"""Writing files and folders so that they appear complete or not at all."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import stat
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from clsnf.core.errors import DiskFullError, OutputError

_MOST_JSON = 64 * 2**20  # bytes
_setting_umask = threading.Lock()


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
    deleted and `path` is as it was. Others may read it as far as the umask lets them, whatever the
    library that wrote it thinks: safetensors and :mod:`tempfile` keep files to their owner.

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
            _open_to_others(draft)
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


def _open_to_others(draft: Path) -> None:
    """Give a file, or all that a folder holds, the rights that the umask leaves to new ones."""
    allowed = ~_umask()
    inside = draft.rglob("*") if draft.is_dir() and not draft.is_symlink() else ()
    for path in (draft, *inside):
        if path.is_symlink() or not path.exists():
            continue
        mode = stat.S_IMODE(path.stat().st_mode)
        wanted = mode | ((0o777 if path.is_dir() else 0o666) & allowed)
        if wanted != mode:
            with suppress(OSError):  # file systems without rights
                path.chmod(wanted)


def _umask() -> int:
    """The process's umask."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("Umask:")).split()[1], 8)
    except (OSError, StopIteration, ValueError):  # no Linux: it can only be read by setting it
        with _setting_umask:
            mask = os.umask(0o077)
            os.umask(mask)
            return mask


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


def read_json(path: Path) -> Any:
    """Read a JSON file that anybody may have written: of 64 MiB at most, with finite numbers.

    Raises:
        OSError: the file can't be read.
        ValueError: it is larger, no JSON, nested too deeply, or holds what no JSON can be made of.
    """
    with path.open("rb") as file:
        raw = file.read(_MOST_JSON + 1)
    if len(raw) > _MOST_JSON:
        raise ValueError(f"it has more than {_MOST_JSON // 2**20} MiB")
    try:
        content = json.loads(raw)
    except RecursionError as error:
        raise ValueError("its brackets are nested too deeply") from error
    _check_plain(content)
    return content


def _check_plain(content: object) -> None:
    """Check that all numbers are finite, and all texts valid. Raises ValueError with the place."""
    waiting: list[tuple[str, object]] = [("", content)]
    while waiting:
        where, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [(f"{where}.{key}".lstrip("."), item) for key, item in value.items()]
            waiting += [(where, key) for key in value]
        elif isinstance(value, list):
            waiting += [(f"{where}[{index}]", item) for index, item in enumerate(value)]
        elif isinstance(value, str):
            if not value.isascii():
                _check_text(where, value)
        elif isinstance(value, float):
            if not math.isfinite(value):
                raise ValueError(f"{where[-100:]} is {value}, no finite number")
        elif isinstance(value, int) and abs(value) > 2**63:
            raise ValueError(f"{where[-100:]} has too many digits")


def _check_text(where: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        place = where.encode("ascii", "backslashreplace").decode()[-100:]
        raise ValueError(f"{place or 'a text'} is no valid text") from error
