"""The launcher's parts that need no Ray: addresses, and what went wrong in a replica."""

from __future__ import annotations

import traceback

import pytest

from clsnf.core.errors import ModelError
from clsnf.serving.launcher import ListenAddress, error_line


def test_an_address_has_a_free_port_and_a_url(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CLSNF_TLS_CERT", "CLSNF_TLS_KEY"):
        monkeypatch.delenv(name, raising=False)
    found = ListenAddress.from_environment("127.0.0.1", 0)
    found.check_free()
    assert found.url == f"http://127.0.0.1:{found.port}/"
    assert ListenAddress("::1", 8000).url == "http://[::1]:8000/"


def test_the_message_of_an_error_is_found_in_a_replicas_traceback() -> None:
    try:
        try:
            raise ModelError("the first is damaged")
        except ModelError as error:
            raise ModelError("plate is damaged: save it again.") from error
    except ModelError:
        text = traceback.format_exc()
    assert error_line(f"The deployment failed to start 3 times:\n{text}\nIt ends.") == (
        "plate is damaged: save it again."
    )
    assert error_line("RuntimeError: of another kind") == ""
