"""What a request is refused with: one line for people, and the HTTP status that goes with it."""

# ruff: noqa: N818  (names say what is wrong with a request; that they are errors shows in their base)

from __future__ import annotations

from typing import Any

from clsnf.core.errors import ClsnfError


class RequestError(ClsnfError):
    """A request that can't be answered as it stands.

    Attributes:
        status: of the HTTP answer.
        more: further entries of the JSON answer, beside ``error``.
        headers: of the HTTP answer.
    """

    status = 400

    def __init__(
        self, reason: str, more: dict[str, Any] | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(reason)
        self.more, self.headers = more or {}, headers or {}

    @property
    def content(self) -> dict[str, Any]:
        """The JSON answer."""
        return {"error": str(self), **self.more}


class BadRequest(RequestError):
    """400: no image, half an image, a body that is not what it says."""


class NotAllowed(RequestError):
    """401: no token or a wrong one."""

    status = 401


class SwitchedOff(RequestError):
    """403: this server was started without what the request needs."""

    status = 403


class Unknown(RequestError):
    """404: there is no such model."""

    status = 404


class NotAcceptable(RequestError):
    """406: the answer can't be given in the asked form."""

    status = 406


class TooSlow(RequestError):
    """408: the body did not arrive before the deadline."""

    status = 408


class TooLarge(RequestError):
    """413: more bytes or images than one request may hold."""

    status = 413


class WrongKind(RequestError):
    """415: a body of a kind that is not read."""

    status = 415


class WrongParameters(RequestError):
    """422: well-formed, but not what can be asked."""

    status = 422


class Busy(RequestError):
    """429: the queue is full.

    Args:
        seconds: after which it is worth to come again.
    """

    status = 429

    def __init__(self, reason: str, seconds: int) -> None:
        super().__init__(reason, {"retry_after": seconds}, {"Retry-After": str(seconds)})


class Unavailable(RequestError):
    """503: the model can't be used now, through no fault of the request."""

    status = 503


class Late(RequestError):
    """504: the answer was not there at the deadline."""

    status = 504
