"""
The one wait of a server's task, by itself.
"""

from __future__ import annotations

import asyncio

from aioserve._waiting import Waiting


async def test_a_change_right_after_the_look_is_not_lost() -> None:
    """As a signal handler makes it, between any two steps."""
    waiting = Waiting()
    looks = []

    def predicate() -> bool:
        looks.append(True)
        waiting.notify()  # it changes just when this look is over
        return len(looks) > 1

    async with asyncio.timeout(5):
        assert await waiting.wait_for(predicate)


async def test_the_timeout_ends_the_wait() -> None:
    """And says that nothing has come of it."""
    waiting = Waiting()
    assert not await waiting.wait_for(lambda: False, 0.01)
    assert not waiting.forced


async def test_force_ends_every_wait_but_the_bounded_ones() -> None:
    """Now and from then on."""
    waiting = Waiting()
    asyncio.get_running_loop().call_soon(waiting.force)
    assert not await waiting.wait_for(lambda: False)
    assert not await waiting.wait_for(lambda: False, 3600)
    assert not await waiting.wait_for(lambda: False, 0.01, even_if_forced=True)


async def test_a_cancellation_forces() -> None:
    """The task that waits goes on, to come to an orderly end."""
    waiting = Waiting()
    waiter = asyncio.create_task(waiting.wait_for(lambda: False))
    await asyncio.sleep(0)
    waiter.cancel()
    assert await waiter is False
    assert waiting.forced
