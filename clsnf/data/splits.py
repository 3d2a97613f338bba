"""Divides the normal training images into "fit" and "validation".

The hash of an image's content and the seed alone decide its side. So it stays on its side when
files are added, renamed or read in another order, and copies of one file never lie on both sides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.compute as pc

from clsnf.core.errors import DataError, SettingsError

FIT, VALIDATION, TEST = "fit", "validation", "test"
MIN_FIT = 2  # one image shows no variation to learn


def assign_splits(table: pa.Table, fraction: float, seed: int, *, minimum: int = 4) -> pa.Table:
    """A category's table with its training rows marked "fit" or "validation".

    Test rows and the order of the rows stay. An image goes to validation if the hash of (seed,
    content), a uniform number in [0, 1), is below ``fraction``. If that gives fewer than
    ``minimum`` different files to validate on, those with the lowest numbers join; if fewer than
    two stay to fit, those with the highest stay. So only the last few images of a small set can
    change sides when files are added.

    Args:
        fraction: the share to validate on, in (0, 1); kept on average.
        minimum: the least number of different files to validate on, 1 or more.

    Raises:
        DataError: there are fewer than ``minimum + 2`` different files.
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

    training = table.filter(pc.not_equal(table["split"], TEST))
    validation = _validation(
        training["sha256"].unique().to_pylist(), fraction, seed, minimum, _name(table)
    )
    splits = [
        TEST if split == TEST else VALIDATION if digest in validation else FIT
        for split, digest in zip(
            table["split"].to_pylist(), table["sha256"].to_pylist(), strict=True
        )
    ]
    return table.set_column(
        table.schema.get_field_index("split"),
        table.schema.field("split"),
        pa.array(splits, pa.string()),
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
