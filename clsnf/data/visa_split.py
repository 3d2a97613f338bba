"""Reads VisA's split, ``split_csv/1cls.csv`` in the data set's root (Zou et al., ECCV 2022).

The whole file is checked whichever category is asked for: a split that is wrong in one place is
trusted nowhere. Called by :mod:`clsnf.data.layouts`.
"""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from clsnf.core.errors import DataError

SPLIT_FILE = Path("split_csv", "1cls.csv")

_COLUMNS = ["object", "split", "label", "image", "mask"]
_SPLITS = ("train", "test")
_LABELS = ("normal", "anomaly")


@dataclass(frozen=True)
class SplitRow:
    """One picture of the split.

    Attributes:
        split: train or test.
        label: normal or anomaly.
        image, mask: relative to the data set's root, and inside it; ``mask`` is "" without one.
    """

    category: str
    split: str
    label: str
    image: str
    mask: str


def read_split(root: Path) -> list[SplitRow]:
    """All rows of ``root / SPLIT_FILE``, in the file's order.

    Raises:
        DataError: the file is missing or no such CSV; or, with the line's number, an unknown split
            or label, an anomaly in train, a normal with a mask, a path that leaves the root, a file
            that is missing, or a picture that is listed twice.
    """
    path = root / SPLIT_FILE
    rows, seen = [], dict[str, int]()
    for line, fields in _lines(path):
        problem = _problem(root, fields)
        if problem is None:
            row = SplitRow(*fields)
            first = seen.setdefault(PurePosixPath(row.image).as_posix(), line)
            problem = None if first == line else f"{row.image!r} is listed in line {first} already"
        if problem is not None:
            raise DataError(
                f"{path}, line {line}: {problem}: take the file from VisA's release, or mend the "
                "line."
            )
        rows.append(row)
    return rows


def _lines(path: Path) -> list[tuple[int, list[str]]]:
    """(line number, fields) of every line below the header that is not empty. Raises DataError."""
    again = "take the file from VisA's release."
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            lines = [(reader.line_num, fields) for fields in reader if fields]
    except FileNotFoundError:
        raise DataError(
            f"{path} is missing, which says what trains and what tests in VisA's layout: {again}"
        ) from None
    except OSError as error:
        raise DataError(
            f"{path} can't be read ({error.strerror}): check its permissions."
        ) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"{path} is no CSV in UTF-8 ({' '.join(str(error).split())}): {again}"
        ) from error
    if not lines or lines[0][1] != _COLUMNS:
        raise DataError(f"{path} does not begin with the columns {','.join(_COLUMNS)}: {again}")
    return lines[1:]


def _problem(root: Path, fields: list[str]) -> str | None:
    """What is wrong with one row, taken by itself; None if it is right."""
    if len(fields) != len(_COLUMNS):
        return f"there are {len(fields)} fields and not {len(_COLUMNS)}"
    category, split, label, image, mask = fields
    if not category or category in (".", "..") or "/" in category or "\\" in category:
        return f"the object {category!r} is no name of a folder"
    for value, valid in ((split, _SPLITS), (label, _LABELS)):
        if value not in valid:
            return f"{value!r} is neither {valid[0]} nor {valid[1]}"
    if (split, label) == ("train", "anomaly"):
        return "an anomaly is in train, where only good pictures belong"
    if label == "normal" and mask:
        return f"the normal picture {image!r} has a mask"
    for name in (image, mask) if mask else (image,):
        if not _inside(name):
            return f"{name!r} leaves the data set's folder"
        if not os.path.isfile(root / name):
            return f"the file {name!r} is missing"
    return None


def _inside(name: str) -> bool:
    """Whether a relative name stays below its root, on this system or another."""
    return (
        not PurePosixPath(name).is_absolute()
        and not PureWindowsPath(name).anchor
        and ".." not in PureWindowsPath(name).parts
    )
