"""Lists folders of pictures: in natural order, without hidden entries, leaving no picture out.

Called by the layouts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from clsnf.core.errors import DataError
from clsnf.data.images import IMAGE_SUFFIXES

_FORMATS = "png, jpg, bmp, tif, webp, pnm"
# fmt: off
_UNREAD_PICTURES = (
    ".gif", ".heic", ".heif", ".avif", ".jp2", ".j2k", ".jxl", ".jfif", ".tga", ".pam", ".pfm",
    ".exr", ".hdr", ".psd", ".dcm", ".dng", ".raw", ".cr2", ".cr3", ".nef", ".arw", ".npy",
    ".npz",
)
# fmt: on


def existing_folder(folder: Path) -> Path:
    """The absolute path of a folder. Raises DataError if it does not exist."""
    if not folder.is_dir():
        raise DataError(
            f"{folder} {'is no folder' if folder.exists() else 'does not exist'}: give the folder "
            "that holds the data."
        )
    return folder.absolute()


def entries_in(folder: Path) -> list[Path]:
    """What a folder holds but hidden entries, in natural order; nothing if it does not exist."""
    try:
        entries = folder.iterdir() if folder.is_dir() else ()
        found = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(
            f"{folder} can't be listed ({error.strerror}): check its permissions."
        ) from error
    for entry in found:
        try:
            entry.name.encode()
        except UnicodeEncodeError:  # from an archive that was made with another character set
            raise DataError(
                f"{folder} holds the name {entry.name!r}, which is no UTF-8: rename it."
            ) from None
    return sorted(found, key=lambda entry: natural_key(entry.name))


def natural_key(name: str) -> tuple[list[str | int], str]:
    """A sorting key that puts 2 before 10 and ignores case.

    The name itself breaks ties (7 and 007).
    """
    # text, digits, text, ...: the same kind at the same place in every name
    parts = re.split(r"(\d+)", name.casefold())
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], name


def folders_in(folder: Path) -> list[Path]:
    """The folders directly in ``folder``."""
    return [entry for entry in entries_in(folder) if entry.is_dir()]


def pictures_in(folder: Path) -> list[Path]:
    """The pictures directly in ``folder``. Raises DataError if one would be left out."""
    files = [entry for entry in entries_in(folder) if not entry.is_dir()]
    unread = [entry.name for entry in files if entry.suffix.lower() in _UNREAD_PICTURES]
    if unread:
        raise DataError(
            f"{folder} holds pictures in a format that is not read: {first_names(unread)}: convert "
            "them to png or remove them."
        )
    return [entry for entry in files if is_picture(entry)]


def is_picture(path: Path) -> bool:
    """Whether a file has the name of a picture that is read."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def required_pictures(folder: Path) -> list[Path]:
    """The pictures of a folder that must have some. Raises DataError if it has none."""
    pictures = pictures_in(folder)
    if not pictures:
        others = [entry.name for entry in entries_in(folder)]
        only = f", only {first_names(others)}" if others else ""
        raise DataError(f"{folder} holds no pictures ({_FORMATS}){only}: put good pictures there.")
    return pictures


def first_names(names: Iterable[str], most: int = 5) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
