"""The tokens that allow to ask, and to change thresholds.

They come from files or the environment, never from an argument or a configuration that others can
read. One token allows both. Where there is an administrator's token too, changes need that one.
"""

from __future__ import annotations

import hmac
import os
from dataclasses import dataclass

from clsnf.core.errors import SettingsError
from clsnf.core.secrets import read_secret
from clsnf.serving.errors import Forbidden, Unauthorized

VARIABLE, ADMIN_VARIABLE = "CLSNF_TOKEN", "CLSNF_ADMIN_TOKEN"
_SHORTEST = 16
_CHALLENGE = {"WWW-Authenticate": "Bearer"}


def read_token(file: str | None, variable: str = VARIABLE) -> str | None:
    """The token, or None where there is none.

    It is read from `file`, else from the file that `variable`_FILE names, else from `variable`.

    Raises:
        SettingsError: the file can't be read, or the token is so short that it could be guessed.
    """
    token = read_secret(variable, file)
    if token is None and not (file or os.environ.get(f"{variable}_FILE")):
        return None
    token = token or ""  # a file that is empty is a mistake, not a server without a token
    if len(token) < _SHORTEST:
        raise SettingsError(
            f"The token {variable} has {len(token)} characters: take {_SHORTEST} or more, such "
            "as openssl rand -hex 16."
        )
    return token


@dataclass(frozen=True)
class Tokens:
    """What a request must give.

    Attributes:
        common: the token for asking, and for changes where there is no `admin`.
        admin: the token for changes; it allows asking too.
        needed_to_ask: whether requests that ask must pass :meth:`check_ask`.
    """

    common: str | None
    admin: str | None
    needed_to_ask: bool

    @classmethod
    def read(cls, file: str | None, needed_to_ask: bool) -> Tokens:
        """The tokens of files and the environment, see :func:`read_token`.

        Args:
            file: of the common token; None: the environment says.
            needed_to_ask: see the class.

        Raises:
            SettingsError: as :func:`read_token`, or asking needs a token and there is none.
        """
        tokens = cls(read_token(file), read_token(None, ADMIN_VARIABLE), needed_to_ask)
        if needed_to_ask and tokens.common is None:
            raise SettingsError(
                f"Asking needs a token beyond this machine or with ask_token, and there is "
                f"none: set {VARIABLE}_FILE or {VARIABLE} where the server starts, such as "
                f"{VARIABLE}=$(openssl rand -hex 16), or let everybody ask with --open "
                "(ask_token=false)."
            )
        return tokens

    def check_ask(self, given: str | None) -> None:
        """Refuse a request that gives neither token. Raises Unauthorized."""
        if not (_equal(given, self.common) or _equal(given, self.admin)):
            raise _unauthorized(given, "for asking")

    def check_change(self, given: str | None) -> None:
        """Refuse a request that may not change thresholds.

        Raises:
            Forbidden: the server has no token, or the one given allows only to ask.
            Unauthorized: the request gives none, or another one.
        """
        if self.common is None and self.admin is None:
            raise Forbidden(
                f"This server was started without a token, so nobody may change thresholds: set "
                f"{VARIABLE}_FILE or {VARIABLE} where its replicas start."
            )
        if _equal(given, self.admin or self.common):
            return
        if _equal(given, self.common):
            raise Forbidden(
                "This token allows to ask, not to change thresholds: give the administrator's."
            )
        raise _unauthorized(given, "for changing thresholds")


def _equal(given: str | None, token: str | None) -> bool:
    """Whether both are there and equal; the comparison takes constant time."""
    if given is None or token is None:
        return False
    return hmac.compare_digest(given.encode(), token.encode())


def _unauthorized(given: str | None, purpose: str) -> Unauthorized:
    what = "There is no token in the request" if not given else "The token is not the server's"
    return Unauthorized(
        f"{what}: give the one {purpose}, as the header Authorization: Bearer TOKEN.",
        headers=_CHALLENGE,
    )
