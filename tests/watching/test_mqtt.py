"""Results over MQTT, with a real broker that is stopped and started in the middle."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from clsnf.core.errors import SettingsError
from clsnf.watching.courier import Courier
from clsnf.watching.output_mqtt import MqttTopic
from clsnf.watching.result import now
from clsnf.watching.state import State
from clsnf.watching.status import Status
from tests.support.watching import (
    Broker,
    Subscriber,
    broker,
    made_context,
    made_result,
    needs_mosquitto,
    wait_until,
)

pytestmark = needs_mosquitto


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Broker]:
    with broker(tmp_path) as made:
        yield made


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    state = State(tmp_path / "state", ["mqtt"], 1000, lambda line: None)
    yield state
    state.close()


def test_no_result_is_lost_while_the_broker_is_away_and_all_come_in_order(
    running: Broker, state: State
) -> None:
    lines: list[str] = []
    heard = Subscriber(running.port, "line")
    assert heard.subscribed.wait(20)
    output = MqttTopic(f"mqtt://127.0.0.1:{running.port}/line/1", made_context(lines))
    output.open()
    courier = Courier("mqtt", output, state, lines.append)
    courier.start()
    sent = [state.add(made_result(n)).id for n in range(30)]
    wait_until(lambda: len(heard.on("line/1")) >= 30)
    running.stop()
    sent += [state.add(made_result(n)).id for n in range(30, 60)]
    wait_until(lambda: any("waiting until it works again" in line for line in lines))
    heard.subscribed.clear()
    running.start()
    assert heard.subscribed.wait(30)
    wait_until(lambda: state.waiting() == {"mqtt": 0}, 60)
    sent += [state.add(made_result(n)).id for n in range(60, 70)]
    wait_until(lambda: state.waiting() == {"mqtt": 0})
    courier.finish(5)
    output.close(Status(now(), "stopped"))
    wait_until(lambda: json.loads(heard.on("line/1")[-1])["id"] == sent[-1])
    heard.close()
    found = [json.loads(text)["id"] for text in heard.on("line/1")]
    assert list(dict.fromkeys(found)) == sent  # one may come twice
    assert any("works again" in line for line in lines)


def test_results_of_a_watch_that_ended_are_delivered_by_the_next_one(
    running: Broker, tmp_path: Path
) -> None:
    port = running.port
    running.stop()
    sent = []
    for start in (0, 1):
        state = State(tmp_path / "state", ["mqtt"], 1000, lambda line: None)
        output = MqttTopic(f"mqtt://127.0.0.1:{port}/line/1", made_context())
        if start == 1:
            running.start()
            heard = Subscriber(port, "line")
            assert heard.subscribed.wait(20)
        output.open()
        courier = Courier("mqtt", output, state, print)
        courier.start()
        sent.append(state.add(made_result(start)).id)
        if start == 1:
            wait_until(lambda state=state: state.waiting() == {"mqtt": 0})  # type: ignore[misc]
        courier.finish(0.5)
        output.close(Status(now(), "stopped"))
        state.close()
    wait_until(lambda: len(heard.on("line/1")) >= 2)
    assert [json.loads(text)["id"] for text in heard.on("line/1")] == sent
    heard.close()


def test_the_status_is_retained_and_the_broker_tells_of_a_watch_that_died(
    running: Broker,
) -> None:
    output = MqttTopic(f"mqtt://127.0.0.1:{running.port}/line/1", made_context())
    output.open()
    output.tell(Status(now(), "ready", judged=7))
    heard = Subscriber(running.port, "line/1/status")
    wait_until(lambda: heard.on("line/1/status"))
    assert json.loads(heard.on("line/1/status")[-1])["judged"] == 7
    output._client._sock.close()  # as if the process had been killed: no farewell
    wait_until(lambda: json.loads(heard.on("line/1/status")[-1])["condition"] == "stopped")
    heard.close()
    output.close(Status(now(), "stopped"))


def test_the_password_comes_from_a_file_and_a_wrong_one_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("hush\n")
    monkeypatch.setenv("CLSNF_MQTT_PASSWORD_FILE", str(secret))
    with broker(tmp_path, "line", "hush") as running:
        url = f"mqtt://line@127.0.0.1:{running.port}/line/1"
        output = MqttTopic(url, made_context())
        output.open()
        output.deliver([made_result(1)])
        output.close(Status(now(), "stopped"))
        secret.write_text("wrong\n")
        with pytest.raises(SettingsError, match="refuses the user") as raised:
            MqttTopic(url, made_context()).open()
        assert "wrong" not in str(raised.value)
        assert "\n" not in str(raised.value)
