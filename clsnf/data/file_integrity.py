"""Is an image file whole, and bounded? Read from its structure alone, before a codec sees it.

Codecs can't be trusted with half a file. libjpeg fills the missing part with grey and only warns (a
file whose tail is zeros after a crash passes), PNG decoders stop at the last pixel, and libtiff
writes to standard error. Nor can they be trusted with a file that was made to keep them busy: a
JPEG of half a megabyte that repeats a scan 4000 times takes minutes, and Pillow reads chunks,
padding and directories in Python loops.

The checks here follow the lengths that the container states, never the compressed data. Whatever
they look at piece by piece is counted, and refused where there is more than any real file has: they
cost microseconds for a picture and at most milliseconds for an attack. Called by
:mod:`clsnf.data.images`.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

MAX_PIXELS = 100_000_000  # an image whose header states more is a mistake or an attack

# Real files stay far below these bounds.
MAX_SEGMENTS = 1000  # JPEG: segments, before the first scan
MAX_PARSED_SEGMENTS = 32  # JPEG: segments that Pillow takes apart: EXIF, Photoshop's, tables
MAX_PADDING = 1000  # JPEG: bytes between segments
# JPEG: scans. Progressive files have 10 or so. A scan costs as much as the image has pixels.
MAX_SCANS, FEW_SCANS, MAX_SCANNED_PIXELS = 64, 20, 10**9
MAX_CHUNKS = 1000  # PNG and WebP: chunks. More must hold CHUNK_BYTES each on average.
CHUNK_BYTES = 1024
MAX_PROFILES = 1  # PNG: colour profiles, each of which may inflate to a MiB
MAX_OTHER_CHUNKS = 256  # PNG: chunks that hold no pixels
MAX_ENTRIES = 1000  # TIFF and EXIF: entries of a directory
MAX_VALUES = 3 * 65_536  # TIFF and EXIF: numbers that become objects; a palette has most
MAX_PICTURES = 1000  # TIFF: directories that are counted for the message
MAX_PARTS = 65_536  # TIFF: strips or tiles
MAX_RUN_LENGTH_BYTES = 2**20  # BMP: Pillow decodes run lengths in Python

Bytes = bytes | mmap.mmap
T = TypeVar("T", bound=Bytes)

_CUT = "is cut short"
_AGAIN = "copy it again from its source or remove it"
_ANEW = "save it again with an ordinary program, or remove it"
_PNG_PIXELS, _PNG_END, _PNG_PROFILE = b"IDAT", b"IEND", b"iCCP"
_JPEG_APP1, _JPEG_SCAN, _JPEG_END = 0xE1, 0xDA, 0xD9
_JPEG_BARE = {0x01, *range(0xD0, 0xD9)}  # markers without a length: TEM, RST0-7, SOI
_JPEG_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_LENGTHS = {*range(0xC0, 0xC8), *range(0xC9, 0xD0), *range(0xDA, 0xF0), 0xFE} - {0xDE, 0xDF}
_JPEG_TABLES, _JPEG_PHOTOSHOP = 0xDB, 0xED
_JPEG_FILL = re.compile(rb"\xff{1,%d}" % (MAX_PADDING + 2))
# In a scan, FF is followed by 0 (it is data) or stands before a restart marker.
_JPEG_NEXT = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_EXIF = b"Exif\0\0"

# TIFF 6.0 section 2 and the BigTIFF design: bytes per value of each field type.
# fmt: off
_TIFF_BYTES = {
    1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4,
    16: 8, 17: 8, 18: 8,
}
# fmt: on
_TIFF_TEXTS = (1, 2, 6, 7)  # types whose values stay bytes
_TIFF_LAST_READ = 999  # Pillow looks at no private tag
_TIFF_INTEGERS = {3: "u2", 4: "u4", 16: "u8"}
_TIFF_DATA = ((273, 279), (324, 325))  # (offsets, byte counts) of strips and of tiles
_TIFF_INNER = (
    34665,
    34853,
    40965,
)  # directories that Pillow reads too: EXIF, GPS, interoperability
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

# What files that are not read start with, by name.
_OTHERS = (
    (b"GIF8", "a GIF picture"),
    (b"%PDF", "a PDF document"),
    (b"PK\3\4", "a ZIP archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\xff\x4f\xff\x51", "a JPEG 2000 picture"),
    (b"\0\0\0\x0cjP  ", "a JPEG 2000 picture"),
    (b"\xff\x0a", "a JPEG XL picture"),
    (b"\0\0\0\x0cJXL ", "a JPEG XL picture"),
    (b"8BPS", "a Photoshop file"),
    (b"v/1\x01", "an OpenEXR picture"),
    (b"#?RADIANCE", "an HDR picture"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x89HDF", "an HDF5 file"),
    (b"Pf", "a PFM picture of floating point values"),
    (b"PF", "a PFM picture of floating point values"),
    (b"P7", "a PAM picture"),
)
# The brands of the ISO base media file format, which starts with a length and "ftyp".
_BRANDS = {
    b"avif": "an AVIF picture",
    b"avis": "an AVIF picture",
    b"crx ": "a raw picture of a camera",
    b"qt  ": "a video",
}
_HEIC_BRANDS = (b"hei", b"hev", b"mif1", b"msf1", b"miaf")
_MARKUP = re.compile(rb"\s*<(?:\?xml|!doctype|!--|html|svg)", re.IGNORECASE)


def sniff(data: Bytes) -> str | None:
    """Pillow's name of the format that the first bytes show; None if it is not read here.

    The name of the file does not matter.
    """
    start = data[:12]
    if start.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if start.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if start.startswith(_TIFF_STARTS):
        return "TIFF"
    if start.startswith(b"RIFF") and start[8:12] == b"WEBP":
        return "WEBP"
    if re.match(rb"P[1-6][\s#]", start):
        return "PPM"
    return "BMP" if start.startswith(b"BM") else None


def named_kind(data: Bytes) -> str | None:
    """What a file that is not read here is, such as ``a GIF picture``; None if it is unknown."""
    start = bytes(data[:256])
    if start[4:8] == b"ftyp":
        brand = start[8:12]
        if brand.startswith(_HEIC_BRANDS):
            return "a HEIC picture"
        return _BRANDS.get(brand, "a video")
    if start[128:132] == b"DICM":
        return "a DICOM file"
    if _MARKUP.match(start):
        return "an SVG drawing" if b"<svg" in data[:4096].lower() else "a page of markup"
    return next((name for prefix, name in _OTHERS if start.startswith(prefix)), None)


def damage(data: bytes, image_format: str) -> str | None:
    """What is wrong with the structure of a file; None if it is whole, and within the bounds.

    The answer follows the file's name in a message and says what to do (``is cut short ...: copy it
    again ...``). ``image_format`` is :func:`sniff`'s answer. PPM is checked where it is read.
    """
    check = {"PNG": _png, "JPEG": _jpeg}.get(image_format)
    return header_damage(data, image_format) if check is None else _answer(check, data)


def header_damage(data: Bytes, image_format: str) -> str | None:
    """As :func:`damage`, but of the header alone: pixels may be missing."""
    check = _HEADER_CHECKS.get(image_format)
    return None if check is None else _answer(check, data)


def _answer(check: Callable[[T], str | None], data: T) -> str | None:
    try:
        return check(data)
    except (struct.error, IndexError, OverflowError):
        return _cut(" within its header")


def _cut(how: str) -> str:
    return f"{_CUT}{how}: {_AGAIN}"


def _too_many(limit: int, of: str) -> str:
    return f"has more than {limit} {of}, as no picture needs: {_ANEW}"


def _too_large(width: int, height: int) -> str:
    return (
        f"announces {width}x{height} pixels, more than the {MAX_PIXELS // 10**6} megapixels that "
        "are read: crop or scale it, or remove it"
    )


# ---- PNG ----


def _png(data: Bytes) -> str | None:
    return _png_chunks(data, header=False)


def _png_header(data: Bytes) -> str | None:
    return _png_chunks(data, header=True)


def _png_chunks(data: Bytes, *, header: bool) -> str | None:
    """PNG specification, section 5: chunks of length, type, data, checksum, up to IEND."""
    position, end, chunks, others, profiles = 8, len(data), 0, 0, 0
    while position < end:
        length, kind = struct.unpack_from(">I4s", data, position)
        position += 12 + length
        chunks += 1
        if chunks > MAX_CHUNKS + position // CHUNK_BYTES:
            return _too_many(MAX_CHUNKS, "chunks of next to nothing")
        if kind == _PNG_PIXELS:
            if header:
                return None
            continue
        if kind == _PNG_END and position <= end:
            return None
        others += 1
        profiles += kind == _PNG_PROFILE
        if others > MAX_OTHER_CHUNKS:
            return _too_many(MAX_OTHER_CHUNKS, "chunks without pixels")
        if profiles > MAX_PROFILES:
            return _too_many(MAX_PROFILES, "colour profile")
    return _cut(": its end marker is missing")


# ---- JPEG ----


@dataclass(frozen=True)
class _JpegHeader:
    """Where the data of the first scan begins, and the image's pixels."""

    data: int
    pixels: int


def _jpeg_header(data: Bytes) -> str | None:
    found = _jpeg_segments(data)
    return found if isinstance(found, str) else None


def _jpeg(data: bytes) -> str | None:
    found = _jpeg_segments(data)
    if isinstance(found, str):
        return found
    if data.find(b"\xff\xd9", found.data) < 0:
        return _cut(": its end marker is missing")
    return _jpeg_scans(data, found)


def _jpeg_segments(data: Bytes) -> str | _JpegHeader:
    """ITU T.81, annex B: segments with lengths up to the first scan, or what is wrong with them."""
    position, segments, padding, pixels, parsed = 2, 0, 0, 0, 0
    exif = []
    while data[position] == 0xFF:
        fill = _JPEG_FILL.match(data, position)
        assert fill is not None  # the byte is one
        padding += fill.end() - position - 1
        position = fill.end() - 1
        segments += 1
        if padding > MAX_PADDING:
            return _too_many(MAX_PADDING, "bytes of padding")
        if segments > MAX_SEGMENTS:
            return _too_many(MAX_SEGMENTS, "segments")
        marker = data[position + 1]
        if marker in _JPEG_BARE:
            position += 2
            continue
        if marker not in _JPEG_LENGTHS:
            break
        start = position + 4
        position += 2 + struct.unpack_from(">H", data, position + 2)[0]
        if marker in _JPEG_FRAMES:
            height, width = struct.unpack_from(">HH", data, start + 1)
            pixels = max(pixels, height * width)
            continue
        if marker == _JPEG_APP1 and data[start : start + 6] == _EXIF:
            exif.append(data[start + 6 : position])
        elif marker == _JPEG_SCAN:
            return _exif(b"".join(exif)) or _JpegHeader(position, pixels)
        elif marker not in (_JPEG_TABLES, _JPEG_PHOTOSHOP):
            continue
        parsed += 1
        if parsed > MAX_PARSED_SEGMENTS:
            return _too_many(MAX_PARSED_SEGMENTS, "segments of tables, EXIF and the like")
    return f"is damaged: its segments do not follow each other: {_AGAIN}"


def _jpeg_scans(data: bytes, header: _JpegHeader) -> str | None:
    """Refuse more scans than the image's size may have."""
    allowed = max(FEW_SCANS, min(MAX_SCANS, MAX_SCANNED_PIXELS // max(1, header.pixels)))
    # Every later scan has this marker. It may also stand within a segment, or in a second image
    # after the end: only where there are many is it worth to look which of them are scans.
    if data.count(b"\xff\xda", header.data) < allowed:
        return None
    position, scans, segments = header.data, 1, 0
    while (found := _JPEG_NEXT.search(data, position)) is not None:
        marker = data[found.start() + 1]
        if marker == _JPEG_END:
            return None
        scans += marker == _JPEG_SCAN
        segments += 1
        if scans > allowed:
            return _too_many(allowed, "scans")
        if segments > MAX_SEGMENTS:
            return _too_many(MAX_SEGMENTS, "segments")
        position = found.end()
        if marker not in _JPEG_BARE:
            position += struct.unpack_from(">H", data, position)[0]
    return _cut(": its end marker is missing")


def _exif(data: bytes) -> str | None:
    """The directory of EXIF data, if Pillow will read it. Damage of another kind is its own."""
    while data.startswith(_EXIF):  # Pillow skips it twice
        data = data[len(_EXIF) :]
    if not data.startswith(_TIFF_STARTS):
        return None
    try:
        return _Tiff(data).exif_damage()
    except (struct.error, IndexError, OverflowError):
        return None


# ---- TIFF ----


@dataclass(frozen=True)
class _Field:
    """An entry of a directory: its type, its count of values, and their position."""

    kind: int
    count: int
    position: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.count * _TIFF_BYTES.get(self.kind, 1)


class _Tiff:
    """TIFF 6.0 or BigTIFF. Methods raise struct.error where a number lies outside the file."""

    def __init__(self, data: Bytes) -> None:
        self._data = data
        self._order = "<" if data[:2] == b"II" else ">"
        self._big = data[2:4] in (b"+\0", b"\0+")
        self._offset = self._order + ("Q" if self._big else "I")
        self._entry = self._order + ("HHQ" if self._big else "HHI")
        self._inline = 8 if self._big else 4
        (self._first,) = struct.unpack_from(self._offset, data, 8 if self._big else 4)

    def damage(self) -> str | None:
        """The first directory, its values and its strips or tiles lie inside; there is no other."""
        fields = self._directory(self._first)
        if fields is None:
            return _too_many(MAX_ENTRIES, "entries in a directory")
        end = len(self._data)
        if any(field.position + field.size > end for field in fields.values()):
            return _cut(" within its directory")
        read = {tag: fields[tag] for tag in fields if tag <= _TIFF_LAST_READ}
        for tags in _TIFF_DATA:
            read = {tag: read[tag] for tag in read if tag not in tags}
        return (
            self._excess(fields, read)
            or self._inner_damage(fields)
            or self._pictures()
            or self._parts(fields)
        )

    def exif_damage(self) -> str | None:
        """What Pillow reads of EXIF data: the first directory and those inside it."""
        return self._all_read(self._first, depth=2)

    def _all_read(self, start: int, depth: int) -> str | None:
        """A directory of which Pillow reads all values, and those inside it."""
        fields = self._directory(start)
        if fields is None:
            return _too_many(MAX_ENTRIES, "entries in a directory")
        return self._excess(fields, fields) or self._inner_damage(fields, depth)

    def _inner_damage(self, fields: dict[int, _Field], depth: int = 2) -> str | None:
        """Too much in the directories that a directory names. Other damage there is Pillow's."""
        for tag in _TIFF_INNER:
            if tag not in fields or not depth:
                continue
            try:
                kind = {2: "H", 4: "I", 8: "Q"}[fields[tag].size]
                (start,) = struct.unpack_from(self._order + kind, self._data, fields[tag].position)
                problem = self._all_read(start, depth - 1)
            except (KeyError, struct.error):
                continue
            if problem:
                return problem
        return None

    def _directory(self, start: int) -> dict[int, _Field] | None:
        """The fields of a directory by tag; None if there are too many."""
        entries, start, stride = self._entries(start)
        if entries > MAX_ENTRIES:
            return None
        fields = {}
        for entry in range(start, start + entries * stride, stride):
            tag, kind, count = struct.unpack_from(self._entry, self._data, entry)
            field = _Field(kind, count, entry + stride - self._inline)
            if field.size > self._inline:
                (position,) = struct.unpack_from(self._offset, self._data, field.position)
                field = _Field(kind, count, position)
            fields[tag] = field
        return fields

    def _entries(self, start: int) -> tuple[int, int, int]:
        """The number of entries of a directory, the position of the first, and their distance."""
        count = self._order + ("Q" if self._big else "H")
        (entries,) = struct.unpack_from(count, self._data, start)
        return (
            entries,
            start + struct.calcsize(count),
            struct.calcsize(self._entry) + self._inline,
        )

    def _excess(self, fields: dict[int, _Field], read: dict[int, _Field]) -> str | None:
        """Values that Pillow would copy, and those that it would make objects of."""
        end = len(self._data)
        # Small values may share their place in the file.
        if sum(min(f.size, end) for f in fields.values() if f.size > self._inline) > 2 * end:
            return f"has a directory whose values overlap: {_ANEW}"
        if sum(f.count for f in read.values() if f.kind not in _TIFF_TEXTS) > MAX_VALUES:
            return _too_many(MAX_VALUES, "values in a directory")
        return None

    def _pictures(self) -> str | None:
        """One directory is one picture."""
        seen: set[int] = set()
        start = self._first
        while start and start not in seen:
            seen.add(start)
            if len(seen) > MAX_PICTURES:
                return f"holds more than {MAX_PICTURES} pictures: save each as a file of its own"
            entries, first, stride = self._entries(start)
            # The position of the next directory must be in the file.
            (start,) = struct.unpack_from(self._offset, self._data, first + entries * stride)
        if len(seen) > 1:
            return f"holds {len(seen)} pictures: save each as a file of its own"
        return None

    def _parts(self, fields: dict[int, _Field]) -> str | None:
        """The strips or tiles."""
        end = len(self._data)
        for tags in _TIFF_DATA:
            if any(tag in fields and fields[tag].count > MAX_PARTS for tag in tags):
                return _too_many(MAX_PARTS, "strips or tiles")
            if not all(tag in fields for tag in tags):
                continue
            offsets, counts = (self._integers(fields[tag]) for tag in tags)
            if len(offsets) == len(counts) and (offsets + counts > end).any():
                missing = np.minimum(counts, np.maximum(offsets + counts - end, 0)).sum()
                return _cut(f": {int(missing)} bytes are missing")
        return None

    def _integers(self, field: _Field) -> np.ndarray:
        """A field's values as int64; empty if its type is no integer."""
        if field.kind not in _TIFF_INTEGERS:
            return np.empty(0, np.int64)
        kind = self._order + _TIFF_INTEGERS[field.kind]
        return np.frombuffer(self._data, kind, field.count, field.position).astype(np.int64)


def _tiff(data: Bytes) -> str | None:
    return _Tiff(data).damage()


# ---- WebP and BMP ----


def _webp(data: Bytes) -> str | None:
    """RIFF: a length, then chunks of type, length and data, padded to an even length."""
    end = 8 + int.from_bytes(data[4:8], "little")
    if end > len(data):
        return _cut(f": {end - len(data)} bytes are missing")
    position, chunks = 12, 0
    while position + 8 <= end:
        kind, length = struct.unpack_from("<4sI", data, position)
        start = position + 8
        position = start + length + length % 2
        chunks += 1
        if chunks > MAX_CHUNKS:
            return _too_many(MAX_CHUNKS, "chunks")
        if kind == b"VP8X":  # Pillow makes a canvas of this size before it tells it
            width, height = (
                1 + int.from_bytes(data[at : at + 3], "little") for at in (start + 4, start + 7)
            )
            if width * height > MAX_PIXELS:
                return _too_large(width, height)
        elif kind == b"EXIF":
            problem = _exif(data[start:position])
            if problem:
                return problem
    return None


def _bmp(data: Bytes) -> str | None:
    """Its decoder counts the bytes of the rows itself; run lengths are decoded in Python."""
    if int.from_bytes(data[14:18], "little") >= 40:
        compression = int.from_bytes(data[30:34], "little")
        if compression in (1, 2) and len(data) > MAX_RUN_LENGTH_BYTES:
            return (
                f"is a BMP of run lengths with more than {MAX_RUN_LENGTH_BYTES >> 20} MiB: save "
                "the image as a PNG"
            )
    return None


_HEADER_CHECKS: dict[str, Callable[[Bytes], str | None]] = {
    "PNG": _png_header,
    "JPEG": _jpeg_header,
    "TIFF": _tiff,
    "WEBP": _webp,
    "BMP": _bmp,
}
