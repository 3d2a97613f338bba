"""Waiting for what is away for now: a full disk, an object store, a locked database.

Such an outage says nothing about the work that met it. The work is tried again, the user is told
once that it waits and once that it goes on, and only after a set time is it given up.
"""

from __future__ import annotations

import errno
import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    sleep_using_event,
    stop_after_delay,
    stop_when_event_set,
    wait_exponential,
    wait_random,
)

from clsnf.core.durations import duration
from clsnf.core.errors import OutageError
from clsnf.core.files import is_disk_full

T = TypeVar("T")

_FIRST, _MOST = 0.2, 15.0  # seconds between two attempts: they double from the first to the most
NEVER_TIRED = math.inf  # seconds of a patience that waits for ever
# What a disk, a network file system or a connection answers while it is away. No answer to a wrong
# path or a missing permission is among them.
_AWAY = {
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.ENOTCONN,
    errno.EPIPE,
}
_DATABASE_AWAY = {"OperationalError", "InterfaceError", "DisconnectionError", "TimeoutError"}


def find_outage(error: BaseException) -> BaseException | None:
    """The error, or the one among its causes, that says that something is away for now."""
    return next(filter(_says_outage, _causes(error)), None)


def is_outage(error: BaseException) -> bool:
    """Whether an error, or one that caused it, says that something is away for now."""
    return find_outage(error) is not None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__


def _says_outage(error: BaseException) -> bool:
    if isinstance(error, OutageError) or is_disk_full(error):
        return True
    if isinstance(error, OSError):
        return error.errno in _AWAY
    kind = type(error)
    return kind.__module__.startswith("sqlalchemy.exc") and kind.__name__ in _DATABASE_AWAY


def outage_line(error: BaseException) -> str:
    """What is away, in one line without a full stop."""
    error = find_outage(error) or error
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


class Patience:
    """Tries work again while an outage lasts.

    Args:
        seconds: how long an outage may last; 0 to try nothing again, NEVER_TIRED for ever.
        say: gets a line when the work waits, and one when it goes on.

    Attributes:
        over: when this event is set, nothing waits any longer.
    """

    def __init__(self, seconds: float, say: Callable[[str], None] = lambda line: None) -> None:
        self.seconds, self._say = seconds, say
        self.over = threading.Event()

    def wait_for(
        self,
        work: Callable[[], T],
        mend: Callable[[], None] = lambda: None,
        outage: Callable[[BaseException], bool] = is_outage,
    ) -> T:
        """What `work` returns, as soon as no outage hinders it.

        Args:
            work: what to do; done again after an outage, so it must not matter if it is done twice.
            mend: called before each new attempt.
            outage: whether an error says that something is away for now.

        Raises:
            OutageError: the outage lasted too long.
            Exception: what `work` raised that is no outage.
        """
        began = time.monotonic()
        waited = False

        def tell(state: RetryCallState) -> None:
            nonlocal waited
            error = None if state.outcome is None else state.outcome.exception()
            if not waited and error is not None:
                most = "" if self.seconds == NEVER_TIRED else duration(self.seconds)
                self._say(
                    f"{outage_line(error)}: waiting until it works again"
                    + (f", for at most {most}" if most else "")
                )
            waited = True

        def attempt() -> T:
            if waited:
                mend()
            return work()

        retrying = Retrying(
            stop=stop_after_delay(self.seconds) | stop_when_event_set(self.over),
            wait=wait_exponential(_FIRST, _MOST) + wait_random(0, _FIRST),
            retry=retry_if_exception(outage),
            sleep=sleep_using_event(self.over),
            before_sleep=tell,
            reraise=True,
        )
        try:
            result = retrying(attempt)
        except Exception as error:
            if isinstance(error, OutageError) or not outage(error):
                raise
            raise OutageError(f"{outage_line(error)}.") from error
        if waited:
            self._say(f"it works again after {duration(time.monotonic() - began)}")
        return result


NO_PATIENCE = Patience(0.0)
