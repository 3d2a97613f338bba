"""Why a request is refused: one line for people, and the HTTP status that goes with it.

The classes have the names that HTTP gives to the statuses.
"""

# ruff: noqa: N818  (HTTP's own names do not end in "Error"; the base class does)

from __future__ import annotations

from typing import Any

from clsnf.core.errors import ClsnfError


class RequestError(ClsnfError):
    """A request that can't be answered as it stands.

    Attributes:
        status: of the HTTP answer.
        details: further entries of the JSON answer, beside ``error``.
        headers: of the HTTP answer.
    """

    status = 400

    def __init__(
        self,
        reason: str,
        details: dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(reason)
        self.details, self.headers = details or {}, headers or {}


class BadRequest(RequestError):
    """400: not an image, half an image, a body that is not what it says."""


class Unauthorized(RequestError):
    """401: no token or a wrong one."""

    status = 401


class Forbidden(RequestError):
    """403: this server was started without what the request needs."""

    status = 403


class NotFound(RequestError):
    """404: there is no such model."""

    status = 404


class NotAcceptable(RequestError):
    """406: the answer can't be given in the form that was asked for."""

    status = 406


class RequestTimeout(RequestError):
    """408: the body did not arrive before the deadline."""

    status = 408


class ContentTooLarge(RequestError):
    """413: more bytes or images than one request may hold."""

    status = 413


class UnsupportedMediaType(RequestError):
    """415: a body of a kind that is not read."""

    status = 415


class UnprocessableContent(RequestError):
    """422: well-formed, but with values that make no sense."""

    status = 422


class TooManyRequests(RequestError):
    """429: the queue is full.

    Args:
        reason: as for every refusal.
        seconds: after which the client should ask again.
    """

    status = 429

    def __init__(self, reason: str, seconds: int) -> None:
        super().__init__(reason, {"retry_after": seconds}, {"Retry-After": str(seconds)})


class ServiceUnavailable(RequestError):
    """503: the model can't be used now, through no fault of the request."""

    status = 503


class GatewayTimeout(RequestError):
    """504: the answer was not there at the deadline."""

    status = 504
