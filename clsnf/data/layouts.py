"""Layouts: how the files of a data set lie on the disk. Reads each category into one table.

A layout is recognised by its folders, never by a category's name. Pictures are read from the
folders that the layout names, never deeper. Hidden entries and files of other kinds (notes,
annotations, Thumbs.db) are skipped. Pictures in a format that is not read (gif, heic, raw ...) and
pictures where none belong are errors: to leave them out silently is worse than to stop. Folders of
pictures beside those that the layout names are left out with a note (:func:`notes_of`).

To add a layout, write one function that reads a category's folder into rows, and one line in
``LAYOUTS``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa

from clsnf.core.errors import DataError, SettingsError, nearest
from clsnf.core.hashing import sha256_file
from clsnf.data.picture_folders import (
    entries_in,
    existing_folder,
    first_names,
    folders_in,
    is_picture,
    natural_key,
    pictures_in,
    required_pictures,
)
from clsnf.data.region_files import (
    CONFIGURATION,
    read_saturations,
    region_masks,
    regions_reference,
)
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
_NOTES = b"notes"  # in the metadata of a table's schema: JSON, a list of texts


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
        notes: what the folder holds that is not read, one line each.
    """

    about: str
    claims: Callable[[Path], bool]
    read: Callable[[Path], list[Row]]
    listed: Callable[[Path], Iterable[str]] = lambda root: ()
    notes: Callable[[Path], list[str]] = lambda folder: []


# ---- what users call ----


def list_categories(root: str | os.PathLike[str], layout: str = "auto") -> list[str]:
    """Names of the categories below ``root`` in natural order.

    A folder that only looks like a category (it has ``test`` but no ``train``) is listed, so that
    reading it says what is missing.

    Raises:
        DataError: there is none.
    """
    layouts = _layouts(layout)
    root = existing_folder(Path(root))
    names = {
        folder.name for folder in folders_in(root) if any(known.claims(folder) for known in layouts)
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

    Training normals (split "fit") come first, then the layout's own validation normals, then test,
    each in natural order. A category with ``train`` alone has no test rows. Every file is hashed.

    Raises:
        DataError: a folder is missing or empty, a mask has no image, or a picture would be left
            out.
    """
    layouts = _layouts(layout)
    root = existing_folder(Path(root))
    names = [entry.name for entry in folders_in(root)]
    meant = [known for known in layouts if category in known.listed(root)]
    if category not in names and not meant:
        mend = nearest(category, names) if names else " It holds no folders at all."
        raise DataError(f"{root} has no category {category!r}.{mend}")
    folder = root / category
    for known in layouts:
        if known in meant or known.claims(folder):
            table = table_of(known.read(folder), category)
            notes = known.notes(folder)
            return table.replace_schema_metadata({_NOTES: json.dumps(notes)} if notes else None)
    raise DataError(f"{folder} is no category: {_expected(layouts)}.")


def notes_of(table: pa.Table) -> list[str]:
    """What a category's folder holds that its table does not, one line each."""
    metadata = table.schema.metadata or {}
    notes: list[str] = json.loads(metadata.get(_NOTES, b"[]"))
    return notes


def read_normals(folder: str | os.PathLike[str], category: str | None = None) -> pa.Table:
    """A bare folder of good pictures as one category.

    It is named after the folder unless ``category`` is given. Raises DataError.
    """
    folder = existing_folder(Path(folder))
    return table_of(_read_normals(folder), category or folder.name)


# ---- layouts ----


@dataclass(frozen=True)
class _Folders:
    """Where a category in the manner of MVTec AD keeps its pictures.

    Attributes:
        normal: below train, validation and test.
        test: holds a folder for each defect type.
        truth: holds a folder of masks for each defect type.
        regions: whether the masks of an image have a folder of their own.
        unlabelled: hold pictures whose labels nobody published.
    """

    normal: str = "good"
    test: str = "test"
    truth: str = "ground_truth"
    regions: bool = False
    unlabelled: tuple[str, ...] = ()


def _read_train_test(folders: _Folders, folder: Path) -> list[Row]:
    """``train/<normal>``, ``validation/<normal>`` if there is one, ``test/<type>`` and masks in
    ``ground_truth/<type>``.

    A mask is named ``<stem>_mask.*`` or ``<stem>.*``, in any image format.
    """
    train, validation, test = folder / "train", folder / "validation", folder / folders.test
    if not (train / folders.normal).is_dir():
        raise DataError(
            f"{folder} has no folder train/{folders.normal}: put the good pictures to learn from "
            "there."
        )
    rows = [Row(path) for path in _only_normals(train, folders)]
    if validation.is_dir():
        rows += [Row(path, "validation") for path in _only_normals(validation, folders)]
    _refuse_astray(test, folders)

    truth = folder / folders.truth
    masks = {
        kind.name: _masks(kind, folders.regions)
        for kind in folders_in(truth)
        if not _is_normal(kind)
    }
    unused = {path for paths in masks.values() for path in paths}
    for kind in folders_in(test):
        if kind == truth:
            continue
        if _is_normal(kind):
            rows += [Row(path, "test") for path in pictures_in(kind)]
            continue
        matched = _match_masks(pictures_in(kind), masks.get(kind.name, []))
        rows += [
            Row(path, "test", 1, kind.name, _mask_reference(mask, folders.regions))
            for path, mask in matched.items()
        ]
        unused.difference_update(mask for mask in matched.values() if mask)
    if unused:
        raise DataError(
            f"Masks without an image: {first_names(sorted(map(str, unused)))}: add "
            f"{folders.test}/<type>/<name> for each, or remove the mask."
        )
    return rows


def _only_normals(place: Path, folders: _Folders) -> list[Path]:
    """The pictures of train or validation, which hold good ones alone."""
    others = [f.name for f in folders_in(place) if f.name != folders.normal]
    if others:
        raise DataError(
            f"{place} holds {first_names(others)} besides {folders.normal!r}: only good pictures "
            f"train; move the others to {place.parent / folders.test}."
        )
    _refuse_astray(place, folders)
    return required_pictures(place / folders.normal)


def _refuse_astray(place: Path, folders: _Folders) -> None:
    astray = [str(path) for path in pictures_in(place)]
    if astray:
        raise DataError(
            f"Pictures lie beside the folders for them: {first_names(astray)}: move good ones to "
            f"{folders.normal}, others to {folders.test}/<defect>."
        )


def _masks(kind: Path, regions: bool) -> list[Path]:
    """The masks of a defect type: pictures, or folders of them."""
    if not regions:
        return pictures_in(kind)
    astray = [str(path) for path in pictures_in(kind)]
    if astray:
        raise DataError(
            f"Masks lie beside the folders for them: {first_names(astray)}: each image has a "
            f"folder of masks of its own, such as {kind / Path(astray[0]).stem}."
        )
    found = folders_in(kind)
    for folder in found:
        if not region_masks(folder):
            raise DataError(f"{folder} holds no mask: put the image's masks there as PNG.")
    return found


def _mask_reference(mask: Path | None, regions: bool) -> Path | None:
    return Path(regions_reference(mask)) if mask is not None and regions else mask


def _read_loco(folder: Path) -> list[Row]:
    """MVTec AD's folders, with a folder of masks for each image; see
    :mod:`clsnf.data.region_files`.
    """
    read_saturations(folder)  # refused now rather than with the first mask
    return _read_train_test(_LOCO, folder)


def _unread(folders: _Folders, folder: Path) -> list[str]:
    """Notes of folders with pictures that :func:`_read_train_test` does not read."""
    read = {"train", "validation", folders.test, Path(folders.truth).parts[0]}
    notes = []
    for other in folders_in(folder):
        if other.name in folders.unlabelled and (count := len(pictures_in(other))):
            notes.append(
                f"{other} holds {count} pictures without labels: nothing is judged on them; clsnf "
                "predict scores them."
            )
        elif other.name not in read and _holds_pictures(other):
            notes.append(
                f"{other} is not read: pictures belong into train/{folders.normal}, "
                f"validation/{folders.normal} and {folders.test}."
            )
    return notes


def _holds_pictures(folder: Path) -> bool:
    """Whether pictures lie in a folder or in a folder of it."""
    return any(any(map(is_picture, entries_in(place))) for place in (folder, *folders_in(folder)))


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
    return [Row(path) for path in required_pictures(folder)]


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


_BTAD = _Folders(normal="ok")
_MVTEC = _Folders()
# As published (Heckler-Kram et al., The MVTec AD 2 Dataset, arXiv 2503.21622, and the layout in
# anomalib's data/datasets/image/mvtecad2.py): the private pictures are judged by MVTec's server.
_MVTEC2 = _Folders(
    test="test_public",
    truth="test_public/ground_truth",
    unlabelled=("test_private", "test_private_mixed"),
)
_LOCO = _Folders(regions=True)

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
        partial(_read_train_test, _BTAD),
        notes=partial(_unread, _BTAD),
    ),
    "mvtec2": Layout(
        "<category>/train/good with test_public",
        lambda folder: (folder / "test_public").is_dir(),
        partial(_read_train_test, _MVTEC2),
        notes=partial(_unread, _MVTEC2),
    ),
    "loco": Layout(
        f"<category>/train/good with {CONFIGURATION}",
        lambda folder: (folder / CONFIGURATION).is_file(),
        _read_loco,
        notes=partial(_unread, _LOCO),
    ),
    "mvtec": Layout(
        "<category>/train/good",
        lambda folder: (folder / "train").is_dir() or (folder / "test").is_dir(),
        partial(_read_train_test, _MVTEC),
        notes=partial(_unread, _MVTEC),
    ),
    "normals": Layout(
        "<category>/*.png of good pictures",
        lambda folder: any(map(is_picture, entries_in(folder))),
        _read_normals,
    ),
}
# Not "normals": a folder of pictures below a data set may be anything.
_AUTO = ("btad", "mvtec2", "loco", "mvtec", "visa")


def _layouts(name: str) -> list[Layout]:
    if name == "auto":
        return [LAYOUTS[known] for known in _AUTO]
    if name not in LAYOUTS:
        raise SettingsError(f"Unknown layout {name!r}.{nearest(name, [*LAYOUTS, 'auto'])}")
    return [LAYOUTS[name]]


def _expected(layouts: list[Layout]) -> str:
    return f"a category has {' or '.join(known.about for known in layouts)}"


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
