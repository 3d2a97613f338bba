"""Bodies of HTTP requests, within limits: raw, multipart, compressed.

Nothing about a body is trusted: clients may send anything.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncGenerator, Awaitable

from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from clsnf.serving.errors import BadRequest, ContentTooLarge, RequestTimeout, UnsupportedMediaType

IMAGE_TYPES = (
    "image/png",
    "image/jpeg",
    "image/bmp",
    "image/tiff",
    "image/webp",
    "image/x-portable-anymap",
    "image/x-portable-bitmap",
    "image/x-portable-graymap",
    "image/x-portable-pixmap",
    "application/octet-stream",
)
MULTIPART = "multipart/form-data"
# Both say nothing about the body: the second one is curl's default.
_UNSPECIFIED = ("", "application/x-www-form-urlencoded")


def media_type(request: Request) -> str:
    """The body's type, without parameters, in lower case.

    ``application/octet-stream`` where the request names none.
    """
    named = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return "application/octet-stream" if named in _UNSPECIFIED else named


async def read_body(request: Request, limit: int) -> bytes:
    """The body, decompressed, of at most `limit` bytes.

    Raises:
        ContentTooLarge: it has more bytes.
        UnsupportedMediaType: an encoding that is not read.
        BadRequest: it is damaged or broke off.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise _too_large(limit)
    parts, size = [], 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit:
                raise _too_large(limit)
            parts.append(chunk)
    except ClientDisconnect as error:
        raise BadRequest("The request broke off within its body.") from error
    return _decompressed(
        b"".join(parts), request.headers.get("content-encoding", "").strip().lower(), limit
    )


async def read_before(deadline: float, reading: Awaitable[bytes]) -> bytes:
    """The result of `reading` a body, if it is there by `deadline`, a time of the event loop.

    Raises:
        RequestTimeout: it is not.
    """
    try:
        async with asyncio.timeout_at(deadline):
            return await reading
    except TimeoutError as error:
        raise RequestTimeout(
            "The body did not arrive before the deadline: is the network slow?"
        ) from error


async def image_files(request: Request, body: bytes, max_images: int) -> list[tuple[str, bytes]]:
    """Names and bytes of the images in a raw or multipart body.

    Raises:
        UnsupportedMediaType: a body of another kind.
        ContentTooLarge: more than `max_images` of them.
        BadRequest: a multipart body that is damaged or holds none.
    """
    found = media_type(request)
    if found == MULTIPART:
        return await _multipart_files(request.headers, body, max_images)
    if found not in IMAGE_TYPES:
        raise UnsupportedMediaType(
            f"A body of type {found[:100]!r} is not read: send one of "
            f"{', '.join((*IMAGE_TYPES, MULTIPART))}."
        )
    return [("the image", body)]


async def _multipart_files(
    headers: Headers, body: bytes, max_images: int
) -> list[tuple[str, bytes]]:
    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    limit = max_images + 1
    parser = MultiPartParser(headers, stream(), max_files=limit, max_fields=limit)
    parser.spool_max_size = len(body) + 1  # the body is in memory already: no files on the disk
    try:
        form = await parser.parse()
    except MultiPartException as error:
        if error.message.startswith("Too many files"):
            raise _too_many_images(max_images) from error
        raise BadRequest(f"The multipart body can't be read: {error.message}") from error
    except Exception as error:  # the parser raises nearly anything on damaged headers
        raise BadRequest(
            f"The multipart body is damaged ({type(error).__name__}): send it again."
        ) from error
    files = []
    for index, (field, part) in enumerate(form.multi_items()):
        if not isinstance(part, UploadFile):
            raise BadRequest(f"The part {field[:100]!r} is no file: give it a file name.")
        files.append((part.filename or f"image {index + 1}", await part.read()))
    await form.close()
    if not files:
        raise BadRequest("The multipart body holds no files: send one or more images.")
    if len(files) > max_images:
        raise _too_many_images(max_images)
    return files


def _too_many_images(max_images: int) -> ContentTooLarge:
    return ContentTooLarge(
        f"There are more than {max_images} images in one request: at most that many are looked at "
        "together. Send them in several requests."
    )


def _too_large(limit: int) -> ContentTooLarge:
    return ContentTooLarge(
        f"The body is larger than {limit / 2**20:g} MiB: scale images down, or send fewer of them."
    )


def _decompressed(data: bytes, encoding: str, limit: int) -> bytes:
    if encoding in ("", "identity"):
        return data
    if encoding not in ("gzip", "deflate"):
        raise UnsupportedMediaType(
            f"The encoding {encoding[:100]!r} is not read: send gzip, deflate, or as it is."
        )
    decompressor = zlib.decompressobj(wbits=31 if encoding == "gzip" else 15)
    try:
        plain = decompressor.decompress(data, limit + 1)
    except zlib.error as error:
        raise BadRequest(f"The body is no whole {encoding} stream: {error}.") from error
    if len(plain) > limit:
        raise _too_large(limit)
    if not decompressor.eof:
        raise BadRequest(f"The body is cut short: its {encoding} stream has no end.")
    return plain
