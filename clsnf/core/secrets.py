"""Passwords come from a file or the environment, never from an argument that ``ps`` shows."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit

from clsnf.core.errors import SettingsError
from clsnf.core.uris import without_secrets


def read_secret(variable: str, file: str | None = None) -> str | None:
    """The secret in `file`, else in that which ``<variable>_FILE`` names, else in `variable`.

    None where there is none, or an empty one.

    Raises:
        SettingsError: the file can't be read.
    """
    file = file or os.environ.get(f"{variable}_FILE")
    if not file:
        return os.environ.get(variable, "").strip() or None
    try:
        return Path(file).expanduser().read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"The file {file} of {variable} can't be read ({error}): check its path and "
            "permissions."
        ) from error


def refuse_password(url: str, option: str, variable: str) -> None:
    """Raise SettingsError if the URL of a command's option has a password."""
    if urlsplit(url).password is not None:
        raise SettingsError(
            f"{option} {without_secrets(url)} was given with a password, which every user of this "
            f"machine can see: leave it out, and put it into {variable} or a file that "
            f"{variable}_FILE names."
        )
