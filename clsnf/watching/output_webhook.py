"""``--webhook``: each result as the JSON body of one POST.

The address is never shown, only its host: that of a chat's webhook is a secret.
"""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlsplit

import requests

from clsnf.core.errors import OutageError, SettingsError
from clsnf.core.secrets import read_secret, refuse_password
from clsnf.watching.output import Output, OutputContext, RefusedError
from clsnf.watching.result import Result

TOKEN = "CLSNF_WEBHOOK_TOKEN"
_TIMEOUT = (3.05, 10.0)  # seconds, to connect and between two bytes
# Answers that say that this body is wrong, and that another attempt would get the same.
_REFUSALS = (400, 413, 415, 422)


class Webhook(Output):
    """POSTs to one address, one after the other, until each was answered with 2xx.

    The header ``Idempotency-Key`` is the result's id: a result may come twice after a crash. The
    token of ``CLSNF_WEBHOOK_TOKEN`` goes along as ``Authorization: Bearer``.
    """

    keeps_history = True

    def __init__(self, target: str, context: OutputContext) -> None:
        super().__init__(target, context)
        refuse_password(target, "--webhook", TOKEN)
        try:
            parts = urlsplit(target)
            valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            valid = False
        if not valid:
            raise SettingsError("--webhook is no URL of a web server: give https://HOST/PATH.")
        self._host = parts.hostname
        self._session = requests.Session()
        self._session.headers["Content-Type"] = "application/json"
        token = read_secret(TOKEN)
        if token is not None:
            self._session.headers["Authorization"] = f"Bearer {token}"

    def deliver(self, results: Sequence[Result]) -> None:
        """POST the results."""
        for result in results:
            try:
                answer = self._session.post(
                    self.target,
                    data=result.to_json().encode(),
                    headers={"Idempotency-Key": result.id},
                    timeout=_TIMEOUT,
                    allow_redirects=False,
                )
            except requests.RequestException as error:  # its text may hold the URL
                raise OutageError(f"{self._host} can't be reached ({type(error).__name__})") from (
                    error
                )
            if answer.status_code in _REFUSALS:
                raise RefusedError(f"{self._host} refused {result.id}: {answer.status_code}")
            if not 200 <= answer.status_code < 300:
                raise OutageError(f"{self._host} answered {answer.status_code}")
