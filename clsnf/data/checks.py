"""Checks a category before the long work starts: reads every file once, and compares them.

Problems are collected, not raised one by one: a message names the first few and counts the rest.
What makes metrics wrong or stops the work is an error. What only makes them doubtful is a warning
in the report. A few unreadable pictures among very many are no reason to stop: up to a share of
``max_bad`` they are left out, and named in the report.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from clsnf.core.errors import DataError, ImageError, SettingsError
from clsnf.data.images import read_image, read_mask
from clsnf.data.layouts import notes_of
from clsnf.data.splits import PIXELS, TEST, VALIDATION

MAX_BAD = 0.01  # share of a category's pictures that may be unreadable
_MOST_SHOWN = 5
_DARK = 16  # 12-bit values in a 16-bit file reach 15 of 255
# Shares of a picture that its mask marks. A defect that fills a picture marks all of it, which an
# inverted mask never does. Defects that leave less than half of it are rare: many are a mistake.
_MOST, _NEARLY_ALL = 0.5, 0.9
_SPLIT_NAMES = {TEST: "test", VALIDATION: "validation"}


@dataclass(frozen=True)
class CheckReport:
    """What a category that passed the check holds.

    Attributes:
        images, masks: numbers of those that were read.
        warnings: one line each.
        table: the rows whose pictures can be read, with a column of the pictures' pixels for
            :func:`clsnf.data.splits.assign_splits`.
        skipped: the path of every other picture, and why it can't be read.
    """

    images: int
    masks: int
    warnings: tuple[str, ...]
    table: pa.Table = field(compare=False)
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Finding:
    """What one row's files showed.

    Attributes:
        problem: one line, or None.
        unreadable: whether the image or mask can't be read.
        size: of the image, (height, width).
        brightest: the image's highest value, 0 to 255.
        digest: a hash of the image's size and pixels.
        marked: the share of the image that its mask marks, in (0, 1]; None without a mask.
    """

    problem: str | None = None
    unreadable: bool = False
    size: tuple[int, int] = (0, 0)
    brightest: int = 0
    digest: str = ""
    marked: float | None = None


def check_category(
    table: pa.Table,
    *,
    allow_leak: bool = False,
    max_bad: float = MAX_BAD,
    progress: Callable[[int, int], None] | None = None,
) -> CheckReport:
    """Read all images and masks of one category's table and compare them.

    Pictures are the same if their pixels are, however they were saved.

    Args:
        allow_leak: warn of pictures that lie in two of train, validation and test, instead of
            raising.
        max_bad: the share of the pictures, in [0, 1), that may be unreadable; these are left out of
            the report's table.
        progress: called as ``progress(done, total)`` after each image, from the calling thread.

    Raises:
        ImageError: more images or masks are unreadable or truncated, a defect has no mask, or a
            mask has another size than its image or no defect pixel.
        DataError: pictures lie in two of train, validation and test, or are both good and defect.
            Every message is one line that names the files and what to do.
        SettingsError: ``max_bad`` is out of its range.
    """
    if not 0 <= max_bad < 1:
        raise SettingsError(
            f"--max-bad is {max_bad!r}: it must be a share from 0 to below 1, such as 0.01."
        )
    rows = table.to_pylist()
    if not any(row["split"] != TEST for row in rows):
        raise DataError(
            "The category has no training images: put good pictures into its train folder."
        )
    name = f"Category {rows[0]['category']!r}"
    findings = _read_rows(rows, progress)
    _raise_problems(name, findings, max_bad)

    readable = [not finding.unreadable for finding in findings]
    skipped = {
        row["path"]: str(finding.problem)
        for row, finding in zip(rows, findings, strict=True)
        if finding.unreadable
    }
    kept = table.filter(pa.array(readable))
    rows = kept.to_pylist()
    findings = [finding for finding in findings if not finding.unreadable]
    kept = kept.append_column(PIXELS, pa.array([finding.digest for finding in findings]))

    copies = _find_copies(rows, findings)
    if copies.contradictions:
        raise DataError(_one_line(name, "contradiction", copies.contradictions))
    warnings = [f"{name}: {note}" for note in notes_of(table)]
    if skipped:
        named = _one_line(name, "unreadable picture", list(skipped.values()))
        warnings.append(f"{len(skipped)} of the {len(table)} pictures are left out. {named}")
    if copies.leaks:
        leaks = _one_line(name, "leak", copies.leaks)
        if not allow_leak:
            raise DataError(f"{leaks} Remove one of each pair, or allow it with --allow-leak.")
        warnings.append(leaks)
    warnings += _doubts(name, rows, findings, copies.repeats)
    warnings += _mask_doubts(name, rows, findings)
    masks = sum(row["mask_path"] is not None for row in rows)
    return CheckReport(len(rows), masks, tuple(warnings), kept, skipped)


def _read_rows(
    rows: list[dict[str, Any]], progress: Callable[[int, int], None] | None
) -> list[_Finding]:
    """Read all files of the rows, in threads."""
    findings: list[_Finding] = []
    with ThreadPoolExecutor() as pool:
        for finding in pool.map(_read_row, rows):
            findings.append(finding)
            if progress is not None:
                progress(len(findings), len(rows))
    return findings


def _raise_problems(name: str, findings: list[_Finding], max_bad: float) -> None:
    """Raise an ImageError for what is wrong with single files.

    Unreadable pictures count if they are more than a share of ``max_bad``.
    """
    unreadable = sum(finding.unreadable for finding in findings)
    too_many = unreadable > max_bad * len(findings)
    problems = [
        finding.problem
        for finding in findings
        if finding.problem and (too_many or not finding.unreadable)
    ]
    if not problems:
        return
    message = _one_line(name, "problem", problems)
    # In a small folder a single one is too many: that needs no explanation.
    if too_many and len(findings) * max_bad >= 1:
        message += (
            f" That is {unreadable} of {len(findings)} pictures, more than --max-bad {max_bad:g}."
        )
    raise ImageError(message)


# ---- one file ----


def _read_row(row: dict[str, Any]) -> _Finding:
    """Read a row's image and mask in full."""
    path, mask_path = row["path"], row["mask_path"]
    try:
        image = read_image(path)
        mask = None if mask_path is None else read_mask(mask_path)
    except ImageError as error:
        return _Finding(str(error), unreadable=True)
    size = image.shape[:2]
    problem = None if mask is None else _mask_problem(mask_path, mask, size)
    if row["label"] and mask is None:
        place = f"ground_truth/{row['defect_type']}/{Path(path).stem}_mask.png"
        problem = f"{path} shows a defect but has no mask: add {place}, or remove the image."
    digest = hashlib.sha256(f"{_size(size)}:".encode())
    digest.update(image.data)
    marked = None if mask is None else float(mask.mean())
    return _Finding(problem, False, size, int(image.max()), digest.hexdigest(), marked)


def _mask_problem(mask_path: str, mask: NDArray[np.bool_], size: tuple[int, int]) -> str | None:
    if mask.shape != size:
        return (
            f"{mask_path} has the size {_size(mask.shape)}, its image {_size(size)}: draw the "
            "mask at the image's size."
        )
    if not mask.any():
        return (
            f"{mask_path} marks no pixel: draw the defect, or move the image to the good ones and "
            "remove the mask."
        )
    return None


def _size(size: tuple[int, ...]) -> str:
    """Width x height, the order in which cameras and viewers give it."""
    return f"{size[1]}x{size[0]}"


# ---- files together ----


@dataclass
class _Copies:
    """Pairs of the same picture, one text each.

    Attributes:
        leaks: they are in two of train, validation and test.
        contradictions: one is good, the other a defect.
        repeats: both are in the same split.
    """

    leaks: list[str] = field(default_factory=list)
    contradictions: list[str] = field(default_factory=list)
    repeats: list[str] = field(default_factory=list)


def _find_copies(rows: list[dict[str, Any]], findings: list[_Finding]) -> _Copies:
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row, finding in zip(rows, findings, strict=True):
        groups[finding.digest].append(row)

    copies = _Copies()
    for group in groups.values():
        first = group[0]
        for other in group[1:]:
            pair = f"{first['path']} and {other['path']}"
            if first["split"] != other["split"]:
                places = [_SPLIT_NAMES.get(row["split"], "train") for row in (first, other)]
                copies.leaks.append(f"{pair} are the same picture, in {' and in '.join(places)}.")
            elif first["label"] != other["label"]:
                copies.contradictions.append(
                    f"{pair} are the same picture, once good and once a defect: remove one."
                )
            else:
                copies.repeats.append(f"{pair} are the same picture.")
    return copies


def _doubts(
    name: str, rows: list[dict[str, Any]], findings: list[_Finding], repeats: list[str]
) -> list[str]:
    """Warnings: what makes metrics doubtful but not wrong."""
    warnings = [_one_line(name, "repetition", repeats)] if repeats else []
    sizes = Counter(finding.size for finding in findings)
    if len(sizes) > 1:
        listed = [f"{_size(size)} ({count} images)" for size, count in sizes.most_common()]
        warnings.append(
            f"{name} mixes {len(sizes)} image sizes: {', '.join(listed[:_MOST_SHOWN])}: are all "
            "of one camera and crop?"
        )
    brightest = max(finding.brightest for finding in findings)
    if brightest < _DARK:
        warnings.append(
            f"{name} has no pixel above {brightest} of 255: if 10 or 12 bits of a camera lie in "
            "16-bit files, scale them up."
        )
    lossy = [
        row["mask_path"]
        for row in rows
        if row["mask_path"] and Path(row["mask_path"]).suffix.lower() in (".jpg", ".jpeg")
    ]
    if lossy:
        warnings.append(
            f"{name} has {len(lossy)} masks in JPEG, whose noise counts as defect: save masks as "
            f"PNG ({lossy[0]})."
        )
    return warnings


def _mask_doubts(name: str, rows: list[dict[str, Any]], findings: list[_Finding]) -> list[str]:
    """Warnings of masks that seem inverted.

    The rule: more than half of the masks mark most of their picture, yet not all of it. Where it
    does not hold, single masks that mark nearly all of their picture are named.
    """
    shares = {
        row["mask_path"]: finding.marked
        for row, finding in zip(rows, findings, strict=True)
        if finding.marked is not None
    }
    most = {path: share for path, share in shares.items() if _MOST < share < 1}
    if 2 * len(most) > len(shares):
        widest = max(most, key=most.__getitem__)
        return [
            f"{name} probably has inverted masks: {len(most)} of {len(shares)} mark more than "
            f"{_MOST:.0%} of their picture ({widest}: {_floored(most[widest])}): pixels that are "
            "not zero are defect; if the good part is marked, invert them."
        ]
    texts = [
        f"{path} marks {_floored(share)} of its picture: if the good part is marked, invert it."
        for path, share in most.items()
        if share > _NEARLY_ALL
    ]
    return [_one_line(name, "mask of nearly the whole picture", texts)] if texts else []


def _floored(share: float) -> str:
    """A share below 1 in per cent, never rounded up to 100 %."""
    return f"{math.floor(1000 * share) / 10:g} %"


def _one_line(name: str, kind: str, texts: list[str]) -> str:
    """The first texts on one line, and how many there are."""
    if len(texts) == 1:
        return f"{name}: {texts[0]}"
    more = f" ... and {len(texts) - _MOST_SHOWN} more." if len(texts) > _MOST_SHOWN else ""
    return f"{name} has {len(texts)} {kind}s: {' '.join(texts[:_MOST_SHOWN])}{more}"
