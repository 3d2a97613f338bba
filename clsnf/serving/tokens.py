"""The token that may change thresholds: from a file or the environment, never from an argument or a
configuration that others can read.
"""

from __future__ import annotations

import hmac
import os
from pathlib import Path

from clsnf.core.errors import SettingsError
from clsnf.serving.errors import NotAllowed, SwitchedOff

VARIABLE, FILE_VARIABLE = "CLSNF_TOKEN", "CLSNF_TOKEN_FILE"
_SHORTEST = 16


def read_token(file: str | None) -> str | None:
    """The token, None where there is none: from `file`, else from the file that CLSNF_TOKEN_FILE
    names, else from CLSNF_TOKEN.

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
    """Let pass whoever gives the token; compared in constant time.

    Raises:
        SwitchedOff: the server has none, so nobody may.
        NotAllowed: none or another one is given.
    """
    if token is None:
        raise SwitchedOff(
            f"This server was started without a token: set {FILE_VARIABLE} or {VARIABLE} where "
            "its replicas start."
        )
    if given is None or not hmac.compare_digest(given.encode(), token.encode()):
        raise NotAllowed(
            "Give the token: Authorization: Bearer TOKEN.", headers={"WWW-Authenticate": "Bearer"}
        )
