"""Contact sheets: some defects of each type on one page, so that a person can judge them.

Each row is a type of defect. Each cell shows the whole picture with the defect's outline, and the
defect enlarged. :mod:`clsnf.synthesis.validation_set` writes one for every set;
:mod:`clsnf.synthesis.training_sheet` makes the rows for training defects.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pyarrow as pa

from clsnf.core.errors import DataError
from clsnf.data.images import read_image, read_mask, write_image
from clsnf.synthesis.brush import Bool, UInt8


class Cell(NamedTuple):
    """A picture and its defect."""

    image: UInt8  # (H, W, 3)
    mask: Bool  # (H, W), at least one pixel


class Row(NamedTuple):
    """One type of defect on a sheet."""

    caption: str
    cells: Sequence[Cell]


_OUTLINE = (255, 0, 0)
_LABEL_HEIGHT = 22  # pixels above each row


def write_contact_sheet(table: pa.Table, path: Path, *, columns: int = 6, tile: int = 160) -> None:
    """Write a PNG with one row for each defect type of a category's table.

    Args:
        columns: the most images of a type; they are taken evenly spread.
        tile: side of a tile in pixels; a cell is two tiles wide.

    Raises:
        DataError: the table has no masks.
    """
    by_type: dict[str, list[dict[str, str]]] = {}
    for entry in table.select(["path", "mask_path", "defect_type"]).to_pylist():
        if entry["mask_path"]:
            by_type.setdefault(entry["defect_type"], []).append(entry)
    if not by_type:
        raise DataError("The table has no defects with masks: a contact sheet needs at least one.")
    rows = []
    for defect_type, members in by_type.items():
        chosen = np.unique(np.linspace(0, len(members) - 1, columns).round().astype(int))
        shown = [members[i] for i in chosen]
        cells = [Cell(read_image(one["path"]), read_mask(one["mask_path"])) for one in shown]
        rows.append(Row(f"{defect_type} ({len(members)})", cells))
    write_image(path, draw_sheet(rows, columns=columns, tile=tile))


def draw_sheet(rows: Sequence[Row], *, columns: int = 6, tile: int = 160) -> UInt8:
    """Captioned rows of at most ``columns`` cells as one picture (h, 2 tile columns, 3)."""
    drawn = []
    for caption, cells in rows:
        band = np.full((_LABEL_HEIGHT + tile, 2 * tile * columns, 3), 255, np.uint8)
        for number, (image, mask) in enumerate(cells[:columns]):
            place = slice(2 * tile * number, 2 * tile * (number + 1))
            band[_LABEL_HEIGHT:, place] = _draw_cell(image, mask, tile)
        cv2.putText(
            band, caption, (4, 16), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA
        )
        drawn.append(band)
    return np.vstack(drawn)


def _draw_cell(image: UInt8, mask: Bool, tile: int) -> UInt8:
    """The picture with the mask's outline beside the enlarged defect, (tile, 2 tile, 3)."""
    whole = _fitted(image, tile, cv2.INTER_AREA)
    # The outline lies outside the mask, so that it covers nothing of the defect.
    inside = (_fitted(mask.astype(np.float32), tile, cv2.INTER_AREA) > 0).astype(np.uint8)
    far, near = (cv2.dilate(inside, np.ones((side, side), np.uint8)) > 0 for side in (5, 3))
    whole[far & ~near] = _OUTLINE
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
