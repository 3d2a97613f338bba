"""Answers as bytes: small ones as JSON, large ones part by part."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack

import orjson
from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from clsnf.serving.reading_worker import Buffer

log = logging.getLogger("clsnf.serving")

_PIECE = 2**20  # bytes that are sent at a time
_SLOWEST = 64 * 1024  # bytes a second that a client must take
_LEAST_SECONDS = 5.0  # for one piece


def json_answer(
    answer: BaseModel, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    """A JSON answer, with the keys that are set."""
    content = orjson.dumps(answer.model_dump(exclude_unset=True))
    return Response(content, status, headers, "application/json")


class PartsResponse(Response):
    """An answer that is sent part by part, so that parts are not joined to one more copy.

    Args:
        parts: of the body.
        media_type: of the body.
        headers: beside those of every answer.
        held: is emptied; what it holds is given back when the answer was sent, or the client has
            gone or takes no more.
    """

    def __init__(
        self,
        parts: Sequence[Buffer],
        media_type: str,
        headers: Mapping[str, str],
        held: AsyncExitStack,
    ) -> None:
        self._parts = parts
        length = str(sum(len(part) for part in parts))
        super().__init__(headers={**headers, "Content-Length": length}, media_type=media_type)
        self._held = held.pop_all()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._held:
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
            left = int(self.headers["Content-Length"])
            for piece in self._pieces():
                left -= len(piece)
                message = {"type": "http.response.body", "body": piece, "more_body": left > 0}
                try:
                    async with asyncio.timeout(_LEAST_SECONDS + len(piece) / _SLOWEST):
                        await send(message)
                except TimeoutError:
                    log.info("a client took its answer too slowly: %d bytes were left", left)
                    return  # an answer that is not whole: the server closes the connection

    def _pieces(self) -> Iterator[bytes]:
        """The body in pieces, none of them empty; small parts are joined."""
        small: list[Buffer] = []
        for part in self._parts:
            if len(part) < _PIECE:
                small.append(part)
                continue
            if small:
                yield b"".join(small)
                small = []
            view = memoryview(part)
            for start in range(0, len(view), _PIECE):
                yield bytes(view[start : start + _PIECE])
        if small:
            yield b"".join(small)
