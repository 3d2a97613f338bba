"""Places given by URIs, as text: ``s3://bucket/runs/night?endpoint_override=...``. What lies there
is :mod:`clsnf.core.remote`'s part.
"""

from __future__ import annotations

import posixpath
from urllib.parse import urlsplit, urlunsplit

from clsnf.core.errors import SettingsError


def is_uri(place: object) -> bool:
    """Whether a place is given by a URI instead of a path."""
    return isinstance(place, str) and "://" in place


def join_uri(uri: str, name: str) -> str:
    """The URI of `name` below `uri`; its query (``?endpoint_override=...``) stays at the end."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(path=posixpath.join(parts.path, name)))


def refuse_password(uri: str) -> None:
    """Raises SettingsError for a URI with a password: places are named in tables, messages and
    reports.
    """
    if urlsplit(uri).password:
        raise SettingsError(
            f"{without_secrets(uri)} was given with a password, which tables and reports would "
            "show: leave it out, and put it where "
            "the store's own tools look for it (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, say)."
        )


def without_secrets(uri: str) -> str:
    """The URI as it may be shown: without a user's name and password."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def uri_name(uri: str) -> str:
    """The last part of a URI's path: what a folder there is called."""
    return posixpath.basename(urlsplit(uri).path.rstrip("/"))
