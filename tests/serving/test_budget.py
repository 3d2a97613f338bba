"""Bounds that requests share: bytes of bodies, pixels of maps."""

from __future__ import annotations

import asyncio

import pytest

from clsnf.serving.budget import Allowance, BodyBudget
from clsnf.serving.errors import TooManyRequests


def test_bodies_share_a_bound_and_one_client_has_half_of_it() -> None:
    budget = BodyBudget(100)
    with budget.hold("a") as first, budget.hold("a") as second:
        first.add(30)
        second.add(20)
        with pytest.raises(TooManyRequests, match="this client"):
            first.add(1)
        with budget.hold("b") as other, budget.hold("c") as third:
            other.add(45)
            with pytest.raises(TooManyRequests, match="come again") as caught:
                third.add(6)
            assert caught.value.headers["Retry-After"] == "1"
        assert budget.held == 50
        second.release()
        second.release()
        first.add(20)
    assert budget.held == 0


def test_who_finds_too_little_left_waits_in_its_order() -> None:
    async def main() -> None:
        allowance, order = Allowance(10), []

        async def take(name: str, amount: int, until: asyncio.Event) -> None:
            async with allowance.hold(amount):
                order.append(name)
                await until.wait()

        done, late = asyncio.Event(), asyncio.Event()
        takers = [asyncio.create_task(take("first", 6, done))]
        takers.append(asyncio.create_task(take("huge", 1000, late)))
        leaving = asyncio.create_task(take("leaving", 10, late))
        takers.append(asyncio.create_task(take("small", 1, late)))
        await asyncio.sleep(0)
        assert order == ["first"], "the small one does not overtake"
        leaving.cancel()
        done.set()
        await asyncio.sleep(0.01)
        assert order == ["first", "huge"]
        late.set()
        await asyncio.gather(*takers)
        assert order == ["first", "huge", "small"]
        async with asyncio.timeout(10), allowance.hold(10):
            pass

    asyncio.run(main())


def test_those_who_give_up_at_the_same_moment_leave_nothing_behind() -> None:
    async def main() -> None:
        allowance, leave = Allowance(10), asyncio.Event()

        async def take(amount: int) -> None:
            async with allowance.hold(amount):
                await leave.wait()

        first = asyncio.create_task(take(6))
        waiting = [asyncio.create_task(take(amount)) for amount in (8, 3, 4)]
        await asyncio.sleep(0)
        for task in waiting:
            task.cancel()
        found = await asyncio.gather(*waiting, return_exceptions=True)
        assert {type(each) for each in found} == {asyncio.CancelledError}
        leave.set()
        await first
        async with asyncio.timeout(10), allowance.hold(10):
            pass

    asyncio.run(main())
