"""The errors that clsnf raises for problems that a user can solve.

Command line, study and server catch :class:`ClsnfError` and show its text as one line. Any other
exception is a bug and keeps its traceback. A message says what is wrong, the value, what is valid,
and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ClsnfError(Exception):
    """Base of all errors that a user can solve; its text is one line."""


class SettingsError(ClsnfError):
    """A setting has a value that is not valid, or a name that does not exist."""


class DataError(ClsnfError):
    """A data set does not have its layout: missing folders, masks without images, duplicates."""


class ImageError(DataError):
    """An image or mask file can't be read, is cut short, or has the wrong size."""


class PackError(DataError):
    """A pack is cut short or damaged, or a shard of it has another schema."""


class WeightsError(ClsnfError):
    """Backbone weights are missing, can't be downloaded, or belong to another architecture."""


class ModelError(ClsnfError):
    """A saved detector can't be loaded: missing or damaged files, or an incompatible version."""


class CheckpointError(ClsnfError):
    """A checkpoint of the method's authors can't be imported.

    It is damaged or incomplete, has another architecture, or holds unknown objects.
    """


class MetricError(ClsnfError, ValueError):
    """A metric is not defined for its input: one class only, NaN scores, no defect regions."""


class TrainingError(ClsnfError):
    """Training can't go on: the loss is not finite, or there are too few images."""


class DownloadError(ClsnfError):
    """A data set can't be downloaded: no server answers, or the file is not the expected one."""


class OutputError(ClsnfError):
    """An output folder is in use, holds something else, or can't be written."""


class OutageError(OutputError):
    """What the work needs is away for now, and the same work may succeed later.

    A disk without room, a store or a database that does not answer: see
    :mod:`clsnf.core.patience`.
    """


class DiskFullError(OutageError):
    """A disk has no room for a file."""


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


_LISTED = 20  # valid names that a message lists at most: timm has more than a thousand models


def nearest(name: str, valid: Iterable[str]) -> str:
    """``" Did you mean 'x'?"`` with the closest valid name; if none is close, the valid names."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f" Did you mean {close[0]!r}?"
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f" Valid: {', '.join(names[:_LISTED])}{more}."
