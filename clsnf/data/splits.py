"""Divides the normal training images into "fit" and "validation".

The hash of an image's content and the seed alone decide its side. So it stays on its side when
files are added, renamed or read in another order, and copies of one picture never lie on both
sides, however they were saved. A layout that names validation pictures of its own keeps them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import pyarrow as pa

from clsnf.core.errors import DataError, SettingsError

FIT, VALIDATION, TEST = "fit", "validation", "test"
MIN_FIT = 2  # one image shows no variation to learn
PIXELS = "pixels"  # the column of a checked table that is equal where the pictures' pixels are


def assign_splits(table: pa.Table, fraction: float, seed: int, *, minimum: int = 4) -> pa.Table:
    """A category's table with its training rows marked "fit" or "validation".

    Test rows and the order of the rows stay. Where the layout marked rows "validation", all rows
    keep their split. Rows of equal pixels are one picture; its content is that of its training file
    with the lowest hash. In a table that was not checked, equal bytes make one picture. The column
    of the pixels is dropped.

    An image goes to validation if the hash of (seed, content), a uniform number in [0, 1), is below
    ``fraction``. If that gives fewer than ``minimum`` different pictures to validate on, those with
    the lowest numbers join; if fewer than two stay to fit, those with the highest stay. So only the
    last few images of a small set can change sides when files are added.

    Args:
        fraction: the share to validate on, in (0, 1); kept on average.
        minimum: the least number of different pictures to validate on, 1 or more.

    Raises:
        DataError: there are fewer than ``minimum + 2`` different pictures, or of the layout's own
            splits fewer than 2 to fit or ``minimum`` to validate on.
        SettingsError: ``fraction`` or ``minimum`` is out of its range.
    """
    if not 0 < fraction < 1:
        raise SettingsError(
            f"The validation fraction is {fraction!r}: it must lie between 0 and 1, both excluded."
        )
    if minimum < 1:
        raise SettingsError(
            f"The least number of validation images is {minimum!r}: it must be 1 or more."
        )

    contents = _contents(table)
    if PIXELS in table.column_names:
        table = table.drop_columns([PIXELS])
    given = table["split"].to_pylist()
    if VALIDATION in given:
        _check_own_splits(given, contents, minimum, _name(table))
        return table
    training = {content for content, split in zip(contents, given, strict=True) if split != TEST}
    validation = _validation(training, fraction, seed, minimum, _name(table))
    splits = [
        TEST if split == TEST else VALIDATION if content in validation else FIT
        for split, content in zip(given, contents, strict=True)
    ]
    return table.set_column(
        table.schema.get_field_index("split"),
        table.schema.field("split"),
        pa.array(splits, pa.string()),
    )


def _contents(table: pa.Table) -> list[str]:
    """Each row's content: the lowest sha256 among the training files of the same picture.

    So a picture without copies has its own, and adding test files changes no side.
    """
    hashes: list[str] = table["sha256"].to_pylist()
    if PIXELS not in table.column_names:
        return hashes
    pictures = table[PIXELS].to_pylist()
    lowest: dict[str, str] = {}
    for sha, picture, split in zip(hashes, pictures, table["split"].to_pylist(), strict=True):
        if split != TEST:
            lowest[picture] = min(sha, lowest.get(picture, sha))
    return [lowest.get(picture, sha) for sha, picture in zip(hashes, pictures, strict=True)]


def _check_own_splits(splits: list[str], contents: list[str], minimum: int, name: str) -> None:
    """Refuse a layout's own splits with too few different pictures."""
    for split, folder, least in ((FIT, "train", MIN_FIT), (VALIDATION, "validation", minimum)):
        found = {c for c, given in zip(contents, splits, strict=True) if given == split}
        if len(found) < least:
            raise DataError(
                f"{name} has {len(found)} different good pictures in {folder}: at least {least} "
                "are needed: add good pictures, or move those of validation into train to have "
                "them divided by their share."
            )


def _validation(
    digests: Iterable[str], fraction: float, seed: int, minimum: int, name: str
) -> set[str]:
    """The contents to validate on."""
    position = {digest: _position(seed, digest) for digest in digests}
    if len(position) < minimum + MIN_FIT:
        raise DataError(
            f"{name} has {len(position)} different good pictures to learn from: at least "
            f"{minimum + MIN_FIT} are needed ({MIN_FIT} to fit, {minimum} to validate): add good "
            "pictures."
        )
    ranked = sorted(position, key=lambda digest: (position[digest], digest))
    below = sum(value < fraction for value in position.values())
    return set(ranked[: min(max(below, minimum), len(ranked) - MIN_FIT)])


def _position(seed: int, digest: str) -> float:
    """The place of a content in [0, 1): uniform over contents, independent between seeds."""
    mixed = hashlib.sha256(f"{seed}:{digest}".encode()).digest()
    return (int.from_bytes(mixed[:8], "big") >> 11) / 2**53  # 53 bits: exact in a float, never 1.0


def _name(table: pa.Table) -> str:
    return f"Category {table['category'][0].as_py()!r}" if table.num_rows else "The category"
