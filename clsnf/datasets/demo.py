"""The demo data set: three products drawn by code in MVTec AD's layout.

Each has good pictures, defective ones and exact masks. Studies, tests and benchmarks that were
given no data use it. Nothing here or in ``clsnf/datasets/products/`` is shared with the code that
makes defects for training or validation: a test defect is a change of the product's own geometry,
of a kind that no detector has seen before it is evaluated.

A new product is one file in ``clsnf/datasets/products/`` and one line in :data:`PRODUCTS`.
"""

from __future__ import annotations

import json
import os
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clsnf.core.errors import OutputError, SettingsError, nearest
from clsnf.data.images import write_image, write_mask
from clsnf.datasets.drawing import Product
from clsnf.datasets.products import blister, fabric, gear

PRODUCTS: dict[str, Product] = {
    "blister": blister.PRODUCT,  # repeating pattern
    "fabric": fabric.PRODUCT,  # texture
    "gear": gear.PRODUCT,  # object on a background
}
# Raise it with any change to what is drawn. A data set of another version is not used as this one.
VERSION = 1
MANIFEST = "demo.json"


def write_demo(
    root: Path,
    seed: int = 0,
    *,
    categories: Sequence[str] | None = None,
    train: int = 96,
    good: int = 12,
    defective: int = 8,
) -> list[str]:
    """Make the demo data set in the folder ``root``, or use the one that is there.

    At its full size this takes about 20 s on one core. A picture depends on the seed, its category,
    its folder and its number alone: asking for fewer pictures or categories does not change the
    others. The bytes are the same for the same versions of numpy, OpenCV and Pillow. The data set
    is there whole or not at all. A whole one of the same seed, version and size is used as it is.

    Args:
        root: the data set's folder; it must not exist, be empty, or hold what this call would
            write.
        seed: from 0 up; another seed gives other pictures.
        categories: which products to draw; all of :data:`PRODUCTS` by default.
        train: number of good training pictures a category.
        good: number of good test pictures a category.
        defective: number of test pictures for each of a category's defect types.

    Returns:
        the categories' names, sorted: the folders below ``root``.

    Raises:
        SettingsError: an unknown category, a negative seed, or a number of pictures below 1.
        OutputError: ``root`` holds something else, another demo data set or a part of one, or can't
            be written.
    """
    names = sorted(PRODUCTS if categories is None else set(categories))
    for name in names:
        if name not in PRODUCTS:
            raise SettingsError(f"There is no demo category {name!r}.{nearest(name, PRODUCTS)}")
    recipe: dict[str, Any] = {
        "version": VERSION,
        "seed": seed,
        "train": train,
        "good": good,
        "defective": defective,
        "categories": names,
    }
    for key, lowest in (("seed", 0), ("train", 1), ("good", 1), ("defective", 1)):
        value = recipe[key]
        if not isinstance(value, int) or value < lowest:
            raise SettingsError(
                f"The demo data set's {key} is {value!r}: it must be a whole number from {lowest} "
                "up."
            )

    root = Path(root)
    if _is_written(root, recipe):
        return names
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as beside:
            made = Path(beside) / root.name
            for name in names:
                _write_category(made / name, name, recipe)
            (made / MANIFEST).write_text(
                json.dumps(recipe | {"files": _count_files(made)}, indent=2) + "\n",
                encoding="utf-8",
            )
            if root.is_dir():
                root.rmdir()  # empty, or it would have been refused above
            os.rename(made, root)
    except OSError as error:
        if _is_written(root, recipe):  # another process was quicker
            return names
        raise OutputError(
            f"The demo data set can't be written to {root}: {error.strerror or error}. Give "
            "another folder."
        ) from error
    return names


def _is_written(root: Path, recipe: dict[str, Any]) -> bool:
    """Whether ``root`` holds this very data set, whole. Raises OutputError if it holds another."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        found = json.loads((root / MANIFEST).read_text(encoding="utf-8"))
        files = found.pop("files")
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        raise OutputError(
            f"{root} is in use and holds no demo data set. Give an empty or new folder for it."
        ) from None
    if found != recipe:
        differs = ", ".join(
            f"{k} {found.get(k)!r} instead of {v!r}" for k, v in recipe.items() if found.get(k) != v
        )
        raise OutputError(
            f"{root} holds another demo data set ({differs or 'with unknown fields'}). Give "
            "another folder, or delete it."
        )
    if (present := _count_files(root)) < files:
        raise OutputError(
            f"The demo data set in {root} has {present} of its {files} pictures and masks. Delete "
            "it to have it made again."
        )
    return True


def _count_files(root: Path) -> int:
    return sum(1 for _ in root.glob("**/*.png"))


def _write_category(folder: Path, name: str, recipe: dict[str, Any]) -> None:
    """Draw one product's pictures and masks into ``folder``."""
    product = PRODUCTS[name]
    groups: list[tuple[str, str | None, int]] = [
        ("train/good", None, recipe["train"]),
        ("test/good", None, recipe["good"]),
    ]
    groups += [(f"test/{defect}", defect, recipe["defective"]) for defect in sorted(product.damage)]
    for group, defect, count in groups:
        (folder / group).mkdir(parents=True)
        if defect is not None:
            (folder / "ground_truth" / defect).mkdir(parents=True)
        for index in range(count):
            key = [recipe["seed"], zlib.crc32(f"{name}/{group}".encode()), index]
            picture, mask = product.picture(np.random.default_rng(key), defect)
            write_image(folder / group / f"{index:03d}.png", picture)
            if defect is not None:
                write_mask(folder / "ground_truth" / defect / f"{index:03d}_mask.png", mask)
