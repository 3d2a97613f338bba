"""The watch: take a picture, judge it, store the result, tell the outputs, until it is ended."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clsnf.core.errors import SettingsError
from clsnf.core.patience import NEVER_TIRED, Patience
from clsnf.core.periodic import call_periodically
from clsnf.watching.camera import CameraSettings, CameraSource, VideoSource
from clsnf.watching.courier import Courier
from clsnf.watching.folder import FolderSettings, FolderSource
from clsnf.watching.judge import ComeAgainError, Judge
from clsnf.watching.output import Output, OutputContext
from clsnf.watching.outputs import OUTPUTS
from clsnf.watching.pictures import Picture, Source
from clsnf.watching.result import Judgement, Result, now
from clsnf.watching.state import State
from clsnf.watching.status import Condition, Status

_STALLED = 30.0  # seconds that a picture may take before the watch is not ready
_LAST_DELIVERY = 5.0  # seconds at the end for what waits


@dataclass(frozen=True)
class WatchRequest:
    """What to watch, and where results go.

    Attributes:
        model: folder of a saved detector.
        source: a folder, the number of a camera, a stream's URL, or a video file.
        targets: outputs by their names in :data:`clsnf.watching.outputs.OUTPUTS`.
        state: folder for what the watch remembers.
        device: where the detector computes.
        heartbeat: seconds between two heartbeats.
        max_spooled: results that may wait for one output.
        folder, camera: how to watch one.
        modbus_base, modbus_pulse: see :class:`clsnf.watching.output.OutputContext`.
    """

    model: Path
    source: str
    targets: Mapping[str, str]
    state: Path
    device: str = "auto"
    heartbeat: float = 10.0
    max_spooled: int = 100_000
    folder: FolderSettings = field(default_factory=FolderSettings)
    camera: CameraSettings = field(default_factory=CameraSettings)
    modbus_base: int = 0
    modbus_pulse: float = 0.2


def watch(
    request: WatchRequest, say: Callable[[str], None], show: Callable[[Result], None]
) -> None:
    """Watch until SIGINT, SIGTERM or the end of a video.

    Args:
        request: what to watch.
        say: gets lines for people.
        show: gets each result once it is stored.

    Raises:
        ClsnfError: there is no such model, folder or camera, or an output can't begin.
    """
    with stop_by_signals() as stop, ExitStack() as closing:
        judge = Judge(request.model, request.device, "overlays" in request.targets)
        names = [name for name in request.targets if OUTPUTS[name].keeps_history]
        patience = Patience(NEVER_TIRED, say)
        stop.also(patience.over)
        state = State(request.state, names, request.max_spooled, say, patience)
        closing.callback(state.close)
        context = OutputContext(
            state.id,
            say,
            judge.detector.shown_from,
            judge.detector.map_threshold,
            request.modbus_base,
            request.modbus_pulse,
        )
        outputs = {n: OUTPUTS[n](target, context) for n, target in request.targets.items()}
        source = source_of(request, state, say)
        source.open()
        closing.callback(source.close)
        run = _Run(source, judge, state, outputs, say, show)
        for output in outputs.values():
            output.open()
            closing.callback(run.close, output)
        for courier in run.couriers:
            courier.start()
        closing.callback(run.finish)
        judge.warm_up()
        say(f"watching {source.name} for {judge.detector.provenance.category} (Ctrl-C ends)")
        run.tell()
        with call_periodically(run.beat, request.heartbeat), call_periodically(run.tell_change, 1):
            run.work(stop.event)
    say(run.status("stopped").line.replace("heartbeat: stopped; ", "ended: "))


def source_of(request: WatchRequest, state: State, say: Callable[[str], None]) -> Source:
    """The source that a request names. Raises SettingsError."""
    text = request.source
    if "://" in text:
        return CameraSource(text, request.camera, say)
    path = Path(text).expanduser()
    if text.isdecimal() and not path.exists():
        return CameraSource(int(text), request.camera, say)
    if path.is_file():
        return VideoSource(path, request.camera)
    outputs = [
        Path(request.targets[n]).expanduser() for n in ("sort", "overlays") if n in request.targets
    ]
    for output in outputs:
        if output.absolute() == path.absolute():
            raise SettingsError(f"{output} is watched itself: give outputs another folder.")
    return FolderSource(path, request.folder.leaving_out([*outputs, request.state]), state, say)


class _Run:
    """The work of a watch that has begun."""

    def __init__(
        self,
        source: Source,
        judge: Judge,
        state: State,
        outputs: Mapping[str, Output],
        say: Callable[[str], None],
        show: Callable[[Result], None],
    ) -> None:
        self._source, self._judge, self._state = source, judge, state
        self._outputs, self._say, self._show = outputs, say, show
        self.couriers = [
            Courier(name, output, state, say)
            for name, output in outputs.items()
            if output.keeps_history
        ]
        self._judged = self._ok = self._unjudged = 0
        self._alive = time.monotonic()
        self._told: Condition = "stopped"
        self._telling = threading.Lock()

    def work(self, stop: threading.Event) -> None:
        """Judge pictures until `stop` is set or the source ends."""
        while not stop.is_set():
            self._alive = time.monotonic()
            picture = self._source.take(0.5)
            self.tell_change()
            if picture is not None:
                self._handle(picture)
            elif self._source.ended:
                return

    def _handle(self, picture: Picture) -> None:
        self._all_outputs(lambda output: output.busy(True))
        try:
            judgement = self._judge.judge(picture)
        except ComeAgainError:
            self._source.postpone(picture)
            self._all_outputs(lambda output: output.busy(False))
            return
        result = self._state.add(judgement.result)
        judgement = Judgement(result, judgement.image, judgement.score_map)
        self._judged += 1
        self._ok += result.verdict == "ok"
        self._unjudged += result.score is None
        self.tell_change()
        self._all_outputs(lambda output: output.show(judgement))
        self._show(result)

    def _all_outputs(self, call: Callable[[Output], None]) -> None:
        """Call each output; one that breaks is said, and breaks nothing else."""
        for name, output in self._outputs.items():
            try:
                call(output)
            except Exception as error:  # a watch must not end, nor its heartbeat
                self._say(f"{name}: {error!r}")

    def close(self, output: Output) -> None:
        """End an output."""
        status = self.status("stopped")
        try:
            output.close(status)
        except Exception as error:  # the others have to end as well
            self._say(f"{type(output).__name__}: {error!r}")

    def finish(self) -> None:
        """Give outputs a last chance; what waits still is said."""
        until = time.monotonic() + _LAST_DELIVERY
        for courier in self.couriers:
            courier.finish(max(0.1, until - time.monotonic()))
        left = {name: n for name, n in self._state.waiting().items() if n}
        for name, number in left.items():
            self._say(
                f"{name}: {number} results wait in {self._state.folder}: the next start with this "
                "output delivers them"
            )

    # ---- heartbeats, from other threads too ----

    def status(self, condition: Condition | None = None) -> Status:
        """How the watch stands; `condition` where it is known."""
        found, reason = self._condition()
        return Status(
            at=now(),
            condition=condition or found,
            reason="" if condition else reason,
            judged=self._judged,
            ok=self._ok,
            ng=self._judged - self._ok,
            unjudged=self._unjudged,
            waiting=self._source.waiting,
            overloaded=self._source.overloaded,
            dropped=self._source.dropped,
            spooled=self._state.waiting(),
            lost=dict(self._state.lost),
            refused={courier.name: courier.refused for courier in self.couriers},
        )

    def _condition(self) -> tuple[Condition, str]:
        silent = time.monotonic() - self._alive
        if silent > _STALLED:
            return "stalled", f"nothing was judged or stored for {silent:.0f} s"
        if self._source.trouble:
            return "away", self._source.trouble
        if self._judge.failing:
            return "failing", self._judge.failing
        return "ready", ""

    def beat(self) -> None:
        """A heartbeat: a line, and the outputs' own."""
        self._say(self.tell().line)

    def tell(self) -> Status:
        """Tell the outputs how the watch stands."""
        with self._telling:
            status = self.status()
            self._told = status.condition
            self._all_outputs(lambda output: output.tell(status))
        return status

    def tell_change(self) -> None:
        """Tell the outputs at once when the watch becomes ready or ceases to be."""
        if self._condition()[0] != self._told:
            self.tell()


class _Stop:
    """Set by the first SIGINT or SIGTERM."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self._others: list[threading.Event] = []

    def also(self, event: threading.Event) -> None:
        """Set this event as well."""
        self._others.append(event)

    def __call__(self, number: int, frame: Any) -> None:
        if self.event.is_set():  # the second one does not wait for the picture under way
            raise KeyboardInterrupt
        for event in (self.event, *self._others):
            event.set()


@contextmanager
def stop_by_signals() -> Iterator[_Stop]:
    """Heed SIGINT and SIGTERM after the picture under way; off the main thread, nothing."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
