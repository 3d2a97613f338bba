"""Verdicts as coils and registers of pymodbus's own server."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from clsnf.core.errors import SettingsError
from clsnf.watching.output_modbus import ModbusPlc, Signals, plc_address
from clsnf.watching.result import now
from clsnf.watching.status import Status
from tests.support.small_server import free_port
from tests.support.watching import judgement, made_context, wait_until

pymodbus_server = pytest.importorskip("pymodbus.server")


class Plc:
    """A PLC: pymodbus's server in a thread, read by a client of its own, as a program would."""

    def __init__(self, port: int, size: int = 200) -> None:
        from pymodbus.datastore import (
            ModbusDeviceContext,
            ModbusSequentialDataBlock,
            ModbusServerContext,
        )

        self.port, self._size = port, size
        device = ModbusDeviceContext(
            co=ModbusSequentialDataBlock(1, [False] * size),
            hr=ModbusSequentialDataBlock(1, [0] * size),
        )
        self._context = ModbusServerContext(device, single=True)

    def start(self) -> None:
        self._loop = asyncio.new_event_loop()
        started = threading.Event()

        async def serve() -> None:
            self._server = pymodbus_server.ModbusTcpServer(
                self._context, address=("127.0.0.1", self.port)
            )
            await self._server.serve_forever(background=True)
            started.set()

        def run() -> None:
            asyncio.set_event_loop(self._loop)
            self._loop.run_until_complete(serve())
            self._loop.run_forever()

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()
        assert started.wait(20)

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self._server.shutdown(), self._loop).result(20)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(20)

    def read(self, base: int = 0) -> tuple[list[bool], list[int]]:
        from pymodbus.client import ModbusTcpClient

        with ModbusTcpClient("127.0.0.1", port=self.port) as client:
            coils = client.read_coils(base, count=6)
            registers = client.read_holding_registers(base, count=7)
        return [bool(bit) for bit in coils.bits[:6]], list(registers.registers)


@pytest.fixture
def plc() -> Iterator[Plc]:
    made = Plc(free_port())
    made.start()
    yield made
    made.stop()


def opened(plc: Plc, lines: list[str] | None = None, **context: Any) -> ModbusPlc:
    output = ModbusPlc(f"127.0.0.1:{plc.port}", made_context(lines, **context))
    output.open()
    return output


READY = Status(now(), "ready", waiting=3)
STOPPED = Status(now(), "stopped")
OK, NG, BUSY, IS_READY, BEAT, FAULT = range(6)


def test_a_good_product_is_a_pulse_and_a_bad_one_stays_until_the_next_good_one(plc: Plc) -> None:
    output = opened(plc, modbus_pulse=0.5)
    assert plc.read()[0] == [False, True, False, False, False, False]
    output.tell(READY)
    wait_until(lambda: plc.read()[0][IS_READY])
    assert plc.read()[0][NG]  # nothing is known yet
    output.busy(True)
    wait_until(lambda: plc.read()[0][BUSY])
    output.show(judgement(1, "ok", score=0.1234, threshold=0.5))
    wait_until(lambda: plc.read()[0] == [True, False, False, True, True, False])
    assert plc.read()[1] == [1, 1234, 5000, 1, 3, 1, 1]
    wait_until(lambda: plc.read()[0] == [False, False, False, True, True, False])
    output.show(judgement(2, "ng", score=None))
    wait_until(lambda: plc.read()[0] == [False, True, False, True, True, False])
    assert plc.read()[1][:2] == [2, 65535]
    output.close(STOPPED)
    assert plc.read()[0] == [False, True, False, False, True, False]
    assert plc.read()[1][5] == 0


def test_the_heartbeat_toggles_and_a_watch_that_is_not_ready_says_not_ok(plc: Plc) -> None:
    output = opened(plc)
    output.tell(READY)
    output.show(judgement(1, "ok"))
    wait_until(lambda: plc.read()[0][BEAT])
    output.tell(Status(now(), "away", "the camera is away"))
    wait_until(lambda: not plc.read()[0][BEAT])
    coils, registers = plc.read()
    assert coils == [False, True, False, False, False, True]
    assert registers[3] == 2
    assert registers[5] == 2
    output.close(STOPPED)


def test_a_plc_that_was_away_gets_the_newest_state(plc: Plc) -> None:
    lines: list[str] = []
    output = opened(plc, lines)
    output.tell(READY)
    wait_until(lambda: plc.read()[0][IS_READY])
    plc.stop()
    for number in range(5):
        output.show(judgement(number, "ok"))
    output.show(judgement(6, "ng"))
    wait_until(lambda: any("waiting until it works again" in line for line in lines))
    plc.start()
    wait_until(lambda: plc.read()[1][0] == 6, 60)
    assert plc.read()[0][:2] == [False, True]
    wait_until(lambda: any("works again" in line for line in lines))
    output.close(STOPPED)


def test_a_plc_that_is_away_at_the_start_and_at_the_end_holds_nothing_up() -> None:
    lines: list[str] = []
    output = ModbusPlc(f"127.0.0.1:{free_port()}", made_context(lines))
    output.open()
    output.show(judgement(1, "ok"))
    output.close(STOPPED)
    assert any("can't be reached" in line for line in lines)


def test_the_map_begins_at_the_base(plc: Plc) -> None:
    output = opened(plc, modbus_base=100)
    output.tell(READY)
    output.show(judgement(1, "ng", score=1.0))
    wait_until(lambda: plc.read(100)[1][:2] == [1, 10000])
    output.close(STOPPED)


def test_a_plc_without_these_coils_is_one_clear_line(plc: Plc) -> None:
    with pytest.raises(SettingsError, match="6 coils and 7 holding registers from address 5000"):
        opened(plc, modbus_base=5000)


def test_the_safe_state_is_not_ok() -> None:
    assert Signals().coils == [False, True, False, False, False, False]
    # A good verdict of a watch that is not ready is not passed on.
    assert Signals(ok=True, ng=False, condition="stalled").coils[:2] == [False, True]


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("plc", ("plc", 502, 1)),
        ("10.0.0.1:1502/7", ("10.0.0.1", 1502, 7)),
        ("[::1]:502", ("::1", 502, 1)),
    ],
)
def test_addresses(text: str, address: tuple[str, int, int]) -> None:
    assert plc_address(text) == address


@pytest.mark.parametrize("text", ["", ":502", "plc:0", "plc:x", "plc:502/x", "plc:502/999"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(SettingsError, match="--modbus"):
        plc_address(text)
