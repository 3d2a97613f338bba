"""The token that allows to change thresholds.

It comes from a file or the environment, never from an argument or a configuration that others can
read.
"""

from __future__ import annotations

import hmac
import os
from pathlib import Path

from clsnf.core.errors import SettingsError
from clsnf.serving.errors import Forbidden, Unauthorized

VARIABLE, FILE_VARIABLE = "CLSNF_TOKEN", "CLSNF_TOKEN_FILE"
_SHORTEST = 16


def read_token(file: str | None) -> str | None:
    """The token, or None where there is none.

    It is read from `file`, else from the file that CLSNF_TOKEN_FILE names, else from CLSNF_TOKEN.

    Raises:
        SettingsError: the file can't be read, or the token is so short that it could be guessed.
    """
    source = file or os.environ.get(FILE_VARIABLE)
    if source:
        try:
            token = Path(source).expanduser().read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(
                f"The token file {source} can't be read ({error}): check its path and permissions."
            ) from error
    else:
        source, token = VARIABLE, os.environ.get(VARIABLE, "").strip()
        if not token:
            return None
    if len(token) < _SHORTEST:
        raise SettingsError(
            f"The token in {source} has {len(token)} characters: take {_SHORTEST} or more, such "
            "as openssl rand -hex 16."
        )
    return token


def check_token(token: str | None, given: str | None) -> None:
    """Refuse a request that does not give the token; the comparison takes constant time.

    Raises:
        Forbidden: the server has no token, so nobody may change thresholds.
        Unauthorized: the request gives none, or another one.
    """
    if token is None:
        raise Forbidden(
            f"This server was started without a token: set {FILE_VARIABLE} or {VARIABLE} where "
            "its replicas start."
        )
    if given is None or not hmac.compare_digest(given.encode(), token.encode()):
        raise Unauthorized(
            "Give the token: Authorization: Bearer TOKEN.", headers={"WWW-Authenticate": "Bearer"}
        )
