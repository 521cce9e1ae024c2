"""
Rule 6 of the exit contract: who is cancelled, when, how often, and what comes out.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import anyio
import pytest

from aioserve import serving
from tests.helpers.apps import App, AppError
from tests.helpers.clients import connect, get
from tests.helpers.turns import after

pytestmark = pytest.mark.usefixtures("short_grace")

# After so many turns, a stop waits for the handlers.
MANY_TURNS = 30


async def test_body_unwinds_while_its_server_still_answers() -> None:
    """A `finally` in the block can send requests to the block's server."""
    answers: list[str] = []

    async def block() -> None:
        async with serving(App()) as server:
            try:
                started.set()
                await asyncio.Event().wait()
            finally:
                answers.append((await get(server)).text)

    started = asyncio.Event()
    task = asyncio.create_task(block())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert answers == ["hello"]


@pytest.mark.parametrize("native", [True, False], ids=["natively", "by a scope"])
async def test_requests_in_flight_are_answered_after_a_cancellation(native: bool) -> None:
    """The stop is shielded, also from an anyio scope, which cancels again on every turn of the loop."""
    app = App()

    async def block() -> None:
        with scope:
            async with serving(app) as server, connect(server) as connection:
                connection.ask("/hold")
                await app.holding.wait()
                after(1, task.cancel if native else scope.cancel)
                after(MANY_TURNS, app.release.set)
                await asyncio.Event().wait()

    scope = anyio.CancelScope()
    task = asyncio.create_task(block())
    await asyncio.wait({task})

    assert task.cancelled() == native
    assert "answered /hold" in app.events


async def stop_while_holding(
    app: App,
    ending: Callable[[asyncio.Task[None]], Any],
    *,
    leave: Callable[[asyncio.Task[None], anyio.CancelScope], Any] | None = None,
) -> asyncio.Task[None]:
    """
    Begin to stop a server with a request in flight, then do something to the block that waits for it.

    With `leave`, the block is in a scope, and waits in its body for what that does.
    """

    async def block() -> None:
        scope = anyio.CancelScope()
        with scope if leave is not None else contextlib.nullcontext():
            async with serving(app, shutdown_timeout=None) as server:
                connection = await stack.enter_async_context(connect(server))
                connection.ask("/hold")
                await app.holding.wait()
                stopping.append(server.stopping)
                if leave is not None:
                    leave(task, scope)
                    await asyncio.Event().wait()

    stopping: list[anyio.Event] = []
    async with contextlib.AsyncExitStack() as stack:
        task = asyncio.create_task(block())
        await app.holding.wait()
        while not stopping:
            await asyncio.sleep(0)
        await stopping[0].wait()
        ending(task)
        await asyncio.wait({task})
    return task


async def test_first_cancellation_during_the_stop_does_not_force_it() -> None:
    """The request is answered, then the cancellation goes on."""
    app = App()

    def ending(task: asyncio.Task[None]) -> None:
        task.cancel()
        after(MANY_TURNS, app.release.set)

    task = await stop_while_holding(app, ending)

    assert task.cancelled()
    assert "answered /hold" in app.events


async def test_second_cancellation_forces_the_stop() -> None:
    """The handler is cancelled at once, and still awaited, as is the lifespan."""
    app = App()

    def ending(task: asyncio.Task[None]) -> None:
        task.cancel()
        after(1, task.cancel)

    task = await stop_while_holding(app, ending)

    assert task.cancelled()
    assert task.cancelling() == 2
    assert app.events == ["startup", "GET /hold", "cancelled /hold", "shutdown", "lifespan over"]


async def test_cancellation_by_a_scope_is_not_the_first_of_two() -> None:
    """A scope ends the body; the single native cancellation that comes in the stop does not force it."""
    app = App()

    def ending(task: asyncio.Task[None]) -> None:
        task.cancel()
        after(MANY_TURNS, app.release.set)

    await stop_while_holding(app, ending, leave=lambda _, scope: scope.cancel())

    assert "answered /hold" in app.events  # (anyio before 4.16 takes the native one for the scope's, and swallows it)


async def test_native_cancellation_counts_beside_that_of_a_scope() -> None:
    """So the next native one forces."""
    app = App()

    def both(task: asyncio.Task[None], scope: anyio.CancelScope) -> None:
        task.cancel()
        scope.cancel()

    task = await stop_while_holding(app, lambda task: task.cancel(), leave=both)

    assert "cancelled /hold" in app.events
    assert task.cancelled()


async def test_second_cancellation_forces_when_the_first_one_reached_the_body() -> None:
    """The first one has cancelled the body, and so caused the stop."""
    app = App()

    async def block() -> None:
        async with serving(app, shutdown_timeout=None) as server:
            connection = await stack.enter_async_context(connect(server))
            connection.ask("/hold")
            await asyncio.Event().wait()

    async with contextlib.AsyncExitStack() as stack:
        task = asyncio.create_task(block())
        await app.holding.wait()
        task.cancel()
        after(MANY_TURNS, task.cancel)
        await asyncio.wait({task})

    assert task.cancelled()
    assert "cancelled /hold" in app.events


async def test_cancellation_during_the_stop_has_the_bodys_exception_as_context() -> None:
    """No exception that was raised is lost."""
    app = App()
    error = ValueError("the body's")

    async def block() -> None:
        async with serving(app) as server, connect(server) as connection:
            connection.ask("/hold")
            await app.holding.wait()
            after(MANY_TURNS, late)
            raise error

    def late() -> None:
        task.cancel()
        app.release.set()

    task = asyncio.create_task(block())
    with pytest.raises(asyncio.CancelledError) as caught:
        await task

    chain = [caught.value.__context__]
    while chain[-1] is not None:
        chain.append(chain[-1].__context__)
    assert error in chain


TURNS = 40


@pytest.mark.parametrize("scoped", [False, True], ids=["natively", "by a scope"])
async def test_block_can_be_cancelled_at_every_turn(scoped: bool) -> None:
    """
    At whichever turn of start, request and stop it is cancelled, it ends as cancelled, and none of its tasks is left.
    """

    async def block() -> None:
        with scope:
            async with serving(App()) as server, connect(server) as connection:
                connection.ask("/")
                await connection.answer()

    before = asyncio.all_tasks()
    for turn in range(TURNS):
        scope = anyio.CancelScope()
        task = asyncio.create_task(block())
        after(turn, scope.cancel if scoped else task.cancel)
        await asyncio.wait({task})

        assert task.cancelled() == (not scoped) or task.exception() is None
        assert task.cancelling() in ((0,) if scoped else (0, 1))
        assert {each for each in asyncio.all_tasks() if "aioserve" in each.get_name()} == set()
    assert before == asyncio.all_tasks()


@pytest.mark.parametrize("fails", [False, True])
async def test_cancellation_in_the_first_step_of_the_startup_wins(*, fails: bool) -> None:
    """Also with eager tasks, where the start has failed or succeeded before anybody has awaited it."""
    caller = asyncio.current_task()
    assert caller is not None
    error = AppError()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        caller.cancel()
        if fails:
            raise error
        await send({"type": "lifespan.startup.complete"})

    ran = False
    with pytest.raises(asyncio.CancelledError):
        async with serving(app):
            ran = True
    assert not ran
    assert caller.uncancel() == 0
    await asyncio.sleep(0)


async def test_scope_that_is_cancelled_in_a_startup_that_fails_catches_its_cancellation() -> None:
    """The cancellation does not get out of the scope behind the error."""
    with anyio.CancelScope() as scope:

        async def app(_scope: Any, receive: Any, _send: Any) -> None:
            await receive()
            scope.cancel()
            raise AppError

        async with serving(app):
            pass
    assert scope.cancelled_caught
    await asyncio.sleep(0)
