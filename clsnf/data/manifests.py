"""Manifests: JSON lines that name pictures, as SageMaker Ground Truth and Lookout for Vision wrote.

One manifest is one category, named after the file or by its lines' ``category``. A line is of one
of two forms::

    {"source-ref": "s3://bucket/a.png", "anomaly-label-metadata": {"class-name": "anomaly", ...},
     "anomaly-mask-ref": "s3://bucket/a-mask.png", "anomaly-mask-ref-metadata": {...}}
    {"image": "a.png", "label": "anomaly", "mask": "a-mask.png", "defect": "scratch"}

Normals train and anomalies test. Normals with ``"split": "test"`` test too, in both forms.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa

from clsnf.core.errors import DataError
from clsnf.core.uris import is_uri
from clsnf.data.images import IMAGE_SUFFIXES
from clsnf.data.layouts import NORMAL_TYPE, Row, table_of
from clsnf.data.picture_folders import natural_key
from clsnf.data.sources import mask_on_background

_SUFFIXES = (".jsonl", ".manifest")
_CLASSES = ("normal", "anomaly")
_CLASSIFICATION, _SEGMENTATION = "groundtruth/image-classification", "groundtruth/semantic"


def is_manifest(location: str | Path) -> bool:
    """Whether a data set's location is a manifest, by its suffix."""
    return not is_uri(location) and Path(location).suffix.lower() in _SUFFIXES


def manifest_category(manifest: Path) -> str:
    """The one category of a manifest. Raises DataError."""
    return _category(manifest, _lines(manifest))


def read_manifest(manifest: Path) -> pa.Table:
    """A manifest's category as a table of ``CATEGORY_SCHEMA``.

    Raises:
        DataError: a line can't be used; the message names its number.
    """
    lines = _lines(manifest)
    rows: dict[Path, tuple[Row, int]] = {}
    for line in lines:
        row = _row(line)
        if row.path in rows:
            raise line.error(f"names the picture of line {rows[row.path][1]} again: remove one")
        rows[row.path] = row, line.number
    ordered = sorted(
        (row for row, _ in rows.values()),
        key=lambda row: (row.split != "fit", row.label == 0, natural_key(row.path.name)),
    )
    if not any(row.split == "fit" for row in ordered):
        raise DataError(f"{manifest} has no normal picture to learn from: add lines for some.")
    return table_of(ordered, _category(manifest, lines))


@dataclass(frozen=True)
class _Line:
    """A line of a manifest; its number counts from 1."""

    manifest: Path
    number: int
    content: dict[str, Any]

    def error(self, problem: str) -> DataError:
        return DataError(f"{self.manifest}, line {self.number}, {problem}.")

    def text(self, key: str) -> str | None:
        """The text of a key; None where there is none."""
        value = self.content.get(key)
        if value is not None and (not isinstance(value, str) or not value):
            raise self.error(f"has {key!r} = {value!r}: it must be a text")
        return value

    def metadata(self, key: str, kind: str) -> tuple[str, dict[str, Any]]:
        """The attribute of a labelling job that is called `key` or is of that kind.

        Returns:
            Its name, and its metadata; empty where there is none.
        """
        ending = "-metadata"
        for name, value in self.content.items():
            if name.endswith(ending) and isinstance(value, dict):
                attribute = name.removesuffix(ending)
                if attribute == key or str(value.get("type")).startswith(kind):
                    return attribute, value
        return key, {}


def _lines(manifest: Path) -> list[_Line]:
    try:
        text = manifest.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8"
        raise DataError(f"{manifest} can't be read ({reason}): check the path.") from error
    lines = []
    for number, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        line = _Line(manifest.absolute(), number, {})
        try:
            found = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise line.error(f"is no JSON ({str(error)[:100]}): write one object a line") from error
        if not isinstance(found, dict):
            raise line.error("is no JSON object: write one with source-ref or image")
        lines.append(_Line(line.manifest, number, found))
    if not lines:
        raise DataError(f"{manifest} holds no lines: write one for each picture.")
    return lines


def _category(manifest: Path, lines: list[_Line]) -> str:
    """The category that lines name, else the file's name."""
    category: str | None = None
    for line in lines:
        named = line.text("category")
        if named is not None and category is not None and named != category:
            raise line.error(
                f"names the category {named!r}, others {category!r}: a manifest holds one; split it"
            )
        category = named or category
    return category or manifest.stem


def _row(line: _Line) -> Row:
    lookout = "source-ref" in line.content
    picture = line.text("source-ref" if lookout else "image")
    if picture is None:
        raise line.error("names no picture: give source-ref (or image)")
    path = _local(line, picture)
    label = _label(line) if lookout else line.content.get("label")
    if label not in _CLASSES:
        raise line.error(f"has the class {label!r}: it must be normal or anomaly")
    split = line.text("split")
    if split not in (None, "train", "test"):
        raise line.error(f"has the split {split!r}: it must be train or test")
    if label == "normal":
        return Row(path, "test" if split == "test" else "fit")
    if split == "train":
        raise line.error("puts an anomaly into train: only normals train; leave the split out")
    mask, defect = _lookout_mask(line) if lookout else _own_mask(line)
    if defect == NORMAL_TYPE:
        raise line.error(f"calls a defect {defect!r}: that is the name of normals; take another")
    return Row(path, "test", 1, defect, mask)


def _label(line: _Line) -> str | None:
    """The class of a labelling job. Its number says nothing: some jobs count normals as 1."""
    _, metadata = line.metadata("anomaly-label", _CLASSIFICATION)
    found = metadata.get("class-name")
    return found.strip().lower() if isinstance(found, str) else found


def _own_mask(line: _Line) -> tuple[Path | None, str]:
    mask = line.text("mask")
    return (None if mask is None else _local(line, mask)), line.text("defect") or "anomaly"


def _lookout_mask(line: _Line) -> tuple[Path | None, str]:
    """The mask, which has a colour for each class and white for none, and the defect's class."""
    attribute, metadata = line.metadata("anomaly-mask-ref", _SEGMENTATION)
    mask = line.text(attribute)
    if mask is None:
        return None, "anomaly"
    classes = metadata.get("internal-color-map") or {}
    background, names = "#ffffff", []
    for one in classes.values() if isinstance(classes, dict) else ():
        name, colour = str(one.get("class-name", "")), str(one.get("hex-color", ""))
        if name.upper() == "BACKGROUND":
            background = colour
        else:
            names.append(name)
    if not re.fullmatch("#[0-9a-fA-F]{6}", background):
        raise line.error(f"has the background {background!r}: it must be a colour such as #ffffff")
    defect = names[0] if len(names) == 1 and names[0] else "anomaly"
    path = _local(line, mask)
    return Path(mask_on_background(str(path), background.lstrip("#").lower())), defect


def _local(line: _Line, reference: str) -> Path:
    """The file of a reference: a path, file://, or the copy of what lies in a bucket."""
    folder = line.manifest.parent
    tried = [folder / reference]
    if is_uri(reference):
        parts = urlsplit(reference)
        inner = unquote(parts.path).lstrip("/")
        if parts.scheme == "file":
            tried = [Path("/", inner)]
        elif parts.scheme == "s3":
            tried = [folder / inner, folder / parts.netloc / inner, folder / Path(inner).name]
        else:
            raise line.error(f"has {reference!r}: give a path, file:// or s3://")
    found = next((path for path in tried if path.is_file()), None)
    if found is None:
        raise line.error(
            f"names {reference!r}, which is not at {tried[0]}"
            + (": copy the bucket there (aws s3 sync)" if reference.startswith("s3:") else "")
        )
    if found.suffix.lower() not in IMAGE_SUFFIXES:
        raise line.error(f"names {reference!r}: png, jpg, bmp, tif and webp are read; convert it")
    return found.absolute()
