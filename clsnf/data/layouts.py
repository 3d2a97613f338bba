"""Layouts: how the files of a data set lie on the disk. Reads each category into one table.

A layout is recognised by its folders, never by a category's name. Pictures are read from the
folders that the layout names, never deeper. Hidden entries and files of other kinds (notes,
annotations, Thumbs.db) are skipped. Pictures in a format that is not read (gif, heic, raw ...) and
pictures where none belong are errors: to leave them out silently is worse than to stop.

To add a layout, write one function that reads a category's folder into rows, and one line in
``LAYOUTS``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa

from clsnf.core.errors import DataError, SettingsError, nearest
from clsnf.core.hashing import sha256_file
from clsnf.data.images import IMAGE_SUFFIXES
from clsnf.data.visa_split import SPLIT_FILE, read_split

CATEGORY_SCHEMA = pa.schema(
    [
        ("path", pa.string()),  # absolute
        ("split", pa.string()),  # fit | validation | test
        ("label", pa.int8()),  # 0 normal, 1 defect
        ("defect_type", pa.string()),  # "good" for normals
        ("mask_path", pa.string()),  # null for normals, and for defects without a mask
        ("sha256", pa.string()),  # of the file's bytes
        ("category", pa.string()),
    ]
)
NORMAL_TYPE = "good"

_NORMAL_FOLDERS = ("good", "ok")
_FORMATS = "png, jpg, bmp, tif, webp, pnm"
# fmt: off
_UNREAD_PICTURES = (
    ".gif", ".heic", ".heif", ".avif", ".jp2", ".j2k", ".jxl", ".jfif", ".tga", ".pam", ".pfm",
    ".exr", ".hdr", ".psd", ".dcm", ".dng", ".raw", ".cr2", ".cr3", ".nef", ".arw", ".npy",
    ".npz",
)
# fmt: on


@dataclass(frozen=True)
class Row:
    """One picture as a layout reads it; :func:`read_category` adds its hash and its category."""

    path: Path
    split: str = "fit"
    label: int = 0
    defect_type: str = NORMAL_TYPE
    mask_path: Path | None = None


@dataclass(frozen=True)
class Layout:
    """A layout.

    Attributes:
        about: how its folders look, for messages.
        claims: whether a folder is meant as a category of this layout.
        read: reads a category's folder. Raises DataError.
        listed: the names of the categories that a file in the root lists, for layouts that have
            one.
    """

    about: str
    claims: Callable[[Path], bool]
    read: Callable[[Path], list[Row]]
    listed: Callable[[Path], Iterable[str]] = lambda root: ()


# ---- what users call ----


def list_categories(root: str | os.PathLike[str], layout: str = "auto") -> list[str]:
    """Names of the categories below ``root`` in natural order.

    A folder that only looks like a category (it has ``test`` but no ``train``) is listed, so that
    reading it says what is missing.

    Raises:
        DataError: there is none.
    """
    layouts = _layouts(layout)
    root = _existing(Path(root))
    names = {
        folder.name for folder in _folders(root) if any(known.claims(folder) for known in layouts)
    }
    names.update(name for known in layouts for name in known.listed(root))
    if names:
        return sorted(names, key=natural_key)
    if any(known.claims(root) for known in layouts):
        raise DataError(f"{root} is itself a category: give the folder above it, {root.parent}.")
    raise DataError(
        f"{root} holds no category: {_expected(layouts)} (a bare folder of good pictures is read "
        "with --normals)."
    )


def read_category(root: str | os.PathLike[str], category: str, layout: str = "auto") -> pa.Table:
    """One category as a table of ``CATEGORY_SCHEMA``.

    Training normals (split "fit") come first, then test, each in natural order. A category with
    ``train`` alone has no test rows. Every file is hashed.

    Raises:
        DataError: a folder is missing or empty, a mask has no image, or a picture would be left
            out.
    """
    layouts = _layouts(layout)
    root = _existing(Path(root))
    names = [entry.name for entry in _folders(root)]
    meant = [known for known in layouts if category in known.listed(root)]
    if category not in names and not meant:
        mend = nearest(category, names) if names else " It holds no folders at all."
        raise DataError(f"{root} has no category {category!r}.{mend}")
    folder = root / category
    for known in layouts:
        if known in meant or known.claims(folder):
            return table_of(known.read(folder), category)
    raise DataError(f"{folder} is no category: {_expected(layouts)}.")


def read_normals(folder: str | os.PathLike[str], category: str | None = None) -> pa.Table:
    """A bare folder of good pictures as one category.

    It is named after the folder unless ``category`` is given. Raises DataError.
    """
    folder = _existing(Path(folder))
    return table_of(_read_normals(folder), category or folder.name)


# ---- layouts ----


def _read_train_test(normal: str, folder: Path) -> list[Row]:
    """``train/<normal>``, ``test/<type>`` and masks in ``ground_truth/<type>``.

    A mask is named ``<stem>_mask.*`` or ``<stem>.*``, in any image format.
    """
    train = folder / "train"
    if not (train / normal).is_dir():
        raise DataError(
            f"{folder} has no folder train/{normal}: put the good pictures to learn from there."
        )
    others = [f.name for f in _folders(train) if f.name != normal]
    if others:
        raise DataError(
            f"{train} holds {_some(others)} besides {normal!r}: only good pictures train; move "
            f"the others to {folder / 'test'}."
        )
    astray = [str(path) for place in (train, folder / "test") for path in _pictures(place)]
    if astray:
        raise DataError(
            f"Pictures lie beside the folders for them: {_some(astray)}: move good ones to "
            f"{normal}, others to test/<defect>."
        )
    rows = [Row(path) for path in _filled(train / normal)]

    masks = {
        kind.name: _pictures(kind)
        for kind in _folders(folder / "ground_truth")
        if not _is_normal(kind)
    }
    unused = {path for paths in masks.values() for path in paths}
    for kind in _folders(folder / "test"):
        if _is_normal(kind):
            rows += [Row(path, "test") for path in _pictures(kind)]
            continue
        matched = _match_masks(_pictures(kind), masks.get(kind.name, []))
        rows += [Row(path, "test", 1, kind.name, mask) for path, mask in matched.items()]
        unused.difference_update(mask for mask in matched.values() if mask)
    if unused:
        raise DataError(
            f"Masks without an image: {_some(sorted(map(str, unused)))}: add test/<type>/<name> "
            "for each, or remove the mask."
        )
    return rows


def _is_normal(folder: Path) -> bool:
    return folder.name.casefold() in _NORMAL_FOLDERS


def _match_masks(images: list[Path], masks: list[Path]) -> dict[Path, Path | None]:
    """Each image's mask, by name; None where there is none."""
    by_stem: dict[str, Path] = {}
    for mask in masks:
        if mask.stem in by_stem:
            raise DataError(
                f"{by_stem[mask.stem]} and {mask.name} are masks of the same image: remove one."
            )
        by_stem[mask.stem] = mask
    matched = {
        image: by_stem.get(f"{image.stem}_mask", by_stem.get(image.stem)) for image in images
    }
    owner: dict[Path, Path] = {}
    for image, found in matched.items():
        if found and owner.setdefault(found, image) is not image:
            raise DataError(
                f"{owner[found]} and {image.name} would share the mask {found}: rename one of "
                "them and its mask."
            )
    return matched


def _read_normals(folder: Path) -> list[Row]:
    return [Row(path) for path in _filled(folder)]


def _read_visa(folder: Path) -> list[Row]:
    """The rows of the root's ``split_csv/1cls.csv`` that are this category's.

    That file decides which pictures are used.
    """
    root = folder.parent
    members = [entry for entry in read_split(root) if entry.category == folder.name]
    chosen = {
        split: [entry for entry in members if entry.split == split] for split in ("train", "test")
    }
    if not chosen["train"]:
        raise DataError(
            f"{root / SPLIT_FILE} has no train rows for {folder.name!r}: take the file from "
            "VisA's release."
        )
    rows = [Row(root / entry.image) for entry in chosen["train"]]
    for entry in chosen["test"]:
        if entry.label == "normal":
            rows.append(Row(root / entry.image, "test"))
        else:
            mask = root / entry.mask if entry.mask else None
            rows.append(Row(root / entry.image, "test", 1, entry.label, mask))
    # Stable: the order of the splits stays, and each is in natural order.
    return sorted(
        rows, key=lambda row: (row.split != "fit", row.label == 0, natural_key(row.path.name))
    )


LAYOUTS: dict[str, Layout] = {
    "visa": Layout(
        "<category>/Data/Images",
        lambda folder: (folder / "Data" / "Images").is_dir(),
        _read_visa,
        lambda root: (
            {entry.category for entry in read_split(root)} if (root / SPLIT_FILE).exists() else ()
        ),
    ),
    # Before mvtec, which also claims every other folder that is meant as a category.
    "btad": Layout(
        "<category>/train/ok",
        lambda folder: (folder / "train" / "ok").is_dir(),
        partial(_read_train_test, "ok"),
    ),
    "mvtec": Layout(
        "<category>/train/good",
        lambda folder: (folder / "train").is_dir() or (folder / "test").is_dir(),
        partial(_read_train_test, "good"),
    ),
    "normals": Layout(
        "<category>/*.png of good pictures",
        lambda folder: any(map(_is_picture, _entries(folder))),
        _read_normals,
    ),
}
# Not "normals": a folder of pictures below a data set may be anything.
_AUTO = ("btad", "mvtec", "visa")


def _layouts(name: str) -> list[Layout]:
    if name == "auto":
        return [LAYOUTS[known] for known in _AUTO]
    if name not in LAYOUTS:
        raise SettingsError(f"Unknown layout {name!r}.{nearest(name, [*LAYOUTS, 'auto'])}")
    return [LAYOUTS[name]]


def _expected(layouts: list[Layout]) -> str:
    return f"a category has {' or '.join(known.about for known in layouts)}"


# ---- folders and files ----


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise DataError(
            f"{folder} {'is no folder' if folder.exists() else 'does not exist'}: give the folder "
            "that holds the data."
        )
    return folder.absolute()


def _entries(folder: Path) -> list[Path]:
    """What a folder holds but hidden entries, in natural order; nothing if it does not exist."""
    try:
        entries = folder.iterdir() if folder.is_dir() else ()
        found = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(
            f"{folder} can't be listed ({error.strerror}): check its permissions."
        ) from error
    for entry in found:
        try:
            entry.name.encode()
        except UnicodeEncodeError:  # from an archive that was made with another character set
            raise DataError(
                f"{folder} holds the name {entry.name!r}, which is no UTF-8: rename it."
            ) from None
    return sorted(found, key=lambda entry: natural_key(entry.name))


def natural_key(name: str) -> tuple[list[str | int], str]:
    """A sorting key that puts 2 before 10 and ignores case.

    The name itself breaks ties (7 and 007).
    """
    # text, digits, text, ...: the same kind at the same place in every name
    parts = re.split(r"(\d+)", name.casefold())
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], name


def _folders(folder: Path) -> list[Path]:
    return [entry for entry in _entries(folder) if entry.is_dir()]


def _pictures(folder: Path) -> list[Path]:
    """The pictures directly in ``folder``. Raises DataError if one would be left out."""
    files = [entry for entry in _entries(folder) if not entry.is_dir()]
    unread = [entry.name for entry in files if entry.suffix.lower() in _UNREAD_PICTURES]
    if unread:
        raise DataError(
            f"{folder} holds pictures in a format that is not read: {_some(unread)}: convert them "
            "to png or remove them."
        )
    return [entry for entry in files if _is_picture(entry)]


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES


def _filled(folder: Path) -> list[Path]:
    """The pictures of a folder that must have some. Raises DataError if it has none."""
    pictures = _pictures(folder)
    if not pictures:
        others = [entry.name for entry in _entries(folder)]
        only = f", only {_some(others)}" if others else ""
        raise DataError(f"{folder} holds no pictures ({_FORMATS}){only}: put good pictures there.")
    return pictures


def _some(names: Iterable[str], most: int = 5) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# ---- the table ----


def table_of(rows: list[Row], category: str) -> pa.Table:
    """Rows with their hashes as a table of ``CATEGORY_SCHEMA``."""
    with ThreadPoolExecutor() as pool:
        hashes = list(pool.map(_sha256, [row.path for row in rows]))
    records = [
        {
            **asdict(row),
            "path": str(row.path),
            "mask_path": row.mask_path and str(row.mask_path),
            "sha256": digest,
            "category": category,
        }
        for row, digest in zip(rows, hashes, strict=True)
    ]
    return pa.Table.from_pylist(records, schema=CATEGORY_SCHEMA)


def _sha256(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError as error:
        raise DataError(
            f"{path} can't be read ({error.strerror}): check the link or the permissions."
        ) from error
