"""A contact sheet: some defects of each type on one page, so that a person can judge them.

Each row is a defect type; each cell shows the whole picture with the mask outlined, and the defect
enlarged as it is. Called by :mod:`clsnf.synthesis.validation_set` for every set that it writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa

from clsnf.core.errors import DataError
from clsnf.data.images import read_image, read_mask, write_image
from clsnf.synthesis.brush import Bool, UInt8

Band = tuple[str, Sequence[tuple[UInt8, Bool]]]  # a caption; images (H, W, 3) with masks (H, W)

_OUTLINE = (255, 0, 0)
_LABEL_HEIGHT = 22  # pixels above each row


def write_contact_sheet(table: pa.Table, path: Path, *, columns: int = 6, tile: int = 160) -> None:
    """Write a PNG with one row for each defect type of ``table`` and up to ``columns`` of its
    images, evenly chosen.

    A cell is two tiles of ``tile`` pixels wide. Raises DataError if the table has no masks.
    """
    rows = [
        row
        for row in table.select(["path", "mask_path", "defect_type"]).to_pylist()
        if row["mask_path"]
    ]
    if not rows:
        raise DataError("The table has no defects with masks: a contact sheet needs at least one.")
    bands: list[Band] = []
    for defect_type in dict.fromkeys(row["defect_type"] for row in rows):
        members = [row for row in rows if row["defect_type"] == defect_type]
        shown = [
            members[i]
            for i in np.unique(np.linspace(0, len(members) - 1, columns).round().astype(int))
        ]
        bands.append(
            (
                f"{defect_type} ({len(members)})",
                [(read_image(row["path"]), read_mask(row["mask_path"])) for row in shown],
            )
        )
    write_image(path, draw_sheet(bands, columns=columns, tile=tile))


def draw_sheet(bands: Sequence[Band], *, columns: int = 6, tile: int = 160) -> UInt8:
    """Captioned rows of pictures with their masks, none empty, as one picture (rows, 2 tile
    columns, 3); ``columns`` cells at most.
    """
    drawn = []
    for caption, pictures in bands:
        band = np.full((_LABEL_HEIGHT + tile, 2 * tile * columns, 3), 255, np.uint8)
        for number, (image, mask) in enumerate(pictures[:columns]):
            band[_LABEL_HEIGHT:, 2 * tile * number : 2 * tile * (number + 1)] = _cell(
                image, mask, tile
            )
        cv2.putText(
            band, caption, (4, 16), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA
        )
        drawn.append(band)
    return np.vstack(drawn)


def _cell(image: UInt8, mask: Bool, tile: int) -> UInt8:
    """The whole picture with its outlined mask, and the enlarged defect, side by side: (tile, 2
    tile, 3).
    """
    whole = _fitted(image, tile, cv2.INTER_AREA)
    # Outlined from outside, so that nothing of the defect is covered.
    inside = (_fitted(mask.astype(np.float32), tile, cv2.INTER_AREA) > 0).astype(np.uint8)
    whole[
        (cv2.dilate(inside, np.ones((5, 5), np.uint8)) > 0)
        & (cv2.dilate(inside, np.ones((3, 3), np.uint8)) == 0)
    ] = _OUTLINE
    rows, columns = np.nonzero(mask)
    half = max(16, round(0.75 * max(np.ptp(rows), np.ptp(columns))))
    row, column = (rows.min() + rows.max()) // 2, (columns.min() + columns.max()) // 2
    close = image[max(0, row - half) : row + half, max(0, column - half) : column + half]
    return np.hstack([whole, _fitted(close, tile, cv2.INTER_CUBIC)])


def _fitted(picture: np.ndarray, tile: int, interpolation: int) -> np.ndarray:
    """``picture`` (h, w, ...) scaled to fit into the middle of (tile, tile, ...), black around."""
    scale = tile / max(picture.shape[:2])
    size = (max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale)))
    scaled = cv2.resize(picture, size, interpolation=interpolation)
    result = np.zeros((tile, tile, *picture.shape[2:]), picture.dtype)
    top, left = (tile - size[1]) // 2, (tile - size[0]) // 2
    result[top : top + size[1], left : left + size[0]] = scaled
    return result
