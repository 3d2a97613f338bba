"""What ``--notify`` sends, to real servers on this machine: one that listens, one that refuses, one
that is slow, and none.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from clsnf.core.config import DetectorSettings, StudySettings
from clsnf.core.errors import OutputError, SettingsError
from clsnf.results import CategoryResult, FailedTrial, StudySummary
from clsnf.study.notify import check_notify, notify_at_end
from clsnf.study.request import StudyRequest
from clsnf.study.space import Space
from tests.support.web_server import serving


def request_to(url: str | None) -> StudyRequest:
    return StudyRequest(
        tables=[],
        out=Path("/runs/night"),
        settings=DetectorSettings(),
        study=StudySettings(),
        space=Space({"flow_depth": {"type": "choice", "values": [0, 2]}}),
        notify=url,
    )


def summary() -> StudySummary:
    return StudySummary(
        version="0",
        at="2026-01-01T00:00:00+00:00",
        seconds=3.0,
        categories={
            "nut": CategoryResult(
                finished_trials=1, failed_trials=[FailedTrial(1, "no memory")], error="no winner"
            )
        },
        settings=DetectorSettings(),
        study=StudySettings(),
    )


@contextmanager
def receiver(status: int) -> Iterator[tuple[str, list[Any]]]:
    """A server that answers every POST with `status`; its URL, and the bodies that it got."""
    got: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with serving(Handler) as port:
        yield f"http://127.0.0.1:{port}/hooks/SECRET", got


def test_a_study_that_ends_well_is_told_with_its_categories() -> None:
    said: list[str] = []
    with receiver(204) as (url, got):
        with notify_at_end(request_to(url), said.append) as give:
            give(summary())
        assert not said
    (notice,) = got
    assert notice["status"] == "finished"
    assert notice["text"] == "Study night: 0 of 1 have a winner; none: nut"
    assert notice["categories"]["nut"] == {
        "winner": False,
        "error": "no winner",
        "finished_trials": 1,
        "failed_trials": 1,
        "validation": {},
        "test": {},
    }


@pytest.mark.parametrize(
    ("error", "status", "cause"),
    [
        (KeyboardInterrupt(), "interrupted", None),
        (OutputError("the disk is full"), "failed", "the disk is full"),
        (ZeroDivisionError("a bug"), "failed", "ZeroDivisionError('a bug')"),
    ],
)
def test_a_study_that_ends_badly_is_told_and_ends_as_before(
    error: BaseException, status: str, cause: str | None
) -> None:
    with receiver(200) as (url, got):
        with pytest.raises(type(error)), notify_at_end(request_to(url), print):
            raise error
        assert [(notice["status"], notice["error"]) for notice in got] == [(status, cause)]


def test_a_receiver_that_refuses_is_said_in_one_line_without_the_url() -> None:
    said: list[str] = []
    with receiver(500) as (url, _), notify_at_end(request_to(url), said.append) as give:
        give(summary())
    assert said == ["--notify: 127.0.0.1 did not get the notice (it answered 500)"]


def test_a_receiver_that_never_answers_or_is_not_there_is_said_and_changes_nothing() -> None:
    said: list[str] = []
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/SECRET"
        with notify_at_end(request_to(url), said.append) as give:
            give(summary())
    with notify_at_end(request_to(url), said.append) as give:  # nobody listens any more
        give(summary())
    assert said == [
        "--notify: 127.0.0.1 did not get the notice (ReadTimeout)",
        "--notify: 127.0.0.1 did not get the notice (ConnectionError)",
    ]


def test_what_is_no_url_is_refused_and_not_shown() -> None:
    check_notify(None)
    check_notify("https://chat.example/hooks/T0/B0")
    for url in ("SECRET", "ftp://host/SECRET", "https:///SECRET", "http://host:port/SECRET"):
        with pytest.raises(SettingsError, match="give https://HOST/PATH") as caught:
            check_notify(url)
        assert "SECRET" not in str(caught.value)
