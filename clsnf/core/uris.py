"""URIs of folders as text, such as ``s3://bucket/runs/night?endpoint_override=...``.

:mod:`clsnf.core.remote` reads and writes what lies there.
"""

from __future__ import annotations

import posixpath
import re
from urllib.parse import urlsplit, urlunsplit

from clsnf.core.errors import SettingsError

_SECRETS = ("password", "passwd", "secret", "token")


def is_uri(place: object) -> bool:
    """Whether a location is a URI; else it is a path."""
    return isinstance(place, str) and "://" in place


def join_uri(uri: str, name: str) -> str:
    """The URI of `name` below `uri`; a query (``?endpoint_override=...``) stays at the end."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(path=posixpath.join(parts.path, name)))


def refuse_password(uri: str) -> None:
    """Raise SettingsError if a URI has a password.

    URIs are shown in tables, messages and reports.
    """
    if urlsplit(uri).password:
        raise SettingsError(
            f"{without_secrets(uri)} was given with a password, which tables and reports would "
            "show: leave it out, and put it where "
            "the store's own tools look for it (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, say)."
        )


def has_secret(uri: str) -> bool:
    """Whether a URI has a password, or a part of its query that looks like one."""
    parts = urlsplit(uri)
    return bool(parts.password) or any(word in parts.query.lower() for word in _SECRETS)


def without_secrets(uri: str) -> str:
    """The URI without user name and password, so that it may be shown."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


_USER_INFO = re.compile(r"://(?!/)(.*)@")


def bare_uri(uri: str) -> str:
    """The URI without user name, password and query: for services that take tokens there.

    It need not be a valid one, and ``sqlite:////path`` keeps its slashes.
    """
    return _USER_INFO.sub("://", uri.partition("?")[0])


def hide_secrets(text: str, uri: str) -> str:
    """The text with what is secret in the URI left out, wherever the text quotes it."""
    address, _, query = uri.partition("?")
    user_info = "".join(_USER_INFO.findall(address))
    text = text.replace(uri, bare_uri(uri))
    for secret in (user_info, user_info.partition(":")[2], query):
        text = text.replace(secret, "...") if secret else text
    return text


def uri_name(uri: str) -> str:
    """The last part of a URI's path: the folder's name."""
    return posixpath.basename(urlsplit(uri).path.rstrip("/"))
