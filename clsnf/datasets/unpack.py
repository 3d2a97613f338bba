"""Unpacks archives that may be hostile: plain files and folders below one folder, or nothing.

There is a limit on what they unpack to. A name that is unsafe is refused, never repaired, and so is
a name that comes twice: what an archive contains must not depend on who unpacks it. Called by
:mod:`clsnf.datasets.download`.
"""

from __future__ import annotations

import lzma
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import IO

from clsnf.core.errors import DownloadError
from clsnf.core.progress import Progress, silent

_CHUNK = 1 << 20
_MEMBERS = 1_000_000  # the most entries; empty files would fill a disk too

# What the readers raise on a damaged archive.
_DAMAGE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    lzma.LZMAError,
    zlib.error,
    EOFError,
    NotImplementedError,
    ValueError,
)

# One entry: its name, whether it is a folder, its stated size, and what opens its bytes.
_Member = tuple[str, bool, int, Callable[[], IO[bytes] | None]]


def is_archive(path: Path) -> bool:
    """Whether a file is a tar (plain, gz, bz2, xz) or a zip."""
    return tarfile.is_tarfile(path) or zipfile.is_zipfile(path)


def unpack(archive: Path, folder: Path, limit: int, progress: Progress = silent) -> None:
    """Unpack a tar or zip into ``folder``, which is made; after an error the caller removes it.

    Args:
        limit: bytes that all files together may have.

    Raises:
        DownloadError: the archive is damaged or too large, or it holds a link, a device, or a name
            that is absolute, leaves the folder or comes twice.
        OSError: the disk can't be written, such as when it is full.
    """
    folder.mkdir(parents=True)
    task = f"unpack {archive.name.removesuffix('.part')} (files)"
    seen: dict[str, bool] = {}  # each name in lower case: whether it is a folder
    left = limit
    try:
        for name, is_folder, size, opened in _members(archive, folder):
            parts = _parts(archive, name)
            if not parts and is_folder:  # "./"
                continue
            # Two names that differ in case are one file on some disks.
            key = "/".join(parts).casefold()
            repeated = key in seen and not (is_folder and seen[key])
            if not parts or len(seen) >= _MEMBERS or repeated:
                raise _refused(archive, f"{name!r} comes twice, or there are too many entries")
            seen[key] = is_folder
            place = folder.joinpath(*parts)
            if is_folder:
                place.mkdir(parents=True, exist_ok=True)
                continue
            if size > left:
                raise _too_large(archive, limit)
            place.parent.mkdir(parents=True, exist_ok=True)
            source = opened()
            if source is None:
                raise _refused(archive, f"{name!r} has no content")
            with source, place.open("xb") as file:
                while chunk := source.read(_CHUNK):
                    left -= len(chunk)
                    if left < 0:
                        raise _too_large(archive, limit)
                    file.write(chunk)
            progress(task, len(seen), len(seen) + 1)
    except (FileExistsError, NotADirectoryError) as error:
        raise _refused(archive, "one name is a file and a folder") from error
    except _DAMAGE as error:
        raise _refused(archive, " ".join(str(error).split()) or "it is damaged") from error
    progress(task, len(seen), len(seen))


def _members(archive: Path, folder: Path) -> Iterator[_Member]:
    if zipfile.is_zipfile(archive) and not tarfile.is_tarfile(archive):
        with zipfile.ZipFile(archive) as zipped:
            for info in zipped.infolist():
                kind = stat.S_IFMT(info.external_attr >> 16)
                if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                    raise _refused(archive, f"{info.filename!r} is a link or a device")
                if info.flag_bits & 1:
                    raise _refused(archive, f"{info.filename!r} is encrypted")
                yield (
                    info.filename,
                    info.is_dir(),
                    info.file_size,
                    partial(zipped.open, info),
                )
    else:
        with tarfile.open(archive, "r:*") as tar:
            for member in tar:
                if not (member.isreg() or member.isdir()):
                    raise _refused(archive, f"{member.name!r} is a link or a device")
                _parts(archive, member.name)  # before the filter, which repairs some names
                tarfile.data_filter(member, str(folder))
                yield (
                    member.name,
                    member.isdir(),
                    member.size,
                    partial(tar.extractfile, member),
                )
                tar.members = []  # type: ignore[attr-defined]  # otherwise it keeps them all


def _parts(archive: Path, name: str) -> list[str]:
    """The parts of a member's name. Raises DownloadError if it is not plainly below the folder."""
    if (
        name.startswith("/")
        or PureWindowsPath(name).anchor
        or "\\" in name
        or "\0" in name
        or ".." in name.split("/")
    ):
        raise _refused(archive, f"the name {name!r} leaves the folder")
    return [part for part in name.split("/") if part not in ("", ".")]


def _refused(archive: Path, why: str) -> DownloadError:
    return DownloadError(f"{archive.name.removesuffix('.part')} is not unpacked: {why}.")


def _too_large(archive: Path, limit: int) -> DownloadError:
    return _refused(archive, f"it unpacks to more than the {limit} bytes that its source states")
