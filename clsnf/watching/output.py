"""What every output is."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar

from clsnf.core.errors import OutputError, SettingsError
from clsnf.watching.result import Judgement, Result
from clsnf.watching.status import Status


class RefusedError(OutputError):
    """A receiver does not take a result, and never will."""


@dataclass(frozen=True)
class OutputContext:
    """What outputs know of the watch.

    Attributes:
        state_id: of the watch's memory, 8 hex digits; the results' ids begin with it.
        say: takes lines for people.
        shown_from: the map value from which overlays are coloured.
        map_threshold: the map value at which overlays are outlined.
        modbus_base: address of the first coil and of the first register.
        modbus_pulse: seconds for which the coil of a good product is on.
    """

    state_id: str
    say: Callable[[str], None]
    shown_from: float = 0.5
    map_threshold: float = 0.5
    modbus_base: int = 0
    modbus_pulse: float = 0.2


class Output:
    """Where results go. An output implements what it needs; the rest does nothing.

    Args:
        target: the value of the option that names it.
        context: the watch.

    Attributes:
        keeps_history: whether every result is delivered, from the disk where its receiver was away.
        batch: results that :meth:`deliver` gets at most.
        takes_files: whether it moves the judged files: one that comes back is judged again.

    Raises:
        SettingsError, OutputError: the target is no valid one, or can't be written.
    """

    keeps_history: ClassVar[bool] = False
    batch: ClassVar[int] = 1
    takes_files: ClassVar[bool] = False

    def __init__(self, target: str, context: OutputContext) -> None:
        self.target, self.context = target, context

    def open(self) -> None:
        """Begin, before the first picture.

        Raises:
            ClsnfError: a user has to mend something. That a receiver is away is no error.
        """

    def deliver(self, results: Sequence[Result]) -> None:
        """Give results to the receiver, oldest first. A result may come twice after a crash.

        Raises:
            OutageError: the receiver is away; the same results come again.
            RefusedError: it takes none of these results, and never will.
        """

    def busy(self, busy: bool) -> None:
        """Whether a picture is being judged; :meth:`show` ends it as well."""

    def show(self, judgement: Judgement) -> None:
        """A picture was judged; called once, and never waits for anybody."""

    def tell(self, status: Status) -> None:
        """How the watch stands, every few seconds; never waits for anybody."""

    def close(self, status: Status) -> None:
        """End, with the last status."""


def import_extra(module: str, option: str, extra: str) -> ModuleType:
    """A package that an extra of clsnf installs. Raises SettingsError where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SettingsError(
            f"{option} needs a package that is not installed: pip install 'clsnf[{extra}]'."
        ) from error
