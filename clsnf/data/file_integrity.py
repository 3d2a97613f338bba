"""Is an image file whole? Read from its structure alone, before any codec sees the bytes.

Codecs can't be trusted with half a file. libjpeg fills the missing part with grey and only warns (a
file whose tail is zeros after a crash passes), PNG decoders stop at the last pixel, and libtiff
writes to standard error. The checks here follow the lengths that the container states, never the
compressed data, so they cost microseconds. Called by :mod:`clsnf.data.images`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

import numpy as np

_CUT = "is cut short"
_PNG_END = b"IEND"
_JPEG_SCAN, _JPEG_END = 0xDA, b"\xff\xd9"
_JPEG_BARE = {0x01, *range(0xD0, 0xD9)}  # markers without a length: TEM, RST0-7, SOI

# TIFF 6.0 section 2 and the BigTIFF design: bytes per value of each field type.
# fmt: off
_TIFF_BYTES = {
    1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4,
    16: 8, 17: 8, 18: 8,
}
# fmt: on
_TIFF_INTEGERS = {3: "u2", 4: "u4", 16: "u8"}
_TIFF_DATA = ((273, 279), (324, 325))  # (offsets, byte counts) of strips and of tiles


def sniff(data: bytes) -> str | None:
    """Pillow's name of the format that the first bytes show; None if it is not read here.

    The name of the file does not matter.
    """
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "TIFF"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    return "BMP" if data.startswith(b"BM") else None


def damage(data: bytes, image_format: str) -> str | None:
    """What is wrong with the structure of a file; None if it is whole.

    The answer follows the file's name in a message (``is cut short ...``). ``image_format`` is
    :func:`sniff`'s answer. BMP needs no check: its decoder counts the bytes of the rows itself.
    """
    check = _CHECKS.get(image_format)
    if check is None:
        return None
    try:
        return check(data)
    except (struct.error, IndexError, OverflowError):
        return f"{_CUT} within its header"


def _png(data: bytes) -> str | None:
    """PNG specification, section 5: chunks of length, type, data, checksum, up to IEND."""
    position = 8
    while position < len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        position += 12 + length
        if kind == _PNG_END and position <= len(data):
            return None
    return f"{_CUT}: its end marker is missing"


def _jpeg(data: bytes) -> str | None:
    """ITU T.81, annex B: segments with lengths up to the first scan.

    Its entropy-coded data can't hold an end marker.
    """
    position = 2
    while data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
        elif marker in _JPEG_BARE:
            position += 2
        else:
            position += 2 + struct.unpack_from(">H", data, position + 2)[0]
            if marker == _JPEG_SCAN:
                whole = data.find(_JPEG_END, position) >= 0
                return None if whole else f"{_CUT}: its end marker is missing"
    return "is damaged: its segments do not follow each other"


def _tiff(data: bytes) -> str | None:
    """TIFF 6.0 and BigTIFF: the first directory, its values and its strips or tiles are in the file."""
    order = "<" if data[:2] == b"II" else ">"
    big = data[2:4] in (b"+\0", b"\0+")
    end = len(data)
    fields: dict[int, tuple[int, int, int]] = {}  # tag -> type, count, position of the values
    for tag, kind, count, position in _tiff_fields(data, order, big):
        if position + count * _TIFF_BYTES.get(kind, 1) > end:
            return f"{_CUT} within its directory"
        fields[tag] = kind, count, position

    for offsets_tag, counts_tag in _TIFF_DATA:
        if offsets_tag in fields and counts_tag in fields:
            offsets, counts = (
                _tiff_integers(data, order, *fields[tag]) for tag in (offsets_tag, counts_tag)
            )
            if len(offsets) == len(counts) and (offsets + counts > end).any():
                missing = np.minimum(counts, np.maximum(offsets + counts - end, 0)).sum()
                return f"{_CUT}: {int(missing)} bytes are missing"
    return None


def _tiff_fields(data: bytes, order: str, big: bool) -> Iterator[tuple[int, int, int, int]]:
    """(tag, type, count, position of the values) of each entry of the first directory."""
    (directory,) = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)
    count_format, entry_format, inline = (
        (order + "Q", order + "HHQ", 8) if big else (order + "H", order + "HHI", 4)
    )
    (entries,) = struct.unpack_from(count_format, data, directory)
    start = directory + struct.calcsize(count_format)
    stride = struct.calcsize(entry_format) + inline
    # The position of the next directory must be in the file.
    struct.unpack_from(order + ("Q" if big else "I"), data, start + entries * stride)
    for entry in range(start, start + entries * stride, stride):
        tag, kind, count = struct.unpack_from(entry_format, data, entry)
        position = entry + stride - inline
        if count * _TIFF_BYTES.get(kind, 1) > inline:
            (position,) = struct.unpack_from(order + ("Q" if big else "I"), data, position)
        yield tag, kind, count, position


def _tiff_integers(data: bytes, order: str, kind: int, count: int, position: int) -> np.ndarray:
    """A field's values as int64; empty if its type is no integer."""
    if kind not in _TIFF_INTEGERS:
        return np.empty(0, np.int64)
    return np.frombuffer(data, order + _TIFF_INTEGERS[kind], count, position).astype(np.int64)


def _webp(data: bytes) -> str | None:
    """The RIFF header states the file's length."""
    missing = 8 + int.from_bytes(data[4:8], "little") - len(data)
    return f"{_CUT}: {missing} bytes are missing" if missing > 0 else None


_CHECKS: dict[str, Callable[[bytes], str | None]] = {
    "PNG": _png,
    "JPEG": _jpeg,
    "TIFF": _tiff,
    "WEBP": _webp,
}
