"""
`Waiting`, on which the task of a server waits, on its own.
"""

from __future__ import annotations

import asyncio

from aioserve._waiting import Condition


async def test_notification_right_after_the_predicate_is_not_lost() -> None:
    """A signal handler may notify between any two steps."""
    waiting = Condition()
    looks = []

    def predicate() -> bool:
        looks.append(True)
        waiting.notify()  # right after this call
        return len(looks) > 1

    async with asyncio.timeout(5):
        assert await waiting.wait_for(predicate)


async def test_timeout_ends_wait_for() -> None:
    """It returns False."""
    waiting = Condition()
    assert not await waiting.wait_for(lambda: False, 0.01)
    assert not waiting.forced


async def test_force_ends_every_wait_that_is_not_exempt() -> None:
    """From then on, too."""
    waiting = Condition()
    asyncio.get_running_loop().call_soon(waiting.force)
    assert not await waiting.wait_for(lambda: False)
    assert not await waiting.wait_for(lambda: False, 3600)
    assert not await waiting.wait_for(lambda: False, 0.01, even_if_forced=True)


async def test_cancellation_of_wait_for_forces_the_stop() -> None:
    """The task that waits goes on, to an orderly end."""
    waiting = Condition()
    waiter = asyncio.create_task(waiting.wait_for(lambda: False))
    await asyncio.sleep(0)
    waiter.cancel()
    assert await waiter is False
    assert waiting.forced
