"""
Rule 3 of the exit contract: a crash of the server cancels the body, and is raised or logged.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import anyio
import pytest

from aioserve import Server, ServerCrashedError, serving, start
from tests.helpers.apps import App, AppError, Receive, Scope, Send
from tests.helpers.clients import connect
from tests.helpers.turns import after, turns
from tests.helpers.ways import WAYS

pytestmark = pytest.mark.usefixtures("short_grace")

CRASHED = "the app's lifespan died while it was serving: AppError: the app's own"


async def test_crash_cancels_the_body_and_counts_no_cancellation() -> None:
    """`Task.cancelling()` is 0 afterwards, and the next await is not disturbed."""
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


async def test_crash_is_raised_after_a_body_that_swallows_its_cancellation() -> None:
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


async def test_exception_of_the_body_wins_over_the_crash(caplog: pytest.LogCaptureFixture) -> None:
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


@pytest.mark.parametrize("way", WAYS)
async def test_lifespan_that_raises_before_it_is_told_to_shut_down_has_crashed(
    way: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Though the stop was asked for before: it was finishing a request. The error is raised, and not logged as well."""
    app = App()
    tasks: list[asyncio.Task[None]] = []

    async def ask(server: Server) -> None:
        async with connect(server) as connection:
            connection.ask("/hold")
            await app.holding.wait()
            server.close()
            await turns()
            app.crash.set()
            await turns()
            app.release.set()
            assert (await connection.answer()).endswith(b"hello")

    async def body(server: Server) -> None:
        tasks.append(asyncio.create_task(ask(server)))
        if way != "serve":
            await app.holding.wait()

    with pytest.raises(ServerCrashedError) as caught:
        await WAYS[way](app, body)
    await asyncio.wait(tasks)
    assert caught.value.__cause__ is app.error
    assert str(caught.value) == "the app's lifespan died before it was told to shut down: AppError: the app's own"
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def test_crash_is_one_though_a_task_of_the_app_is_told_to_shut_down_after_it() -> None:
    """A task that the app's lifespan has left behind, which waits in `receive()`, can end."""
    error = AppError("the app's own")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        left.append(asyncio.create_task(receive()))  # type: ignore[arg-type]
        await dying.wait()
        raise error

    left: list[asyncio.Task[dict[str, str]]] = []
    dying = asyncio.Event()
    with pytest.raises(ServerCrashedError) as caught:
        async with serving(app):
            dying.set()
            await asyncio.Event().wait()
    assert caught.value.__cause__ is error
    assert await left[0] == {"type": "lifespan.shutdown"}


async def test_requests_in_flight_are_answered_after_a_crash() -> None:
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


async def test_cancellation_wins_over_a_crash(caplog: pytest.LogCaptureFixture) -> None:
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
async def test_scope_recognises_its_cancellation_beside_a_crash(turns: int) -> None:
    """Also when the two come in the same turn of the loop."""
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


async def test_crash_is_raised_in_a_task_that_was_cancelled_before() -> None:
    """In the clean-up of a cancelled task, a crash raises as always, and the earlier cancellation stays counted."""
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


async def test_crash_is_raised_in_a_generator_that_is_closed() -> None:
    """`GeneratorExit` does not win over the crash."""
    app = App()

    async def generator() -> AsyncIterator[Server]:
        async with serving(app) as server:
            yield server

    async def use() -> None:
        servers = generator()
        async with contextlib.aclosing(servers):  # type: ignore[type-var]
            async for _server in servers:
                app.crash.set()
                await asyncio.Event().wait()

    task = asyncio.create_task(use())
    await asyncio.wait({task})
    assert not task.cancelled()
    assert isinstance(task.exception(), ServerCrashedError)
    assert task.cancelling() == 0


async def test_crash_of_a_server_from_start_cancels_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """It is logged at once, and raised by `wait_closed()` and `aclose()`."""
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
