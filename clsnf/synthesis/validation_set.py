"""The validation set of a study, on disk: the validation normals, and defects of
:mod:`clsnf.synthesis.validation_defects` drawn on them.

Unusual: it is a data set like any other, in MVTec AD's layout at the images' own size, with a
    contact sheet, so that a
person can look at what selects the winner:

    out/validation.json              what it was made from, and the sha256 of every file
    out/contact_sheet.png            some of each family
    out/test/good/*                  the validation normals, their files' bytes as they are
    out/test/FAMILY/*.png            defects
    out/ground_truth/FAMILY/*_mask.png

Each defect is a function of (seed, sha256 of the normal, family, index) and of one donor image,
never of a file's name or place. The folder appears whole or not at all; a set made from the same
things is used again. Called by the study.
"""

from __future__ import annotations

import json
import shutil
import warnings
from bisect import bisect
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
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

Normals = dict[str, str]  # sha256 -> reference, in the order of the hashes
Entry = dict[
    str, Any
]  # one image of the set, as validation.json lists it; paths relative to the set's folder


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

    ``table`` is the category's; its normals of split "validation" are the grounds, which every
    family uses in turn, and each other's donors. Files of equal content count once. ``polarity``
    says where defects may lie, as in :func:`clsnf.synthesis.object_mask.object_mask`; "off" is
    everywhere. The result is a table of ``CATEGORY_SCHEMA``, split "validation", the normals first,
    then ``images_per_family`` defects of each family with its name as ``defect_type``. The contact
    sheet lies at ``out / "contact_sheet.png"``.

    A set in ``out`` that was made from other things, or is damaged, is replaced; anything else
    there is left alone (OutputError). Raises DataError without validation normals, SettingsError,
    ImageError with the name of an image that can't be read.
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
    recipe = {
        "kind": "clsnf validation set",
        "generator": GENERATOR_VERSION,
        "seed": seed,
        "polarity": mask_mode,
        "families": list(FAMILIES),
        "images_per_family": images_per_family,
        "normals": list(normals),
    }
    as_table = partial(_as_table, category=rows[0]["category"])
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(out.parent / f".{out.name}.lock"):
        entries = _stored(out, recipe)
        if entries is None:
            for beside in (
                out.parent.iterdir()
            ):  # what a killed run left: nobody else writes here under the lock
                if beside.name.startswith(f".{out.name}.") and beside.suffix in (".part", ".old"):
                    shutil.rmtree(beside, ignore_errors=True)
            with atomic_write(out) as draft:
                entries = _write(
                    draft, normals, images_per_family, seed, mask_mode, threads, progress
                )
                write_contact_sheet(as_table(entries, draft), draft / "contact_sheet.png")
                write_json(draft / "validation.json", {**recipe, "images": entries})
    return as_table(entries, out)


def _stored(out: Path, recipe: dict[str, Any]) -> list[Entry] | None:
    """The entries of the set in ``out`` if it was made by ``recipe`` and every file is as it was
    written, else None.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        content = json.loads((out / "validation.json").read_text())
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict) or content.get("kind") != recipe["kind"]:
        raise OutputError(
            f"{out} holds something that is no validation set: name another folder or remove it."
        )
    entries: list[Entry] = content.pop("images")
    if content != recipe:
        return None
    hashes = {entry["path"]: entry["sha256"] for entry in entries} | {
        entry["mask"]: entry["mask_sha256"] for entry in entries
    }
    hashes.pop(None, None)  # normals have no mask
    intact = all(
        (out / path).is_file() and sha256_file(out / path) == sha for path, sha in hashes.items()
    )
    return entries if intact else None


def _write(
    draft: Path,
    normals: Normals,
    per_family: int,
    seed: int,
    mask_mode: str,
    threads: int | None,
    progress: Progress,
) -> list[Entry]:
    """Write all images and masks below ``draft``; the entries, normals first, then family by
    family.
    """
    wanted: dict[str, list[tuple[str, int]]] = {sha: [] for sha in normals}
    for family in FAMILIES:
        (draft / "test" / family).mkdir(parents=True)
        (draft / "ground_truth" / family).mkdir(parents=True)
        # An order of its own for each family, that does not change for the others when a normal is
        # added.
        order = sorted(normals, key=lambda sha: content_key([seed, family, sha]))
        for i in range(per_family):
            wanted[order[i % len(order)]].append((family, i // len(order)))
    (draft / "test" / NORMAL_TYPE).mkdir()

    def work(sha: str) -> list[Entry]:
        return _write_ground(draft, normals, sha, wanted[sha], seed, mask_mode)

    entries: list[Entry] = []
    pool = ThreadPoolExecutor(threads)
    try:
        for done, written in enumerate(pool.map(work, normals), start=1):
            entries += written
            progress("validation defects", done, len(normals))
    finally:
        pool.shutdown(cancel_futures=True)
    rank = {name: i for i, name in enumerate([NORMAL_TYPE, *FAMILIES])}
    return sorted(entries, key=lambda entry: (rank[entry["defect_type"]], entry["path"]))


def _write_ground(
    draft: Path,
    normals: Normals,
    sha: str,
    wanted: Sequence[tuple[str, int]],
    seed: int,
    mask_mode: str,
) -> list[Entry]:
    """Write one normal and its defects, (family, index) each."""
    source = normals[sha]
    name = f"{Path(source).stem}-{sha[:8]}"
    copy = Path("test", NORMAL_TYPE, name + Path(source).suffix)
    (draft / copy).write_bytes(read_bytes(source))
    if sha256_file(draft / copy) != sha:
        raise DataError(
            f"{source} is not the file that the table was made from (its sha256 differs): read "
            "the data set again."
        )
    entries = [_entry(draft, copy, None, NORMAL_TYPE)]
    if not wanted:
        return entries
    image = read_image(source)
    where = _where(image, mask_mode, source)
    for family, index in wanted:
        key = content_key([seed, sha, family, index])
        rng = np.random.default_rng(int(key, 16))
        try:
            defective, mask = FAMILIES[family](image, where, _Donors(normals, sha, key), rng)
        except ImageError as error:
            raise ImageError(f"{source}: {error}") from error
        path = Path("test", family, f"{name}-{index}.png")
        mask_path = Path("ground_truth", family, f"{name}-{index}_mask.png")
        write_image(draft / path, defective)
        write_mask(draft / mask_path, mask)
        entries.append(_entry(draft, path, mask_path, family))
    return entries


def _where(image: UInt8, mask_mode: str, source: str) -> Bool:
    """Where defects may lie, (H, W): the product, or everywhere if the object mask is off or finds
    next to nothing.
    """
    everywhere = np.ones(image.shape[:2], bool)
    if mask_mode == "off":
        return everywhere
    where = object_mask(image, mask_mode)
    if where.mean() >= _SMALLEST_PRODUCT:
        return where
    warnings.warn(
        f"{source}: the object mask ({mask_mode}) finds no product; validation defects may lie "
        "anywhere on it.",
        stacklevel=2,
    )
    return everywhere


class _Donors(Sequence[UInt8]):
    """The one donor of a defect, read when it is asked for.

    Consistent hashing: the donor is the normal whose hash follows ``key``, so that adding a normal
    gives new donors to few defects.
    """

    def __init__(self, normals: Normals, ground: str, key: str) -> None:
        others = [sha for sha in normals if sha != ground]
        self._paths = [normals[others[bisect(others, key) % len(others)]]] if others else []

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: Any) -> Any:
        return read_image(self._paths[index])


def _entry(root: Path, path: Path, mask: Path | None, defect_type: str) -> Entry:
    return {
        "path": path.as_posix(),
        "sha256": sha256_file(root / path),
        "mask": mask.as_posix() if mask else None,
        "mask_sha256": sha256_file(root / mask) if mask else None,
        "defect_type": defect_type,
    }


def _as_table(entries: Sequence[Entry], root: Path, category: str) -> pa.Table:
    """The set that lies in ``root`` as a category's table."""
    rows = [
        {
            "path": str(root / entry["path"]),
            "split": "validation",
            "label": int(entry["defect_type"] != NORMAL_TYPE),
            "defect_type": entry["defect_type"],
            "mask_path": str(root / entry["mask"]) if entry["mask"] else None,
            "sha256": entry["sha256"],
            "category": category,
        }
        for entry in entries
    ]
    return pa.Table.from_pylist(rows, schema=CATEGORY_SCHEMA)
