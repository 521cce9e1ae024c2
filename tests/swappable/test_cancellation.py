"""
A swap that is cancelled: before the switch the new app ends, after it the old one.
"""

from __future__ import annotations

import asyncio

import anyio
import pytest

from aioserve import (
    ShutdownError,
    StartupInterruptedError,
    Swappable,
    serving,
    start,
)
from tests.helpers.clients import connect, get
from tests.helpers.swapping import WHOLE_LIFE, Named, Slow, swapping, switched
from tests.helpers.turns import MANY_TURNS, after, turns

pytestmark = pytest.mark.usefixtures("short_grace")


@pytest.mark.parametrize("how", ["natively", "by a scope"])
async def test_swap_can_be_cancelled_at_every_turn(how: str) -> None:
    """Before the switch the new app ends, after it the old one; and the cancellation comes out."""
    outcomes = set()
    for turn in range(MANY_TURNS):
        first, second = Slow("first"), Slow("other")
        swappable = Swappable(first)
        async with serving(swappable) as server, connect(server) as connection:
            connection.ask("/hold")
            await first.holding.wait()
            after(turn // 2, first.release.set)
            if how == "natively":
                task = asyncio.create_task(swappable.swap(second))
                after(turn, task.cancel)
                await asyncio.wait({task})
                cancelled = task.cancelled()
            else:
                with anyio.CancelScope() as scope:
                    after(turn, scope.cancel)
                    await swappable.swap(second)
                cancelled = scope.cancelled_caught
            gone, stays = (second, first) if swappable.app is first else (first, second)
            assert gone.has_ended_if_begun()
            assert stays.life == ["startup"]
            assert await connection.reader.readuntil(b"first")
            assert (await get(server)).text == stays.name
        assert stays.life == WHOLE_LIFE
        assert first.life == WHOLE_LIFE
        outcomes.add((swappable.app is second, cancelled))
    assert outcomes == {(False, True), (True, True), (True, False)}


async def test_new_app_that_hangs_cannot_block_a_swap_cancelled_before_the_switch() -> None:
    """The app has just started, and hangs when it is to shut down again."""
    for turn in range(MANY_TURNS):
        first, second = Named("first"), Slow("other", shutdown="hangs")
        swappable = Swappable(first)
        server = await start(swappable)
        task = asyncio.create_task(swappable.swap(second))
        after(turn, task.cancel)
        await asyncio.wait({task})
        if swappable.app is second:
            break
        await server.aclose()
        assert second.has_ended_if_begun()
    assert second.life == ["startup"]
    with pytest.raises(ShutdownError):
        server.close(timeout=0)
        await server.aclose()


async def test_swap_cancelled_after_the_switch_lets_the_old_app_finish() -> None:
    """Its requests keep their time; a second cancellation ends it."""
    first, second = Named("first"), Named("other")
    swappable = Swappable(first)
    async with serving(swappable) as server, connect(server) as connection:
        connection.ask("/hold")
        await first.holding.wait()
        async with swapping(swappable, second, shutdown_timeout=None) as swap:
            await switched(swappable, second)
            swap.cancel()
            await turns()
            assert not swap.done()
            swap.cancel()
        assert swap.cancelled()
        assert first.events == ["startup", "GET /hold", "cancelled /hold", "shutdown", "lifespan over"]
        assert (await connection.reader.readuntil(b"try again.\n")).startswith(b"HTTP/1.1 503")


async def test_swap_cancelled_by_a_scope_lets_the_old_app_finish() -> None:
    """Although the scope cancels again on each turn of the loop."""
    first = Named("first")
    swappable = Swappable(first)
    async with serving(swappable) as server, connect(server) as connection:
        connection.ask("/hold")
        await first.holding.wait()
        with anyio.CancelScope() as scope:
            after(MANY_TURNS, scope.cancel)
            after(2 * MANY_TURNS, first.release.set)
            await swappable.swap(Named("other"))
        assert scope.cancelled_caught
        assert await connection.reader.readuntil(b"first")
    assert first.events == ["startup", "GET /hold", "answered /hold", "shutdown", "lifespan over"]


async def test_failure_of_the_old_app_behind_a_cancellation_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Since it is the cancellation that comes out."""
    first, second = Named("first", shutdown="raises"), Named("other")
    swappable = Swappable(first)
    async with serving(swappable) as server, connect(server) as connection:
        connection.ask("/hold")
        await first.holding.wait()
        async with swapping(swappable, second) as swap:
            await switched(swappable, second)
            swap.cancel()
            await turns()
            first.release.set()
        assert swap.cancelled()
        assert await connection.reader.readuntil(b"first")
    assert "the app's lifespan failed to shut down: AppError: the app's own" in caplog.text


async def test_swap_that_waits_for_another_swap_can_be_cancelled() -> None:
    """Its app is not called."""
    first, second, third = Named("first"), Named("other", "hangs"), Named("third")
    swappable = Swappable(first)
    async with serving(swappable) as server:
        async with swapping(swappable, second) as one:
            await second.started.wait()
            async with swapping(swappable, third) as two:
                await turns()
                two.cancel()
            assert two.cancelled()
            one.cancel()
        assert one.cancelled()
        assert (await get(server)).text == "first"
    assert (second.life, third.events) == (["startup", "lifespan over"], [])


async def test_swap_that_waits_for_another_swap_is_refused_when_the_server_stops() -> None:
    """Its app is not called."""
    second, third = Named("other", "hangs"), Named("third")
    swappable = Swappable(Named("first"))
    async with serving(swappable):
        one = asyncio.create_task(swappable.swap(second))
        await second.started.wait()
        two = asyncio.create_task(swappable.swap(third))
        await turns()
    await asyncio.wait({one, two})
    assert isinstance(one.exception(), StartupInterruptedError)
    with pytest.raises(RuntimeError, match="works between the server's startup and its shutdown"):
        two.result()
    assert third.events == []
