"""What holds for every output, whatever it is: the contract over ``OUTPUTS``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from clsnf.core.errors import ClsnfError, OutageError, SettingsError
from clsnf.watching.output import Output, import_extra
from clsnf.watching.outputs import OUTPUTS
from clsnf.watching.result import Judgement, now
from clsnf.watching.status import Status
from tests.support.small_server import free_port, picture
from tests.support.watching import made_context, made_result

# A target of each output; what listens on the network is away.
TARGETS: dict[str, Callable[[Path], str]] = {
    "out": lambda folder: str(folder / "results" / "results.jsonl"),
    "overlays": lambda folder: str(folder / "overlays"),
    "sort": lambda folder: str(folder / "sorted"),
    "mqtt": lambda folder: f"mqtt://127.0.0.1:{free_port()}/line/1",
    "webhook": lambda folder: f"http://127.0.0.1:{free_port()}/secret-path",
    "modbus": lambda folder: f"127.0.0.1:{free_port()}",
}
WRONG = {
    "out": "results.txt",
    "overlays": "file.txt",
    "sort": "file.txt",
    "mqtt": "http://broker/topic",
    "webhook": "ftp://secret-path",
    "modbus": "plc:port",
}
every_output = pytest.mark.parametrize("name", sorted(OUTPUTS))


def test_every_output_is_tested_here() -> None:
    assert set(TARGETS) == set(OUTPUTS) == set(WRONG)


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clsnf.watching.output_mqtt._START", 0.2)


@every_output
def test_an_output_never_waits_and_never_raises_but_where_it_delivers(
    name: str, tmp_path: Path
) -> None:
    lines: list[str] = []
    output: Output = OUTPUTS[name](TARGETS[name](tmp_path), made_context(lines))
    output.open()
    for number, verdict in enumerate(("ok", "ng")):
        result = made_result(number, verdict)
        output.busy(True)
        output.show(Judgement(result, picture(), np.zeros(picture().shape[:2], np.float32)))
        output.show(Judgement(made_result(9, "ng", score=None, p_value=None, reason="damaged")))
        output.tell(Status(now(), "ready", judged=number, waiting=3))
        if output.keeps_history:
            is_away = pytest.raises(OutageError) if name in ("mqtt", "webhook") else nullcontext()
            with is_away:
                output.deliver([result])
    output.tell(Status(now(), "away", "the camera is away"))
    output.close(Status(now(), "stopped"))
    assert not any("secret-path" in line for line in lines)


@every_output
def test_what_is_no_target_is_one_clear_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "file.txt").touch()
    wrong = WRONG[name]
    wrong = str(tmp_path / wrong) if wrong == "file.txt" else wrong
    with pytest.raises(ClsnfError) as raised:
        OUTPUTS[name](wrong, made_context())
    assert "\n" not in str(raised.value)
    assert "secret-path" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "target"),
    [("mqtt", "mqtt://me:hush@broker/topic"), ("webhook", "https://me:hush@host/hook")],
)
def test_a_password_in_an_argument_is_refused_and_not_shown(name: str, target: str) -> None:
    with pytest.raises(SettingsError, match="_FILE names") as raised:
        OUTPUTS[name](target, made_context())
    assert "hush" not in str(raised.value)


def test_an_extra_that_is_not_installed_is_named() -> None:
    with pytest.raises(SettingsError, match=r"pip install 'clsnf\[mqtt\]'"):
        import_extra("no_such_package.at_all", "--mqtt", "mqtt")
