"""What a request's body holds: one image, a raw frame, or the files of a form.

A *form* finds the images in a body and says where they lie; it decodes none. It runs in a worker of
:mod:`clsnf.serving.reading_pool`. Nothing about a body is trusted: clients may send anything, so
counts and lengths are bounded before a loop runs over them. The bodies of the Open Inference
Protocol are in :mod:`clsnf.serving.tensors`.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from email.message import Message
from email.parser import HeaderParser
from typing import Protocol

from clsnf.serving.errors import BadRequest, ContentTooLarge

_HEADERS = 8192  # bytes of the headers of one part
_WHITESPACE = b" \t"


@dataclass(frozen=True)
class Item:
    """An image in a body's data, from `start` to `stop`.

    Attributes:
        name: for messages and answers.
        shape: (height, width, channels) of pixels, uint8, 1 or 3 channels; None for a file.
    """

    name: str
    start: int
    stop: int
    shape: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class InferHead:
    """What an inference request asks for beside its images.

    Attributes:
        id: of the request; the response repeats it.
        outputs: names of the outputs, each with whether it shall come as binary data.
    """

    id: str | None
    outputs: dict[str, bool]


@dataclass(frozen=True)
class ParsedBody:
    """The images of a body.

    Attributes:
        data: where they lie.
        items: at least one.
        head: of an inference request, else None.
    """

    data: memoryview
    items: tuple[Item, ...]
    head: InferHead | None = None


class BodyForm(Protocol):
    """How a body is read; pickled, and so small."""

    def parse(self, data: memoryview) -> ParsedBody:
        """The images in a body's bytes. Raises BadRequest, ContentTooLarge."""


@dataclass(frozen=True)
class FileBody:
    """The body is a file: PNG, JPEG and so on."""

    name: str = "the image"

    def parse(self, data: memoryview) -> ParsedBody:
        return ParsedBody(data, (Item(self.name, 0, len(data)),))


@dataclass(frozen=True)
class FrameBody:
    """The body is the pixels of one image, row by row, uint8, RGB or grey.

    Attributes:
        shape: (height, width, channels).
    """

    shape: tuple[int, int, int]
    name: str = "the image"

    def parse(self, data: memoryview) -> ParsedBody:
        height, width, channels = self.shape
        if len(data) != height * width * channels:
            raise BadRequest(
                f"{self.name} has {len(data)} bytes: its shape {height}x{width}x{channels} has "
                f"{height * width * channels}."
            )
        return ParsedBody(data, (Item(self.name, 0, len(data), self.shape),))


@dataclass(frozen=True)
class MultipartBody:
    """The body is a form (RFC 7578); each of its parts is a file, whatever its name.

    Attributes:
        boundary: as the request's Content-Type names it.
        max_images: that one request may hold.
    """

    boundary: bytes
    max_images: int

    def parse(self, data: memoryview) -> ParsedBody:
        body, line = bytes(data), b"--" + self.boundary
        position = 0 if body.startswith(line) else body.find(b"\r\n" + line) + 2
        if position == 1:
            raise BadRequest("The multipart body does not hold the boundary of its Content-Type.")
        position += len(line)
        items: list[Item] = []
        while body[position : position + 2] != b"--":
            if len(items) == self.max_images:
                raise too_many_images(self.max_images)
            name, start = _part_head(body, position, len(items) + 1)
            stop = body.find(b"\r\n" + line, start)
            if stop < 0:
                raise BadRequest(
                    "The multipart body has no end: it was cut short, or lacks its last boundary."
                )
            items.append(Item(name, start, stop))
            position = stop + 2 + len(line)
        if not items:
            raise BadRequest("The multipart body holds no files: send one or more images.")
        return ParsedBody(data, tuple(items))


def _part_head(body: bytes, position: int, number: int) -> tuple[str, int]:
    """A part's name and the start of its content, from the end of its boundary."""
    line_end = body.find(b"\r\n", position, position + 100)
    if line_end < 0 or body[position:line_end].strip(_WHITESPACE):
        raise BadRequest(
            "The multipart body is cut short or damaged: a boundary is no line of its own."
        )
    end = body.find(b"\r\n\r\n", line_end, line_end + _HEADERS)
    if end < 0:
        raise BadRequest(
            f"The headers of part {number} of the multipart body have no end within {_HEADERS} "
            "bytes."
        )
    headers = HeaderParser().parsestr(body[line_end + 2 : end].decode("utf-8", "replace"))
    try:
        name = headers.get_filename() or ""
    except Exception as error:  # the parser of the standard library raises nearly anything
        raise BadRequest(
            f"The headers of part {number} of the multipart body can't be read."
        ) from (error)
    printable = "".join(c if c.isprintable() else "?" for c in name)
    return printable or f"image {number}", end + 4


def boundary_of(content_type: str) -> bytes:
    """The boundary that a Content-Type names. Raises BadRequest."""
    message = Message()
    message["Content-Type"] = content_type
    try:
        boundary = (message.get_boundary() or "").encode("latin-1")
    except Exception as error:  # as above
        raise BadRequest("The boundary of the multipart body can't be read.") from error
    if not 1 <= len(boundary) <= 200:
        raise BadRequest(
            "A multipart body needs a boundary of 1 to 70 characters in its Content-Type."
        )
    return boundary


def too_many_images(max_images: int) -> ContentTooLarge:
    return ContentTooLarge(
        f"There are more than {max_images} images in one request: at most {max_images} are looked "
        "at together. Send them in several requests."
    )


def too_large(limit: int) -> ContentTooLarge:
    return ContentTooLarge(
        f"The body is larger than {limit / 2**20:g} MiB: scale images down, or send fewer of them."
    )


def decompressed(data: memoryview, encoding: str, limit: int) -> memoryview:
    """A body without its encoding (``gzip``, ``deflate``, or ``""``), of at most `limit` bytes.

    Raises:
        BadRequest: it is no whole stream.
        ContentTooLarge: it has more bytes.
    """
    if not encoding:
        return data
    decompressor = zlib.decompressobj(wbits=31 if encoding == "gzip" else 15)
    try:
        plain = decompressor.decompress(data, limit + 1)
    except zlib.error as error:
        raise BadRequest(f"The body is no whole {encoding} stream: {error}.") from error
    if len(plain) > limit:
        raise too_large(limit)
    if not decompressor.eof:
        raise BadRequest(f"The body is cut short: its {encoding} stream has no end.")
    return memoryview(plain)
