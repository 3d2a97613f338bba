"""Which saved detectors a folder holds: it is one, holds some, or is a study's with its winners."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from clsnf.core.errors import ModelError, SettingsError, nearest
from clsnf.detector_file import DESCRIPTION, TENSORS, read_description

_WINNERS = "winners"  # of a study's folder
_MOST_NAMED = 8


@dataclass(frozen=True)
class FoundDetectors:
    """The saved detectors of a folder.

    Attributes:
        folder: they lie in, or are: the given one, or the winners of a study.
        places: of each, by category, without links: what a link leads to may change under it.
        left_out: the cause, by name, for what lies there and is no saved detector.
    """

    folder: Path
    places: dict[str, Path]
    left_out: dict[str, str] = field(default_factory=dict)


def find_detectors(folder: Path) -> FoundDetectors:
    """The detectors that a folder holds: itself, those right in it, or those of its ``winners``.

    The name of a folder, or of a link to one, is the category; a single detector's category is the
    one that it was saved with. Links may lead anywhere: winners are often links to versions.

    Raises:
        SettingsError: it can't be read, or holds none.
        ModelError: it is a single detector, and damaged.
    """
    try:
        found = _found(folder)
    except OSError as error:
        raise SettingsError(
            f"{folder} can't be read as a folder of models ({error.strerror}): check the path."
        ) from error
    if not found.places:
        causes = "".join(f" {name!r} {cause}." for name, cause in list(found.left_out.items())[:3])
        raise SettingsError(
            f"{folder} holds no saved detectors: give a study's folder, its winners folder, or a "
            f"detector's.{causes}"
        )
    return found


def folder_of_detectors(folder: Path) -> Path:
    """The folder itself, or its ``winners`` if those are the only detectors of it."""
    try:
        found = _found(folder)
    except (OSError, ModelError):
        return folder
    return found.folder if found.places else folder


def find_detector(folder: Path, category: str | None = None) -> Path:
    """The one detector of a folder, or the one of a category.

    A folder without any detector is its own answer: loading it says what it lacks.

    Raises:
        SettingsError: it holds several and no category is given, or none of this category.
    """
    try:
        found = _found(folder)
    except (OSError, ModelError):
        return folder
    if category is None and len(found.places) > 1:
        names = [str(found.folder / name) for name in found.places]
        more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
        raise SettingsError(
            f"{folder} holds {len(names)} saved detectors: give the folder of one, such as "
            f"{', '.join(names[:_MOST_NAMED])}{more}."
        )
    if category is not None and found.places and category not in found.places:
        raise SettingsError(
            f"{folder} holds no detector of {category!r}.{nearest(category, list(found.places))}"
        )
    if not found.places or (folder / DESCRIPTION).is_file():
        return folder
    return found.folder / (category or next(iter(found.places)))


def _found(folder: Path) -> FoundDetectors:
    """As :func:`find_detectors`, but maybe without any. Raises OSError, ModelError."""
    if (folder / DESCRIPTION).is_file():
        category = read_description(folder).provenance.category or folder.name
        return FoundDetectors(folder, {category: folder.resolve()})
    found = _right_in(folder)
    if not found.places and (folder / _WINNERS).is_dir():
        return _right_in(folder / _WINNERS)
    return found


def _right_in(folder: Path) -> FoundDetectors:
    """The detectors right in a folder, which may be none. Raises OSError."""
    places: dict[str, Path] = {}
    left_out: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        name = path.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        try:
            cause = _cause_to_leave_out(path)
        except OSError as error:
            cause = f"can't be read ({error.strerror})"
        if cause is None:
            places[name] = path.resolve()
        elif cause:
            left_out[name] = cause
    return FoundDetectors(folder, places, left_out)


def _cause_to_leave_out(path: Path) -> str | None:
    """Why this is no category; empty for a file, which nobody expects to be one. Raises OSError."""
    if path.is_symlink() and not path.exists():
        return "is a link that leads nowhere"
    if not path.is_dir():
        return ""
    if _has_no_text(path.name):
        return "has a name that is no valid UTF-8"
    if not any((path / name).is_file() for name in (DESCRIPTION, TENSORS)):
        return "holds no saved detector"
    return None


def _has_no_text(name: str) -> bool:
    """Whether a name of the file system holds bytes that are no text."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return True
    return False
