"""``--modbus``: the newest verdict as coils and registers of a PLC, over Modbus TCP.

The PLC is the server, as usual, and the watch a client that writes. Modbus carries the state and no
history: what could not be written is replaced by what is newer. The addresses are those of
``docs/watching.md``, from ``--modbus-base`` on:

    coils      0 ok (a pulse)  1 ng  2 busy  3 ready  4 heartbeat  5 fault
    registers  0 results  1 score  2 threshold  3 heartbeats  4 waiting  5 condition  6 verdict

Registers are written before coils. `ng` is on from a verdict "not ok" to the next "ok", and
whenever nothing is known: before the first verdict, in a fault, and after the end.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from dataclasses import dataclass
from typing import Any

from clsnf.core.errors import OutageError, SettingsError
from clsnf.core.patience import NEVER_TIRED, Patience
from clsnf.watching.output import Output, OutputContext, import_extra
from clsnf.watching.result import Judgement
from clsnf.watching.status import CODES, Condition, Status

PORT = 502
_TIMEOUT = 2.0  # seconds in which a PLC answers
_NO_SCORE = 65535


@dataclass(frozen=True)
class Signals:
    """What the PLC is told; the defaults are the safe state.

    Attributes:
        ok, ng: the verdict; never both.
        busy: a picture is being judged.
        condition: of the watch.
        beats: heartbeats so far; the coil is on where it is odd.
        results: verdicts so far.
        score, threshold: of the last picture; None where there is none.
        waiting: pictures that wait.
        verdict: 0 none yet, 1 ok, 2 ng.
    """

    ok: bool = False
    ng: bool = True
    busy: bool = False
    condition: Condition = "stopped"
    beats: int = 0
    results: int = 0
    score: float | None = None
    threshold: float | None = None
    waiting: int = 0
    verdict: int = 0

    @property
    def coils(self) -> list[bool]:
        """As the PLC gets them."""
        ready = self.condition == "ready"
        fault = self.condition in ("away", "failing", "stalled")
        ok, ng = self.ok and ready, self.ng or not ready
        return [ok, ng, self.busy, ready, self.beats % 2 == 1, fault]

    @property
    def registers(self) -> list[int]:
        """As the PLC gets them, 16 bits each."""
        return [
            self.results & 0xFFFF,
            _scaled(self.score),
            _scaled(self.threshold),
            self.beats & 0xFFFF,
            min(self.waiting, 0xFFFF),
            CODES[self.condition],
            self.verdict,
        ]


def _scaled(value: float | None) -> int:
    """A number in [0, 1] in ten-thousandths."""
    return _NO_SCORE if value is None else min(max(round(10_000 * value), 0), _NO_SCORE - 1)


class ModbusPlc(Output):
    """One PLC; ``--modbus HOST[:PORT][/UNIT]``.

    A thread of its own writes the newest signals. A PLC that is away is tried again for ever.
    """

    def __init__(self, target: str, context: OutputContext) -> None:
        super().__init__(target, context)
        client: Any = import_extra("pymodbus.client", "--modbus", "modbus")
        self._host, port, self._unit = plc_address(target)
        self._base = context.modbus_base
        self._client = client.ModbusTcpClient(self._host, port=port, timeout=_TIMEOUT, retries=0)
        self._signals = Signals()
        self._written: Signals | None = None
        self._pulse_ends = 0.0
        self._changed, self._ended = threading.Condition(), False
        self._patience = Patience(NEVER_TIRED, lambda line: context.say(f"--modbus: {line}"))
        self._thread = threading.Thread(target=self._write_changes, daemon=True)

    def open(self) -> None:
        """Write the safe state, and go on in the background.

        Raises:
            SettingsError: the PLC is there, and has no such coils and registers.
        """
        try:
            self._write(self._signals)
        except OutageError as error:
            self.context.say(f"--modbus: {error}: it gets the newest state when it is back")
        self._thread.start()

    def busy(self, busy: bool) -> None:
        """Whether a picture is being judged."""
        self._set(busy=busy)

    def show(self, judgement: Judgement) -> None:
        """The verdict on a picture."""
        result = judgement.result
        good = result.verdict == "ok"
        with self._changed:
            if good:
                self._pulse_ends = time.monotonic() + self.context.modbus_pulse
            self._signals = dataclasses.replace(
                self._signals,
                ok=good,
                ng=not good,
                busy=False,
                results=self._signals.results + 1,
                score=result.score,
                threshold=result.threshold,
                verdict=1 if good else 2,
            )
            self._changed.notify()

    def tell(self, status: Status) -> None:
        """A heartbeat."""
        self._set(beats=self._signals.beats + 1, condition=status.condition, waiting=status.waiting)

    def close(self, status: Status) -> None:
        """Write the safe state as the last one."""
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._patience.over.set()
        self._thread.join(3 * _TIMEOUT)
        try:
            last = self._signals
            self._write(Signals(beats=last.beats, results=last.results, verdict=last.verdict))
        except (OutageError, SettingsError) as error:
            self.context.say(f"--modbus: {error}: the PLC did not get the state at the end")
        self._client.close()

    def _set(self, **changes: Any) -> None:
        with self._changed:
            self._signals = dataclasses.replace(self._signals, **changes)
            self._changed.notify()

    # ---- the thread ----

    def _write_changes(self) -> None:
        while True:
            with self._changed:
                if not self._ended and self._newest() == self._written:
                    left = self._pulse_ends - time.monotonic()
                    self._changed.wait(max(left, 0.001) if self._signals.ok else None)
                if self._ended:
                    return
            try:
                self._patience.wait_for(lambda: self._write(self._newest()), self._client.close)
            except OutageError:
                return  # the watch ends
            except SettingsError as error:
                self.context.say(f"--modbus: {error}")
                self._patience.over.wait(5.0)

    def _newest(self) -> Signals:
        """The signals as of now: a pulse ends by itself."""
        if self._signals.ok and time.monotonic() >= self._pulse_ends:
            self._signals = dataclasses.replace(self._signals, ok=False)
        return self._signals

    def _write(self, signals: Signals) -> None:
        """Write signals to the PLC. Raises OutageError, SettingsError."""
        pymodbus: Any = import_extra("pymodbus", "--modbus", "modbus")
        place = f"the PLC {self.target}"
        try:
            if not self._client.connected and not self._client.connect():
                raise OutageError(f"{place} can't be reached")
            answers = [
                self._client.write_registers(self._base, signals.registers, device_id=self._unit),
                self._client.write_coils(self._base, signals.coils, device_id=self._unit),
            ]
        except (pymodbus.ModbusException, OSError) as error:
            self._client.close()
            raise OutageError(f"{place} does not answer") from error
        if any(answer.isError() for answer in answers):
            raise SettingsError(
                f"{place} refuses to be written: it needs 6 coils and 7 holding registers from "
                f"address {self._base} on (--modbus-base), of unit {self._unit}."
            )
        self._written = signals


def plc_address(text: str) -> tuple[str, int, int]:
    """``HOST[:PORT][/UNIT]`` as host, port and unit. Raises SettingsError."""
    place, _, unit = text.removeprefix("modbus://").partition("/")
    host, colon, port = place.rpartition(":")
    if not colon:
        host, port = place, str(PORT)
    valid = bool(host) and port.isdecimal() and 0 < int(port) < 65536
    if not valid or not (unit or "1").isdecimal() or int(unit or "1") > 255:
        raise SettingsError(f"--modbus {text!r} is no PLC's address: give HOST:502 or HOST:502/1.")
    return host.strip("[]"), int(port), int(unit or "1")
