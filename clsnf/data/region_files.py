"""Annotated regions: several masks of one image, each with the overlap that is enough.

MVTec LOCO AD (Bergmann et al., IJCV 130, 2022) has a folder of masks for each image. In a mask, the
value of the marked pixels names the defect's type. ``defects_config.json`` in the category's folder
says for each type how much of a region must be found: a region where any part will do, such as the
place of one of several missing things, is *saturated* before all of it is found.

The reference of such a folder ends with ``#regions``. Its bytes are one archive of the
configuration and the masks, unchanged and uncompressed, so that a pack holds it like any other
mask. Read here, for :mod:`clsnf.data.sources`; :func:`clsnf.data.images.read_regions` decodes it.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clsnf.core.errors import DataError, ImageError

CONFIGURATION = "defects_config.json"
_ENDING = "#regions"
_FIRST = b"PK\x03\x04", CONFIGURATION.encode()  # where a bundle begins, and its first file's name
_NAME_AT = 30  # bytes from the beginning to that name
_SUFFIX = ".png"  # of the masks, as published


@dataclass(frozen=True)
class Saturation:
    """How much of a region of one defect type must be found.

    Attributes:
        threshold: a share of the region in (0, 1] if ``relative``, else a number of pixels.
        relative: see ``threshold``.
    """

    threshold: float
    relative: bool

    def pixels(self, area: int) -> int:
        """The number of pixels at which a region of so many is saturated, from 1 to ``area``.

        As published: a share is rounded down, a number is cut at the region's area.
        """
        wanted = int(self.threshold * area) if self.relative else int(self.threshold)
        return max(1, min(wanted, area))


@dataclass(frozen=True)
class Bundle:
    """The content of a regions reference.

    Attributes:
        saturations: pixel value -> what is enough of a region with this value.
        masks: name and encoded bytes of each region's mask.
    """

    saturations: dict[int, Saturation]
    masks: list[tuple[str, bytes]]


def regions_reference(folder: str | os.PathLike[str]) -> str:
    """The reference of a folder that holds the masks of one image."""
    return f"{os.fspath(folder)}{_ENDING}"


def has_regions(reference: str | os.PathLike[str]) -> bool:
    """Whether a mask's reference is one of several regions, in a folder or in a pack."""
    return os.fspath(reference).endswith(_ENDING)


def region_masks(folder: Path) -> list[Path]:
    """The masks in a folder, sorted by name. Raises OSError."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() == _SUFFIX)


def read_saturations(category: Path) -> dict[int, Saturation]:
    """What ``defects_config.json`` in a category's folder says, by pixel value.

    Raises DataError.
    """
    path = category / CONFIGURATION
    try:
        return _saturations(path.read_bytes())
    except OSError as error:
        raise DataError(
            f"{path} can't be read ({error.strerror}): take it from the release."
        ) from None
    except ValueError as error:
        raise DataError(f"{path} {error}: take it from the data set's release.") from None


def _saturations(data: bytes) -> dict[int, Saturation]:
    """The saturations of a configuration's bytes. Raises ValueError that says what is wrong."""
    try:
        entries = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is no JSON ({str(error)[:100]})") from None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError("is no list of defect types")
    found: dict[int, Saturation] = {}
    for entry in entries:
        value, saturation = entry.get("pixel_value"), _saturation(entry)
        if type(value) is not int or not 1 <= value <= 255 or value in found:
            raise ValueError(
                f"has the pixel_value {value!r}: it must be from 1 to 255, another for each type"
            )
        found[value] = saturation
    return found


def _saturation(entry: dict[str, Any]) -> Saturation:
    threshold: Any = entry.get("saturation_threshold")
    relative = entry.get("relative_saturation")
    if not isinstance(relative, bool):
        raise ValueError(f"has the relative_saturation {relative!r}: it must be true or false")
    # JSON's true is no number here; the comparison is false for NaN as well.
    if type(threshold) in (int, float) and 0 < threshold <= (1 if relative else 1e12):
        return Saturation(float(threshold), relative)
    what = "a share from above 0 to 1" if relative else "a number of pixels above 0"
    raise ValueError(f"has the saturation_threshold {threshold!r}: it must be {what}")


# ---- bundles ----


def bundle(reference: str) -> bytes:
    """The bytes of a regions reference to a folder, the same for the same files.

    Raises ImageError.
    """
    folder = Path(reference.removesuffix(_ENDING))
    # CATEGORY/ground_truth/TYPE/IMAGE
    configuration = folder.parents[2] / CONFIGURATION
    packed = io.BytesIO()
    try:
        with zipfile.ZipFile(packed, "w") as archive:
            for path in [configuration, *region_masks(folder)]:
                info = zipfile.ZipInfo(path.name)  # of 1980, whatever the file's own time
                info.create_system = 3  # whatever the machine's
                archive.writestr(info, path.read_bytes())
    except OSError as error:
        raise ImageError(
            f"{error.filename or folder} can't be read ({error.strerror}): check the path and its "
            "permissions."
        ) from error
    return packed.getvalue()


def is_bundle(data: bytes) -> bool:
    """Whether bytes begin like those that :func:`bundle` writes."""
    magic, name = _FIRST
    return data.startswith(magic) and data[_NAME_AT : _NAME_AT + len(name)] == name


def open_bundle(data: bytes, reference: str) -> Bundle:
    """The content of a bundle's bytes. ``reference`` stands in messages. Raises ImageError."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise ValueError("it is compressed")
            files = [(entry.filename, archive.read(entry)) for entry in entries]
    except (ValueError, zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise ImageError(
            f"{reference} holds no masks that can be read ({error}): pack the data set again."
        ) from error
    try:
        saturations = _saturations(files[0][1])
    except ValueError as error:
        raise ImageError(f"{CONFIGURATION} for {reference} {error}.") from None
    return Bundle(saturations, files[1:])
