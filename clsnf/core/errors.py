"""The one family of errors that clsnf raises for things a user can mend.

Every door (command line, study, server) catches :class:`ClsnfError` and shows its text as one line;
anything else is a bug and keeps its traceback. A message says what was wrong, the value, what would
be valid, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ClsnfError(Exception):
    """Base of all errors that a user can mend; its text is one line."""


class SettingsError(ClsnfError):
    """A setting has a value that makes no sense, or a name that does not exist."""


class DataError(ClsnfError):
    """A data set is not what its layout promises: missing folders, masks without images,
    duplicates.
    """


class ImageError(DataError):
    """One image or mask file can't be read, is cut short, or has the wrong size."""


class PackError(DataError):
    """A pack is cut short, damaged, or has a shard of another schema."""


class WeightsError(ClsnfError):
    """Backbone weights are missing, can't be fetched, or belong to another architecture."""


class ModelError(ClsnfError):
    """A saved detector can't be loaded: files missing, damaged, or written by an incompatible
    version.
    """


class CheckpointError(ClsnfError):
    """A checkpoint of the method's authors can't be imported: damaged, incomplete, of another
    architecture, or holding unknown objects.
    """


class MetricError(ClsnfError, ValueError):
    """A figure is not defined for what it was given: one class only, NaN scores, no defect regions."""


class TrainingError(ClsnfError):
    """Training can't go on: a loss that is not finite, too few images."""


class DownloadError(ClsnfError):
    """A data set can't be fetched: no server answers, or what it gives is not what was promised."""


class OutputError(ClsnfError):
    """An output folder is in use, holds something else, or can't be written."""


_LISTED = 20  # valid names at most: timm alone has more than a thousand models


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest valid name, or the (first) valid names where
    none is close.
    """
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f" Did you mean {close[0]!r}?"
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f" Valid: {', '.join(names[:_LISTED])}{more}."
