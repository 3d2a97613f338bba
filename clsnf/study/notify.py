"""One POST when a study ends, well or badly (``--notify URL``).

The URL itself is never shown: that of a chat's webhook is a secret. The body has an entry ``text``,
which is what such webhooks show.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

from clsnf.core.errors import ClsnfError, SettingsError
from clsnf.core.ledger import now
from clsnf.core.uris import bare_uri
from clsnf.results import CategoryResult, Metrics, StudySummary, to_plain
from clsnf.study.request import StudyRequest

_TIMEOUT = 3.0  # seconds, to connect and between two bytes
_PATIENCE = 8.0  # seconds, in all


@dataclass(frozen=True)
class CategoryNotice:
    """What a notice says of a category.

    Attributes:
        winner: whether there is one.
        error: why there is none, as far as known.
        finished_trials, failed_trials: their numbers.
        validation, test: the winner's metrics.
    """

    winner: bool
    error: str | None
    finished_trials: int
    failed_trials: int
    validation: Metrics = field(default_factory=dict)
    test: Metrics = field(default_factory=dict)

    @classmethod
    def of(cls, found: CategoryResult) -> CategoryNotice:
        """The notice of a category's result."""
        winner = found.winner
        return cls(
            winner=winner is not None,
            error=found.error,
            finished_trials=found.finished_trials,
            failed_trials=len(found.failed_trials),
            validation={} if winner is None else winner.validation.metrics,
            test={} if winner is None or winner.test is None else winner.test.metrics,
        )


@dataclass(frozen=True)
class Notice:
    """The body of the POST, as JSON.

    Attributes:
        text: one line for people.
        study, out: its name and folder.
        status: how it ended.
        error: why it did not end well.
        at: when, UTC, ISO 8601.
        seconds: that it took; None where it did not end well.
        categories: name -> result.
    """

    text: str
    study: str
    out: str
    status: Literal["finished", "interrupted", "failed"]
    error: str | None
    at: str
    seconds: float | None = None
    categories: dict[str, CategoryNotice] = field(default_factory=dict)


def check_notify(url: str | None) -> None:
    """Refuse what is no URL of a web server. Raises SettingsError, which does not show it."""
    if url is None:
        return
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise SettingsError("--notify is no URL of a web server: give https://HOST/PATH.")


@contextmanager
def notify_at_end(
    request: StudyRequest, say: Callable[[str], None]
) -> Iterator[Callable[[StudySummary], None]]:
    """Send the notice when the block ends, whatever ends it; yields what takes the summary."""
    if request.notify is None:
        yield lambda summary: None
        return
    summaries: list[StudySummary] = []
    try:
        yield summaries.append
    except KeyboardInterrupt:
        _send(request.notify, _unfinished(request, "interrupted", None), say)
        raise
    except Exception as error:
        cause = str(error) if isinstance(error, ClsnfError) else repr(error)
        _send(request.notify, _unfinished(request, "failed", cause), say)
        raise
    for summary in summaries:
        _send(request.notify, _finished(request, summary), say)


def _place(request: StudyRequest) -> str:
    return bare_uri(request.out) if isinstance(request.out, str) else str(request.out)


def _unfinished(
    request: StudyRequest, status: Literal["interrupted", "failed"], error: str | None
) -> Notice:
    text = f"Study {request.name}: {status}" + (f": {error}" if error else "")
    return Notice(text, request.name, _place(request), status, error, now())


def _finished(request: StudyRequest, summary: StudySummary) -> Notice:
    categories = {name: CategoryNotice.of(found) for name, found in summary.categories.items()}
    lacking = [name for name, found in categories.items() if not found.winner]
    text = (
        f"Study {request.name}: {len(categories) - len(lacking)} of {len(categories)} have a winner"
    )
    return Notice(
        text=text + (f"; none: {', '.join(lacking[:10])}" if lacking else ""),
        study=request.name,
        out=_place(request),
        status="finished",
        error=None,
        at=summary.at,
        seconds=summary.seconds,
        categories=categories,
    )


def _send(url: str, notice: Notice, say: Callable[[str], None]) -> None:
    """POST the notice; a receiver that is slow, refuses or is not there is said in one line."""
    outcome = [f"no answer within {_PATIENCE:.0f} s"]

    def post() -> None:
        import requests

        try:
            # Of the answer only its status is read.
            answer = requests.post(url, json=to_plain(notice), timeout=_TIMEOUT, stream=True)
            outcome[0] = "" if answer.ok else f"it answered {answer.status_code}"
            answer.close()
        except (requests.RequestException, ValueError) as error:  # its text may hold the URL
            outcome[0] = type(error).__name__

    # A receiver that sends a byte now and then would hold up requests for ever.
    thread = threading.Thread(target=post, daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    if outcome[0]:
        say(f"--notify: {urlsplit(url).hostname} did not get the notice ({outcome[0]})")
