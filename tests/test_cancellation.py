"""
Rules 3 and 6 of the exit contract, closely: who is cancelled, when, how often, and what is left of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import pytest
from starlette.applications import Starlette

from aioserve import ServerCrashedError, StartupError, serve, serving, start
from aioserve._leaks import descriptors
from tests.apps import App, AppError
from tests.clients import connect, get
from tests.turns import after

CRASHED = "the app's lifespan died while it was serving: AppError: the app's own"

# Enough for a stop to come to where it waits for the handlers.
MANY_TURNS = 30

pytestmark = pytest.mark.usefixtures("short_grace")


async def test_the_body_unwinds_first_and_its_server_still_answers() -> None:
    """A `finally` in the block can call the server that the block is about."""
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
async def test_a_cancelled_block_still_answers_what_is_in_flight(native: bool) -> None:
    """The stop is shielded; even from an anyio scope, which cancels anew on every turn."""
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


async def stop_while_holding(app: App, ending: Callable[[asyncio.Task[None]], Any]) -> asyncio.Task[None]:
    """Begin to stop a server with a request in flight, then do something to the block that waits for it."""

    async def block() -> None:
        async with serving(app, shutdown_timeout=None) as server:
            connection = await stack.enter_async_context(connect(server))
            connection.ask("/hold")
            await app.holding.wait()
            stopping.append(server.stopping)

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


async def test_a_first_cancellation_during_the_stop_does_not_force_it() -> None:
    """The request is answered, then the cancellation goes on."""
    app = App()

    def ending(task: asyncio.Task[None]) -> None:
        task.cancel()
        after(MANY_TURNS, app.release.set)

    task = await stop_while_holding(app, ending)

    assert task.cancelled()
    assert "answered /hold" in app.events


async def test_a_second_cancellation_forces() -> None:
    """The handler is cancelled at once, and awaited all the same; so is the lifespan."""
    app = App()

    def ending(task: asyncio.Task[None]) -> None:
        task.cancel()
        after(1, task.cancel)

    task = await stop_while_holding(app, ending)

    assert task.cancelled()
    assert task.cancelling() == 2
    assert app.events == ["startup", "GET /hold", "cancelled /hold", "shutdown", "lifespan over"]


async def test_a_second_cancellation_forces_wherever_the_first_one_struck() -> None:
    """Here in the body, which made it the cause of the stop."""
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


async def test_a_late_cancellation_keeps_the_bodys_exception_as_its_context() -> None:
    """Nothing that was raised is lost."""
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


async def test_a_crash_cancels_the_body_and_nobody_else_notices() -> None:
    """To the task, it never was a cancellation: nothing is counted, and the next await is undisturbed."""
    app = App()
    seen = []

    with pytest.raises(ServerCrashedError) as caught:
        async with serving(app):
            app.crash.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                seen.append("cancelled")
                raise

    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    await asyncio.sleep(0)
    assert seen == ["cancelled"]
    assert caught.value.__cause__ is app.error
    assert str(caught.value) == CRASHED


async def test_a_body_that_swallows_the_crash_hears_of_it_all_the_same() -> None:
    """The error is raised at the end of the block."""
    app = App()

    with pytest.raises(ServerCrashedError):
        async with serving(app):
            app.crash.set()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()

    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_a_body_that_raises_instead_wins_over_the_crash(caplog: pytest.LogCaptureFixture) -> None:
    """The crash is added as a note, and logged."""
    app = App()

    with pytest.raises(KeyError) as caught:
        async with serving(app):
            app.crash.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                raise KeyError("the body's") from None

    assert caught.value.__notes__ == [
        f"aioserve: the server failed as well: ServerCrashedError: {CRASHED}",
    ]
    assert "the app's lifespan died" in caplog.text


async def test_a_crash_lets_the_requests_in_flight_finish() -> None:
    """They have the same budget as in any stop."""
    app = App()

    with pytest.raises(ServerCrashedError):
        async with serving(app) as server, connect(server) as connection:
            connection.ask("/hold")
            await app.holding.wait()
            app.crash.set()
            try:
                await asyncio.Event().wait()
            finally:
                app.release.set()
                assert (await connection.answer()).endswith(b"hello")

    assert "answered /hold" in app.events


async def test_a_cancellation_wins_over_a_crash(caplog: pytest.LogCaptureFixture) -> None:
    """When both come, the crash is logged, and the cancellation goes on."""
    app = App()

    async def block() -> None:
        async with serving(app):
            started.set()
            try:
                await asyncio.Event().wait()
            finally:
                app.crash.set()
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.Event().wait()

    started = asyncio.Event()
    task = asyncio.create_task(block())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert task.cancelling() == 1
    assert "the app's lifespan died" in caplog.text


@pytest.mark.parametrize("turns", range(16))
async def test_a_scope_and_a_crash_in_the_same_moment(turns: int) -> None:
    """The scope knows its own cancellation again, also when it and the crash came as one."""
    app = App()
    scope = anyio.CancelScope()
    passed = False

    async def block() -> None:
        nonlocal passed
        with scope:
            async with serving(app):
                app.crash.set()
                after(turns, scope.cancel)
                await asyncio.Event().wait()
        passed = True

    task = asyncio.create_task(block())
    await asyncio.wait({task})

    assert not task.cancelled()
    assert task.cancelling() == 0
    assert passed or isinstance(task.exception(), ServerCrashedError)


async def test_a_task_that_was_cancelled_before_can_still_serve() -> None:
    """In the clean-up of a cancelled task, a crash is a crash, and what came before the block is not its business."""
    app = App()

    async def block() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            try:
                async with serving(app):
                    app.crash.set()
                    await asyncio.Event().wait()
            except ServerCrashedError as exc:
                crashes.append(exc)

    crashes: list[ServerCrashedError] = []
    task = asyncio.create_task(block())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(crashes) == 1
    assert task.cancelling() == 1


async def test_start_cancels_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """A crash is logged at once, and raised to whoever waits for the server or closes it."""
    app = App()

    async with asyncio.timeout(5):
        server = await start(app)
        app.crash.set()
        with pytest.raises(ServerCrashedError) as first:
            await server.wait_closed()
        with pytest.raises(ServerCrashedError) as second:
            await server.aclose()

    assert first.value is second.value
    assert "the app's lifespan died" in caplog.text


async def test_start_and_stop_may_happen_in_different_tasks() -> None:
    """As in a notebook, where each cell is a task, or with hooks."""
    server = await asyncio.create_task(start(App()))
    assert (await get(server)).text == "hello"
    await asyncio.create_task(server.aclose())
    assert not server.is_serving()


async def test_a_block_may_end_in_another_task() -> None:
    """As pytest-asyncio does with fixtures; only a crash needs the task that entered."""
    block = serving(App())
    server = await asyncio.create_task(block.__aenter__())
    assert (await get(server)).text == "hello"
    await asyncio.create_task(block.__aexit__(None, None, None))
    assert not server.is_serving()


async def test_cancelling_the_servers_own_task_only_forces() -> None:
    """That is what `asyncio.run` does at its end; the handlers are awaited and the lifespan ends."""
    app = App()

    async with asyncio.timeout(5):
        async with serving(app) as server, connect(server) as connection:
            connection.ask("/hold")
            await app.holding.wait()
            (own,) = (task for task in asyncio.all_tasks() if task.get_name() == f"aioserve {server.url}")
            own.cancel()
            await server.wait_closed()

    assert app.events == ["startup", "GET /hold", "cancelled /hold", "shutdown", "lifespan over"]


@pytest.mark.parametrize("turns", range(4))
async def test_cancelling_the_lifespans_task_while_it_starts(turns: int) -> None:
    """Even before its first step: it has failed to start, and nobody waits for the timeout."""
    starting = asyncio.create_task(start(App(), startup_timeout=None))
    while not (lifespan := [task for task in asyncio.all_tasks() if task.get_name() == "aioserve lifespan"]):
        await asyncio.sleep(0)
    after(turns, lifespan[0].cancel)
    try:
        server = await starting
    except StartupError as exc:
        cause = exc.__cause__
    else:
        with pytest.raises(ServerCrashedError) as caught:
            await server.wait_closed()
        cause = caught.value.__cause__
    assert isinstance(cause, asyncio.CancelledError)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with Python 3.12")
@pytest.mark.parametrize("loop_name", ["asyncio"])
async def test_eager_tasks_find_everything_in_its_place() -> None:
    """The lifespan runs before `start()` has got hold of its own task."""
    watching: list[asyncio.Task[None]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        server = scope["state"]["aioserve"]
        assert "starting" in repr(server)
        watching.append(asyncio.create_task(server.wait_closed()))
        with pytest.raises(RuntimeError, match="would wait for itself"):
            await server.aclose()
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()

    loop = asyncio.get_running_loop()
    loop.set_task_factory(getattr(asyncio, "eager_task_factory"))  # noqa: B009 (mypy looks with the oldest Python)
    try:
        async with serving(app) as server:
            assert server.is_serving()
        await asyncio.wait(watching)
    finally:
        loop.set_task_factory(None)


@pytest.mark.parametrize("turns", range(8))
async def test_cancelling_the_servers_own_task_while_it_starts(turns: int) -> None:
    """Even before its first step, when none of its code runs: the starter is told, or has its server, which closes."""
    opened = descriptors()
    before = asyncio.all_tasks()
    starting = asyncio.create_task(start(App()))
    while not (own := [task for task in asyncio.all_tasks() - before if task.get_name().startswith("aioserve http")]):
        await asyncio.sleep(0)
    after(turns, own[0].cancel)
    try:
        await (await starting).wait_closed()
    except StartupError:
        pass  # it was too early to start
    assert descriptors() == opened


@pytest.mark.parametrize("door", ["start", "serve"])
def test_a_server_that_is_forgotten_ends_with_its_loop(door: str, caplog: pytest.LogCaptureFixture) -> None:
    """`asyncio.run` cancels what is left; our lifespan is told of the shutdown all the same, and nothing is logged."""
    events = []

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        events.append("started")
        yield
        await asyncio.sleep(0)
        events.append("shut down")

    async def main() -> None:
        app = Starlette(lifespan=lifespan)
        if door == "start":
            forgotten.append(await start(app))
        else:
            forgotten.append(asyncio.create_task(serve(app)))
            while not events:
                await asyncio.sleep(0)

    forgotten: list[object] = []
    asyncio.run(main())

    assert events == ["started", "shut down"]
    assert [record for record in caplog.records if record.name == "aioserve"] == []


async def test_wait_closed_only_watches() -> None:
    """Cancelling it does nothing to the server."""
    async with serving(App()) as server:
        waiter = asyncio.create_task(server.wait_closed())
        await asyncio.sleep(0)
        waiter.cancel()
        await asyncio.wait({waiter})

        assert waiter.cancelled()
        assert server.is_serving()


TURNS = 40


@pytest.mark.parametrize("scoped", [False, True], ids=["natively", "by a scope"])
async def test_a_cancellation_at_every_turn(scoped: bool) -> None:
    """Walk through start, one request and stop: wherever it is cancelled, it comes out cancelled, and all is gone."""

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
async def test_a_cancellation_in_the_first_step_of_the_startup_comes_first(*, fails: bool) -> None:
    """Also where tasks begin at once, so that the start has failed, or succeeded, before anybody has waited for it."""
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


async def test_a_scope_that_is_cancelled_in_a_first_step_that_fails_has_its_cancellation() -> None:
    """It does not leak out of the scope behind the error."""
    with anyio.CancelScope() as scope:

        async def app(_scope: Any, receive: Any, _send: Any) -> None:
            await receive()
            scope.cancel()
            raise AppError

        async with serving(app):
            pass
    assert scope.cancelled_caught
    await asyncio.sleep(0)
