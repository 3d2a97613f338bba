"""The validation set of a study, on disk: the validation normals, and defects drawn on them.

The defects come from :mod:`clsnf.synthesis.validation_defects`. The set is a data set like any
other, in MVTec AD's layout at the size of the source images, so that a person can look at what
selects the winner:

    out/validation.json              what it was made from, and the sha256 of every file
    out/contact_sheet.png            some defects of each family
    out/test/good/*                  copies of the validation normals' files
    out/test/FAMILY/*.png            defects
    out/ground_truth/FAMILY/*_mask.png

A defect is a function of (seed, sha256 of the normal, family, index) and of one donor image; names
and places of files do not change it. The folder appears whole or not at all. A set that was made
from the same things is used again.
"""

from __future__ import annotations

import json
import shutil
import warnings
from bisect import bisect
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from filelock import FileLock

from clsnf.core.errors import DataError, ImageError, OutputError, SettingsError, nearest
from clsnf.core.files import atomic_write, write_json
from clsnf.core.hashing import content_key, sha256_file
from clsnf.core.progress import Progress, silent
from clsnf.data.images import read_image, write_image, write_mask
from clsnf.data.layouts import CATEGORY_SCHEMA, NORMAL_TYPE
from clsnf.data.sources import read_bytes
from clsnf.synthesis.brush import Bool, UInt8
from clsnf.synthesis.contact_sheet import write_contact_sheet
from clsnf.synthesis.object_mask import MASK_MODES, object_mask
from clsnf.synthesis.validation_defects import FAMILIES, GENERATOR_VERSION

_SMALLEST_PRODUCT = 0.01  # share of the image; an object mask below it has not found the product
_KIND = "clsnf validation set"


@dataclass(frozen=True)
class _Recipe:
    """What a validation set is made from.

    Attributes:
        normals: sha256 -> reference of each different validation normal, in the order of the
            hashes.
    """

    normals: dict[str, str]
    images_per_family: int
    seed: int
    mask_mode: str

    def content(self) -> dict[str, Any]:
        """The recipe as validation.json has it; names and places of files are no part of it."""
        return {
            "kind": _KIND,
            "generator": GENERATOR_VERSION,
            "seed": self.seed,
            "polarity": self.mask_mode,
            "families": list(FAMILIES),
            "images_per_family": self.images_per_family,
            "normals": list(self.normals),
        }

    def defects(self) -> dict[str, list[tuple[str, int]]]:
        """The defects to draw on each normal, by its sha256: (family, index) each."""
        defects: dict[str, list[tuple[str, int]]] = {sha: [] for sha in self.normals}
        for family in FAMILIES:
            # Each family has its own order of the normals. Adding a normal keeps the order of the
            # others.
            keys = {sha: content_key([self.seed, family, sha]) for sha in self.normals}
            order = sorted(keys, key=keys.__getitem__)
            for i in range(self.images_per_family):
                defects[order[i % len(order)]].append((family, i // len(order)))
        return defects


@dataclass(frozen=True)
class _Entry:
    """One image of the set, as validation.json lists it; paths are relative to the set's folder."""

    path: str
    sha256: str
    mask: str | None
    mask_sha256: str | None
    defect_type: str

    @classmethod
    def of(cls, root: Path, path: Path, mask: Path | None, defect_type: str) -> _Entry:
        """The entry of files that are written already."""
        return cls(
            path.as_posix(),
            sha256_file(root / path),
            mask.as_posix() if mask else None,
            sha256_file(root / mask) if mask else None,
            defect_type,
        )

    def is_intact(self, root: Path) -> bool:
        """Whether its files have the content that they were written with."""
        files = [(self.path, self.sha256)]
        if self.mask is not None and self.mask_sha256 is not None:
            files.append((self.mask, self.mask_sha256))
        return all(
            (root / path).is_file() and sha256_file(root / path) == sha for path, sha in files
        )


def write_validation_set(
    table: pa.Table,
    out: Path,
    *,
    images_per_family: int,
    seed: int,
    mask_mode: str = "off",
    threads: int | None = None,
    progress: Progress = silent,
) -> pa.Table:
    """Make the validation set of one category, or use the one that is there; return its table.

    Every family draws on the validation normals in turn, and takes donors from the others. Files
    of equal content count once.

    Args:
        table: the category's; its normals of split "validation" are used.
        out: the set's folder. A set that was made from other things, or is damaged, is replaced.
        images_per_family: defects of each family, 1 or more.
        mask_mode: where defects may lie, see :func:`clsnf.synthesis.object_mask.object_mask`;
            "off" is everywhere.
        threads: how many draw; None for Python's default.

    Returns:
        A table of ``CATEGORY_SCHEMA``, split "validation": the normals first, then the defects of
        each family with its name as ``defect_type``.

    Raises:
        DataError: there are no validation normals, or one's file was changed.
        SettingsError: a setting makes no sense.
        OutputError: ``out`` holds something else, which is left alone.
        ImageError: an image can't be read; the message has its name.
    """
    if images_per_family < 1:
        raise SettingsError(
            f"images_per_family is {images_per_family}: at least one image of each family is "
            "needed, such as 20."
        )
    if mask_mode not in MASK_MODES:
        raise SettingsError(f"mask_mode is {mask_mode!r}.{nearest(mask_mode, MASK_MODES)}")
    rows = [row for row in table.to_pylist() if row["split"] == "validation" and row["label"] == 0]
    if not rows:
        raise DataError(
            "The table has no validation normals to draw defects on: split the training normals "
            "first, or add some."
        )
    normals = dict(sorted((row["sha256"], row["path"]) for row in rows))
    recipe = _Recipe(normals, images_per_family, seed, mask_mode)
    as_table = partial(_as_table, category=rows[0]["category"])
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(out.parent / f".{out.name}.lock"):
        entries = _stored(out, recipe)
        if entries is None:
            _remove_drafts(out)
            with atomic_write(out) as draft:
                entries = _write(draft, recipe, threads, progress)
                write_contact_sheet(as_table(entries, draft), draft / "contact_sheet.png")
                images = [asdict(entry) for entry in entries]
                write_json(draft / "validation.json", {**recipe.content(), "images": images})
    return as_table(entries, out)


def _remove_drafts(out: Path) -> None:
    """Remove what a killed run left; under the lock, nobody else writes here."""
    for beside in out.parent.iterdir():
        if beside.name.startswith(f".{out.name}.") and beside.suffix in (".part", ".old"):
            shutil.rmtree(beside, ignore_errors=True)


def _stored(out: Path, recipe: _Recipe) -> list[_Entry] | None:
    """The entries of the set in ``out`` if it was made by ``recipe`` and is intact, else None.

    Raises:
        OutputError: ``out`` holds something that is no validation set.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        content = json.loads((out / "validation.json").read_text())
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict) or content.get("kind") != _KIND:
        raise OutputError(
            f"{out} holds something that is no validation set: name another folder or remove it."
        )
    images = content.pop("images")
    if content != recipe.content():
        return None
    entries = [_Entry(**image) for image in images]
    return entries if all(entry.is_intact(out) for entry in entries) else None


def _write(draft: Path, recipe: _Recipe, threads: int | None, progress: Progress) -> list[_Entry]:
    """Write all images and masks below ``draft``; the normals come first, then family by family."""
    for family in FAMILIES:
        (draft / "test" / family).mkdir(parents=True)
        (draft / "ground_truth" / family).mkdir(parents=True)
    (draft / "test" / NORMAL_TYPE).mkdir()
    defects = recipe.defects()

    def work(sha: str) -> list[_Entry]:
        return _write_normal(draft, recipe, sha, defects[sha])

    entries: list[_Entry] = []
    pool = ThreadPoolExecutor(threads)
    try:
        for done, written in enumerate(pool.map(work, recipe.normals), start=1):
            entries += written
            progress("validation defects", done, len(recipe.normals))
    finally:
        pool.shutdown(cancel_futures=True)
    rank = {name: i for i, name in enumerate([NORMAL_TYPE, *FAMILIES])}
    return sorted(entries, key=lambda entry: (rank[entry.defect_type], entry.path))


def _write_normal(
    draft: Path, recipe: _Recipe, sha: str, defects: Sequence[tuple[str, int]]
) -> list[_Entry]:
    """Write one normal and its defects, (family, index) each."""
    source = recipe.normals[sha]
    name = f"{Path(source).stem}-{sha[:8]}"
    copy = Path("test", NORMAL_TYPE, name + Path(source).suffix)
    (draft / copy).write_bytes(read_bytes(source))
    if sha256_file(draft / copy) != sha:
        raise DataError(
            f"{source} is not the file that the table was made from (its sha256 differs): read "
            "the data set again."
        )
    entries = [_Entry.of(draft, copy, None, NORMAL_TYPE)]
    if not defects:
        return entries
    image = read_image(source)
    product = _product_mask(image, recipe.mask_mode, source)
    for family, index in defects:
        key = content_key([recipe.seed, sha, family, index])
        rng = np.random.default_rng(int(key, 16))
        donors = _Donors(recipe.normals, sha, key)
        try:
            defective, mask = FAMILIES[family](image, product, donors, rng)
        except ImageError as error:
            raise ImageError(f"{source}: {error}") from error
        path = Path("test", family, f"{name}-{index}.png")
        mask_path = Path("ground_truth", family, f"{name}-{index}_mask.png")
        write_image(draft / path, defective)
        write_mask(draft / mask_path, mask)
        entries.append(_Entry.of(draft, path, mask_path, family))
    return entries


def _product_mask(image: UInt8, mask_mode: str, source: str) -> Bool:
    """Where defects may lie, bool (H, W).

    Everywhere if the mode is "off" or the object mask finds next to nothing, which is a warning.
    """
    everywhere = np.ones(image.shape[:2], bool)
    if mask_mode == "off":
        return everywhere
    product = object_mask(image, mask_mode)
    if product.mean() >= _SMALLEST_PRODUCT:
        return product
    warnings.warn(
        f"{source}: the object mask ({mask_mode}) finds no product; validation defects may lie "
        "anywhere on it.",
        stacklevel=2,
    )
    return everywhere


class _Donors(Sequence[UInt8]):
    """The one donor of a defect, read when it is asked for.

    Consistent hashing chooses it: the donor is the normal whose hash follows ``key``, so that
    adding a normal gives new donors to few defects.
    """

    def __init__(self, normals: dict[str, str], own: str, key: str) -> None:
        others = [sha for sha in normals if sha != own]
        self._paths = [normals[others[bisect(others, key) % len(others)]]] if others else []

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: Any) -> Any:
        return read_image(self._paths[index])


def _as_table(entries: Sequence[_Entry], root: Path, category: str) -> pa.Table:
    """The set that lies in ``root`` as a category's table."""
    rows = [
        {
            "path": str(root / entry.path),
            "split": "validation",
            "label": int(entry.defect_type != NORMAL_TYPE),
            "defect_type": entry.defect_type,
            "mask_path": str(root / entry.mask) if entry.mask else None,
            "sha256": entry.sha256,
            "category": category,
        }
        for entry in entries
    ]
    return pa.Table.from_pylist(rows, schema=CATEGORY_SCHEMA)
