"""The launcher's parts that need no Ray: what went wrong in a replica."""

from __future__ import annotations

import traceback

from clsnf.core.errors import ModelError
from clsnf.serving.launcher import error_line


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
