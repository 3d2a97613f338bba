"""How much memory bodies and maps of requests under way may take in a replica."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import TracebackType

from clsnf.serving.errors import TooManyRequests

_RETRY = 1  # seconds


class BodyBudget:
    """One bound for all bodies under way, whatever they announce.

    Bytes count when they have arrived, so that a request that says much and sends nothing takes
    nothing. One client may hold half of it.

    Args:
        size: bytes.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._held: Counter[str] = Counter()
        self.peak = 0  # bytes held at most since somebody set it back

    @property
    def held(self) -> int:
        """Bytes of all bodies under way."""
        return self._held.total()

    def hold(self, client: str) -> BodyHolding:
        """What one request of a client holds: nothing yet."""
        return BodyHolding(self, client)

    def _add(self, client: str, size: int) -> None:
        if self.held + size > self._size:
            raise TooManyRequests(
                f"The bodies of the requests under way fill {self._size // 2**20} MiB: come again.",
                _RETRY,
            )
        if 2 * (self._held[client] + size) > self._size:
            raise TooManyRequests(
                f"The bodies of this client's requests under way fill {self._size // 2**21} MiB: "
                "send fewer at a time.",
                _RETRY,
            )
        self._held[client] += size
        self.peak = max(self.peak, self.held)

    def _remove(self, client: str, size: int) -> None:
        self._held[client] -= size
        if not self._held[client]:
            del self._held[client]


class BodyHolding:
    """The bytes of one request's body; a block that ends gives them back."""

    def __init__(self, budget: BodyBudget, client: str) -> None:
        self._budget, self._client, self._size = budget, client, 0

    def add(self, size: int) -> None:
        """Take more bytes. Raises TooManyRequests where they are too many."""
        self._budget._add(self._client, size)
        self._size += size

    def release(self) -> None:
        """Give all back; what comes twice is as once."""
        size, self._size = self._size, 0
        if size:
            self._budget._remove(self._client, size)

    def __enter__(self) -> BodyHolding:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.release()


class Allowance:
    """An amount that many blocks share; those that find too little left wait in their order.

    Args:
        size: in any unit.
    """

    def __init__(self, size: int) -> None:
        self._size, self._free = size, size
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def hold(self, amount: int) -> AsyncIterator[None]:
        """Hold an amount, at most all there is, while the block runs; waits until it is free."""
        amount = min(amount, self._size)
        if self._waiting or amount > self._free:
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append((amount, turn))
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._give_back(amount)
                else:
                    # Somebody who gave back may have passed over it already.
                    with contextlib.suppress(ValueError):
                        self._waiting.remove((amount, turn))
                    self._give_back(0)
                raise
        else:
            self._free -= amount
        try:
            yield
        finally:
            self._give_back(amount)

    def _give_back(self, amount: int) -> None:
        self._free += amount
        while self._waiting and self._waiting[0][0] <= self._free:
            taken, turn = self._waiting.popleft()
            if turn.cancelled():
                continue
            self._free -= taken
            turn.set_result(None)
