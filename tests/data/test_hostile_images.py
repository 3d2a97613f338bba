"""Files that were made to keep a decoder busy, or are of another kind, are refused in one line."""

import io
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clsnf.core.errors import ImageError
from clsnf.data import file_integrity
from clsnf.data.file_integrity import damage, sniff
from clsnf.data.images import announced_size, decode_image, decode_mask, image_size
from tests.data.test_images import FILES, RGB, encode

# Far more than a check may look at, and few enough for a quick test.
MANY = 100_000


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(extra: bytes) -> bytes:
    """Chunks after the header of a picture."""
    data = FILES["rgb.png"][0]
    return data[:33] + extra + data[33:]


def jpeg_with(extra: bytes) -> bytes:
    """Bytes before the first segment of a picture."""
    data = FILES["rgb.jpg"][0]
    return data[:2] + extra + data[2:]


def segment(marker: int, data: bytes = b"") -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def with_scans(count: int, hidden: bytes = b"") -> bytes:
    """A progressive JPEG whose last scan is there ``count`` times more, after a segment."""
    data = FILES["progressive.jpg"][0]
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + hidden + last * count + data[-2:]


def directory(entries: list[tuple[int, int, int, int]], following: int = 0) -> bytes:
    packed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return struct.pack("<H", len(entries)) + packed + struct.pack("<I", following)


def exif_with(entries: list[tuple[int, int, int, int]], rest: bytes = b"") -> bytes:
    return b"Exif\0\0II*\0" + struct.pack("<I", 8) + directory(entries) + rest


def chained_tiff(pictures: int) -> bytes:
    parts = [b"II*\0", struct.pack("<I", 8)]
    for number in range(1, pictures + 1):
        following = 8 + number * 18 if number < pictures else 0
        parts.append(directory([(256, 4, 1, 1)], following))
    return b"".join(parts)


def big_tiff(entries: int) -> bytes:
    return b"II+\0" + struct.pack("<HHQQ", 8, 0, 16, entries) + bytes(20 * entries + 8)


def striped_tiff(strips: int) -> bytes:
    fields = [
        (256, 4, 1, 16), (257, 4, 1, strips), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1),
        (273, 4, strips, 200), (278, 4, 1, 1), (279, 4, strips, 200),
    ]  # fmt: skip
    start = b"II*\0" + struct.pack("<I", 8) + directory(fields)
    return start.ljust(200, b"\0") + struct.pack("<I", 16) * strips


def webp_with(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"WEBP" + b"".join(kind + struct.pack("<I", len(d)) + d for kind, d in chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def run_length_bmp(length: int) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, 64, 64, 1, 8, 1, length, 0, 0, 256, 0)
    start = 14 + len(header) + 1024
    return (
        b"BM"
        + struct.pack("<IHHI", start + length, 0, 0, start)
        + header
        + bytes(1024)
        + b"\0\2\0\0" * (length // 4)  # moves by nothing
    )


OVERLAPPING = [(tag, 7, 60_000, 0) for tag in range(900)]

HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "scans.jpg": (lambda: with_scans(4000), "more than 64 scans"),
    # The end marker that a search would find is the content of a comment.
    "hidden_scans.jpg": (
        lambda: with_scans(4000, segment(0xFE, b"\xff\xd9")),
        "more than 64 scans",
    ),
    "fill.jpg": (lambda: jpeg_with(b"\xff" * MANY), "more than 1000 bytes of padding"),
    "restarts.jpg": (lambda: jpeg_with(b"\xff\xd0" * MANY), "more than 1000 segments"),
    "segments.jpg": (lambda: jpeg_with(segment(0xE5) * MANY), "more than 1000 segments"),
    "segments_between_scans.jpg": (
        lambda: with_scans(50, segment(0xFE, b"\xff\xda") * MANY),
        "more than 1000 segments",
    ),
    "exif_segments.jpg": (
        lambda: jpeg_with(segment(0xE1, b"Exif\0\0" + bytes(60_000)) * 33),
        "more than 32 segments of tables, EXIF",
    ),
    "photoshop.jpg": (
        lambda: jpeg_with(segment(0xED, b"Photoshop 3.0\0" + b"8BIM" * 10_000) * 33),
        "more than 32 segments of tables, EXIF",
    ),
    "tables.jpg": (
        lambda: jpeg_with(segment(0xDB, bytes(65 * 1000)) * 33),
        "more than 32 segments of tables, EXIF",
    ),
    # Pillow would look at each byte of what stands behind such a marker.
    "unknown_marker.jpg": (
        lambda: jpeg_with(segment(0xF3, b"\xff" * 60_000) * 900),
        "segments do not follow each other",
    ),
    "escaped_byte.jpg": (
        lambda: jpeg_with(segment(0x00, b"\xff" * 60_000) * 900),
        "segments do not follow each other",
    ),
    "exif_entries.jpg": (
        lambda: jpeg_with(segment(0xE1, exif_with([(9, 3, 1, 0)] * 4000))),
        "more than 1000 entries",
    ),
    "exif_overlap.jpg": (
        lambda: jpeg_with(segment(0xE1, exif_with(OVERLAPPING, bytes(50_000)))),
        "whose values overlap",
    ),
    "exif_inner.jpg": (
        lambda: jpeg_with(
            segment(0xE1, exif_with([(34665, 4, 1, 26)], directory([(9, 3, 1, 0)] * 4000)))
        ),
        "more than 1000 entries",
    ),
    "chunks.png": (lambda: png_with(chunk(b"IDAT") * MANY), "more than 1000 chunks"),
    "texts.png": (
        lambda: png_with(chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**20))) * 300),
        "more than 256 chunks without pixels",
    ),
    "profiles.png": (
        lambda: png_with(chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2**20))) * 2),
        "more than 1 colour profile",
    ),
    "entries.tif": (lambda: big_tiff(MANY), "more than 1000 entries"),
    "pictures.tif": (lambda: chained_tiff(MANY), "more than 1000 pictures"),
    "strips.tif": (lambda: striped_tiff(MANY), "more than 65536 strips or tiles"),
    "rationals.tif": (
        lambda: b"II*\0" + struct.pack("<I", 8) + directory([(282, 5, 200_000, 30)]) + bytes(2**21),
        "more than 196608 values",
    ),
    "frames.webp": (lambda: webp_with(*[(b"ANMF", b"")] * MANY), "more than 1000 chunks"),
    "canvas.webp": (
        lambda: webp_with((b"VP8X", bytes(4) + (59_999).to_bytes(3, "little") * 2)),
        "announces 60000x60000 pixels",
    ),
    "exif.webp": (
        lambda: webp_with((b"EXIF", exif_with([(9, 3, 1, 0)] * 4000))),
        "more than 1000 entries",
    ),
    "runs.bmp": (lambda: run_length_bmp(2**21), "run lengths with more than 1 MiB"),
    "spaces.ppm": (lambda: b"P5" + b" " * MANY + b"1 1 255 a", "damaged header"),
    "comments.ppm": (lambda: b"P5" + b"#\n" * MANY + b"1 1 255 a", "damaged header"),
    "large.ppm": (lambda: b"P5 20000 20000 255 ", "more than the 100 megapixels"),
}


class Steps:
    """Counts the lines of the checks that are executed while it is active."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> "Steps":
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _trace(self, frame: Any, event: str, _: object) -> Any:
        if frame.f_code.co_filename != file_integrity.__file__:
            return None
        self.count += event == "line"
        return self._trace


@pytest.mark.parametrize("name", HOSTILE)
def test_what_would_keep_a_decoder_busy_is_refused_in_one_line(name: str) -> None:
    make, message = HOSTILE[name]
    data = make()
    for decode in (decode_image, decode_mask):
        with pytest.raises(ImageError, match=rf"^{name} .*{message}") as caught:
            decode(data, name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [name for name in HOSTILE if not name.endswith("ppm")])
def test_the_refusal_looks_at_few_items(name: str) -> None:
    data = HOSTILE[name][0]()
    image_format = sniff(data)
    assert image_format is not None
    with Steps() as steps:
        assert damage(data, image_format)
    assert steps.count < 30_000


# What lies behind the header is not looked at.
@pytest.mark.parametrize("name", [n for n in HOSTILE if "scans" not in n and n != "chunks.png"])
def test_a_size_is_not_asked_of_what_is_refused(name: str, tmp_path: Path) -> None:
    make, message = HOSTILE[name]
    path = tmp_path / name
    path.write_bytes(make())
    for ask in (image_size, lambda file: announced_size(file.read_bytes(), str(file))):
        with pytest.raises(ImageError, match=message):
            ask(path)


def test_the_scans_that_encoders_write_are_read() -> None:
    for count in (0, 10):
        assert decode_image(with_scans(count), "p.jpg").shape == RGB.shape


def test_a_large_image_may_have_fewer_scans() -> None:
    data = bytearray(with_scans(30))
    assert damage(bytes(data), "JPEG") is None
    frame = data.index(b"\xff\xc2")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 7000, 7000)
    assert "more than 20 scans" in str(damage(bytes(data), "JPEG"))


def test_scan_markers_behind_the_image_are_not_its_scans() -> None:
    data = FILES["rgb.jpg"][0] + b"\xff\xda" * 5000
    assert decode_image(data, "preview.jpg").shape == RGB.shape


def test_many_chunks_with_content_are_read() -> None:
    data = FILES["rgb.png"][0]
    noise = np.random.default_rng(0).integers(0, 256, (1000, 1000, 3), dtype=np.uint8)
    data = encode(noise, "PNG")
    start = data.index(b"IDAT") - 4
    body, position = b"", start
    while data[position + 4 : position + 8] == b"IDAT":
        (length,) = struct.unpack_from(">I", data, position)
        body += data[position + 8 : position + 8 + length]
        position += 12 + length
    parts = b"".join(chunk(b"IDAT", body[i : i + 1100]) for i in range(0, len(body), 1100))
    assert np.array_equal(decode_image(data[:start] + parts + data[position:], "n.png"), noise)


def ftyp(brand: bytes) -> bytes:
    return struct.pack(">I", 24) + b"ftyp" + brand + bytes(4) + b"mif1" + brand + bytes(200)


OTHERS = {
    "HEIC": ftyp(b"heic"),
    "AVIF": ftyp(b"avif"),
    "a video": ftyp(b"mp42"),
    "GIF": encode(RGB, "GIF"),
    "PDF": b"%PDF-1.7\n",
    "ZIP": b"PK\3\4" + bytes(30),
    "JPEG 2000": b"\0\0\0\x0cjP  \r\n\x87\n",
    "SVG": b"<?xml version='1.0'?><!-- drawn --><svg xmlns='http://www.w3.org/2000/svg'/>",
    "page of markup": b"<!DOCTYPE html><html><body>404</body></html>",
    "DICOM": bytes(128) + b"DICM" + bytes(20),
    "PNM of text": b"P2 1 1 255 7",
    "PFM": b"Pf 1 1 -1.0\n",
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_file_of_another_kind_is_called_by_its_name(name: str, tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    path.write_bytes(OTHERS[name])
    for read in (lambda file: decode_image(file.read_bytes(), str(file)), image_size):
        with pytest.raises(ImageError, match=rf"p.png is .*{name}.*, a format that is not read: "):
            read(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"P5 2 2 255\n123", "1 bytes are missing"),
        (b"P5 2 2 255\n12345", "holds 1 bytes after its 2x2 pixels"),
        (b"P5 2 2 0\n1234", "levels up to 0"),
        (b"P5 2 2 70000\n12341234", "levels up to 70000"),
        (b"P6 0 2 255\n", "announces 0x2 pixels"),
        (b"P5 2 two 255\n1234", "damaged header"),
    ],
)
def test_a_raw_frame_of_another_length_or_with_absurd_numbers_is_refused(
    data: bytes, message: str
) -> None:
    with pytest.raises(ImageError, match=rf"^f.pgm .*{message}"):
        decode_image(data, "f.pgm")


def test_a_frame_s_greatest_level_is_white() -> None:
    small = decode_image(b"P5 2 2 7\n\0\1\7\x09", "f.pgm")
    assert small[..., 0].tolist() == [[0, 36], [255, 255]]
    twelve = decode_image(b"P5 2 1 4095\n" + struct.pack(">HH", 4095, 16), "f.pgm")
    assert twelve[..., 1].tolist() == [[255, 1]]


def test_pictures_are_copied_from_pillow_without_a_change() -> None:
    shapes: dict[str, tuple[int, ...]] = {"RGB": (3,), "RGBA": (4,), "L": ()}
    for mode, channels in shapes.items():
        levels = np.random.default_rng(1).integers(0, 256, (33, 47, *channels), dtype=np.uint8)
        data = encode(Image.fromarray(levels), "PNG")
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert np.array_equal(decode_image(data, mode), expected)
