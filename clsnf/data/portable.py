"""Reads PNM files (PBM, PGM and PPM in binary): what cameras write as raw frames with a header.

There is nothing to decode, so the pixels cost one copy. Pillow reads the header byte by byte in
Python, and refuses colours of 16 bit. Called by :mod:`clsnf.data.images`.
"""

from __future__ import annotations

import mmap
import re
from dataclasses import dataclass

import numpy as np

from clsnf.core.errors import ImageError

HEADER_BYTES = 1024  # the numbers and comments before the pixels

_SPACE = rb"(?:\s|#[^\n]*\n)+"
_BITMAP = re.compile(rb"P4" + _SPACE + rb"(\d{1,9})" + _SPACE + rb"(\d{1,9})\s")
_LEVELS = re.compile(
    rb"P[56]" + _SPACE + rb"(\d{1,9})" + _SPACE + rb"(\d{1,9})" + _SPACE + rb"(\d{1,9})\s"
)


@dataclass(frozen=True)
class PortableHeader:
    """What stands before the pixels.

    Attributes:
        height, width: pixels.
        channels: 1, or 3 for RGB.
        white: the greatest level; 1 for a bitmap.
        bitmap: 8 pixels to a byte, where 1 is black.
        start: position of the pixels.
    """

    height: int
    width: int
    channels: int
    white: int
    bitmap: bool
    start: int

    @property
    def bytes(self) -> int:
        """Of the pixels."""
        if self.bitmap:
            return self.height * -(-self.width // 8)
        return self.height * self.width * self.channels * (1 if self.white < 256 else 2)


def portable_header(data: bytes | mmap.mmap, name: str) -> PortableHeader:
    """The header of a file that starts with P1 to P6. ``name`` stands in messages.

    Raises:
        ImageError: it is damaged, or of a kind that is not read.
    """
    start = bytes(data[:HEADER_BYTES])
    kind = start[1:2].decode()
    if kind in "123":
        raise ImageError(
            f"{name} is a PNM of text (P{kind}), a format that is not read: save it as a binary "
            f"one (P{int(kind) + 3}) or as a png."
        )
    found = (_BITMAP if kind == "4" else _LEVELS).match(start)
    if found is None:
        raise ImageError(
            f"{name} has a damaged header: P{kind}, the width, the height and the greatest level "
            f"must stand in its first {HEADER_BYTES} bytes."
        )
    width, height, white = (*(int(number) for number in found.groups()), 1)[:3]
    if not (width and height and 0 < white < 65_536):
        raise ImageError(
            f"{name} announces {width}x{height} pixels with levels up to {white}: sizes from 1 and "
            "levels up to 1 to 65535 are read."
        )
    return PortableHeader(height, width, 3 if kind == "6" else 1, white, kind == "4", found.end())


def portable_levels(data: bytes, header: PortableHeader, name: str) -> np.ndarray:
    """The levels as they stand in the file: (h, w) or (h, w, 3), uint8 or uint16, not writable.

    A bitmap's black is 0, its white 1. Raises ImageError unless the file holds exactly one picture.
    """
    missing = header.start + header.bytes - len(data)
    if missing > 0:
        raise ImageError(
            f"{name} is cut short: {missing} bytes are missing: copy it again from its source or "
            "remove it."
        )
    if missing < 0:
        raise ImageError(
            f"{name} holds {-missing} bytes after its {header.width}x{header.height} pixels: give "
            "its true size, and save each picture as a file of its own."
        )
    if header.bitmap:
        rows = np.frombuffer(data, np.uint8, offset=header.start).reshape(header.height, -1)
        return 1 - np.unpackbits(rows, axis=1, count=header.width)
    shape = (header.height, header.width, header.channels)[: 3 if header.channels == 3 else 2]
    return np.frombuffer(data, "u1" if header.white < 256 else ">u2", offset=header.start).reshape(
        shape
    )


def portable_rgb(data: bytes, header: PortableHeader, name: str) -> np.ndarray:
    """The picture as RGB, uint8 (h, w, 3), writable.

    Its white becomes 255. Where that is above 255, levels are scaled as those of 16-bit files: of
    65535 by their high byte, of 4095 by the upper 8 of 12 bits. Raises ImageError.
    """
    levels, white = portable_levels(data, header, name), header.white
    if white == 65_535:
        levels = (levels >> 8).astype(np.uint8)
    elif white > 255:
        levels = (np.minimum(levels, white).astype(np.uint32) * 256 // (white + 1)).astype(np.uint8)
    elif white < 255:
        scaled = np.rint(np.minimum(np.arange(256), white) * (255 / white)).astype(np.uint8)
        levels = scaled[levels]
    return np.repeat(levels[..., None], 3, axis=2) if levels.ndim == 2 else levels.copy()
