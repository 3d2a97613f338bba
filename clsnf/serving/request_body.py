"""Bodies of HTTP requests as they arrive: within limits of size, pace and memory.

They are taken as they are. What is in them is found in worker processes, by the forms of
:mod:`clsnf.serving.body_forms`.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import ClientDisconnect, Request

from clsnf.serving.body_forms import (
    BodyForm,
    FileBody,
    FrameBody,
    MultipartBody,
    boundary_of,
    too_large,
)
from clsnf.serving.budget import BodyHolding
from clsnf.serving.errors import (
    BadRequest,
    RequestTimeout,
    UnprocessableContent,
    UnsupportedMediaType,
)
from clsnf.serving.reading_tasks import Encoded

# The first five are what a file is; the others are names that cameras and libraries give them.
IMAGE_TYPES = (
    "image/png",
    "image/jpeg",
    "image/bmp",
    "image/tiff",
    "image/webp",
    "image/jpg",
    "image/x-png",
    "image/tif",
    "image/x-portable-anymap",
    "image/x-portable-bitmap",
    "image/x-portable-graymap",
    "image/x-portable-pixmap",
    "application/octet-stream",
    "binary/octet-stream",
)
MULTIPART = "multipart/form-data"
FRAME_SHAPE = r"^[0-9]{1,5}x[0-9]{1,5}x[13]$"
_OCTETS = ("application/octet-stream", "binary/octet-stream")
# Both say nothing about the body: the second one is curl's default.
_UNSPECIFIED = ("", "application/x-www-form-urlencoded")

_STALL = 5.0  # seconds without a byte, or before the pace counts
_PACE = 16 * 1024  # bytes a second
_MOST_DIGITS = 18  # of a Content-Length


def client_of(request: Request) -> str:
    """The address that a request comes from."""
    return request.client.host if request.client else ""


def media_type(request: Request) -> str:
    """The body's type, without parameters, in lower case.

    ``application/octet-stream`` where the request names none.
    """
    named = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return "application/octet-stream" if named in _UNSPECIFIED else named


async def read_body(
    request: Request, limit: int, holding: BodyHolding, deadline: float
) -> bytearray:
    """The body as it comes, of at most `limit` bytes, which `holding` then holds.

    Args:
        request: whose body was not read yet.
        limit: bytes.
        holding: of this request.
        deadline: a time of the event loop.

    Raises:
        ContentTooLarge: it has more bytes.
        TooManyRequests: the replica has no memory for it.
        RequestTimeout: it was not there at the deadline, made no progress, or is too slow.
        BadRequest: it broke off.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and (len(announced) > _MOST_DIGITS or int(announced) > limit):
        raise too_large(limit)
    body = bytearray()
    loop = asyncio.get_running_loop()
    slow = loop.time() + _STALL
    try:
        async with asyncio.timeout_at(min(deadline, slow)) as clock:
            async for chunk in request.stream():
                if not chunk:
                    continue
                if len(body) + len(chunk) > limit:
                    raise too_large(limit)
                holding.add(len(chunk))
                body += chunk
                by_pace = max(slow, slow - _STALL + len(body) / _PACE)
                clock.reschedule(min(deadline, by_pace, loop.time() + _STALL))
    except TimeoutError as error:
        raise RequestTimeout(
            f"The body came too slowly: {len(body)} bytes are there. It must not pause for "
            f"{_STALL:g} s, bring {_PACE // 1024} KiB a second and end before the deadline."
        ) from error
    except ClientDisconnect as error:
        raise BadRequest("The request broke off within its body.") from error
    return body


def encoded_body(request: Request, form: BodyForm, limit: int) -> Encoded:
    """How a request's body is read. Raises UnsupportedMediaType for an unknown encoding."""
    encoding = request.headers.get("content-encoding", "").strip().lower()
    if encoding not in ("", "identity", "gzip", "deflate"):
        raise UnsupportedMediaType(
            f"The encoding {encoding[:100]!r} is not read: send gzip, deflate, or as it is."
        )
    return Encoded(form, "" if encoding == "identity" else encoding, limit)


def image_form(request: Request, shape: str | None, max_images: int) -> BodyForm:
    """The form of a body of images.

    Args:
        request: its Content-Type decides.
        shape: of a raw frame, as :data:`FRAME_SHAPE` has it.
        max_images: that one request may hold.

    Raises:
        UnsupportedMediaType: a body of another kind.
        UnprocessableContent: a shape for a body that is no frame.
        BadRequest: a multipart body without a boundary.
    """
    found = media_type(request)
    if shape is not None:
        if found not in _OCTETS or not re.fullmatch(FRAME_SHAPE, shape):
            raise UnprocessableContent(
                "shape belongs to a raw frame: HEIGHTxWIDTHx1 or HEIGHTxWIDTHx3, with the "
                f"Content-Type {_OCTETS[0]}."
            )
        height, width, channels = (int(side) for side in shape.split("x"))
        return FrameBody((height, width, channels))
    if found == MULTIPART:
        return MultipartBody(boundary_of(request.headers["content-type"]), max_images)
    # The content decides which format it is.
    if found not in _OCTETS and not found.startswith("image/"):
        raise UnsupportedMediaType(
            f"A body of type {found[:100]!r} is not read: send one of "
            f"{', '.join((*IMAGE_TYPES, MULTIPART))}."
        )
    return FileBody()


@asynccontextmanager
async def while_connected(request: Request) -> AsyncIterator[None]:
    """End the block when the client closes the connection; the body must have been read.

    Raises:
        BadRequest: it did. Nobody sees this answer, but the metrics count it.
    """
    task, gone = asyncio.current_task(), False
    assert task is not None

    async def watch() -> None:
        nonlocal gone
        while (await request.receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if not gone:
            raise
        task.uncancel()
        raise BadRequest("The client has gone before its answer.") from None
    finally:
        watcher.cancel()
