"""
What the server sees of a `Swappable`: start, crash, stop, and several servers.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fastapi import FastAPI

from aioserve import (
    ServerCrashedError,
    ShutdownError,
    StartupError,
    StartupInterruptedError,
    Swappable,
    serving,
    start,
)
from tests.helpers.apps import App, without_lifespan
from tests.helpers.clients import Connection, connect, get
from tests.helpers.plain import Plain
from tests.helpers.swapping import WHOLE_LIFE, Named, Slow, swapping
from tests.helpers.turns import MANY_TURNS, after, turns

pytestmark = pytest.mark.usefixtures("short_grace")


async def test_first_app_of_a_swappable_that_fails_to_start_fails_the_start() -> None:
    """With its own exception as the cause."""
    app = Named("first", "raises")
    with pytest.raises(StartupError, match="the app's lifespan failed to start: AppError: the app's own") as caught:
        await start(Swappable(app))
    assert caught.value.__cause__ is app.error


async def test_first_app_of_a_swappable_that_fails_without_an_exception_fails_the_start() -> None:
    """With the message that it sent."""
    with pytest.raises(StartupError, match=r"failed to start: .*as told") as caught:
        await start(Swappable(Named("first", "fails quietly")))
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("swapped", [False, True], ids=["the first app", "another app"])
async def test_swappable_app_that_fails_to_shut_down_is_a_shutdown_error(swapped: bool) -> None:
    """With its own exception as the cause."""
    app = Named("other", shutdown="raises")
    swappable = Swappable(Named("first") if swapped else app)
    with pytest.raises(ShutdownError, match="failed to shut down: AppError: the app's own") as caught:
        async with serving(swappable):
            if swapped:
                await swappable.swap(app)
    assert caught.value.__cause__ is app.error


@pytest.mark.parametrize("swapped", [False, True], ids=["the first app", "another app"])
async def test_swappable_app_whose_lifespan_dies_crashes_the_server(swapped: bool) -> None:
    """With the app's own exception as the cause; and no swap is possible any more."""
    app = Named("other")
    swappable = Swappable(Named("first") if swapped else app)
    with pytest.raises(ServerCrashedError) as caught:
        async with serving(swappable) as server:
            if swapped:
                await swappable.swap(app)
            app.crash.set()
            await server.wait_closed()
    assert caught.value.__cause__ is app.error
    assert app.life == ["startup", "lifespan over"]
    with pytest.raises(RuntimeError, match="works between the server's startup and its shutdown"):
        await swappable.swap(Named("third"))


async def test_crash_of_the_current_app_ends_a_new_app_that_is_starting() -> None:
    """Nothing is left half-started."""
    first, second = Named("first"), Named("other", "hangs")
    swappable = Swappable(first)
    server = await start(swappable)
    async with swapping(swappable, second) as swap:
        await second.started.wait()
        first.crash.set()
    with pytest.raises(StartupInterruptedError):
        swap.result()
    with pytest.raises(ServerCrashedError):
        await server.aclose()
    assert second.life == ["startup", "lifespan over"]


async def test_death_of_the_old_app_at_every_turn_of_a_swap_is_an_error() -> None:
    """Before the switch the server has crashed, after it the swap has failed; there is nothing in between."""
    outcomes = set()
    for turn in range(MANY_TURNS):
        first, second = Slow("first"), Slow("other")
        swappable = Swappable(first)
        server = await start(swappable)
        task = asyncio.create_task(swappable.swap(second))
        after(turn, first.crash.set)
        await asyncio.wait({task})
        await turns()
        error = task.exception()
        if isinstance(error, StartupInterruptedError):
            with pytest.raises(ServerCrashedError):
                await server.aclose()
            assert swappable.app is first
        else:
            assert (await get(server)).text == "other"
            assert isinstance(error, ShutdownError | None)
            await server.aclose()
            assert second.life == WHOLE_LIFE
        assert first.has_ended_if_begun()
        assert second.has_ended_if_begun()
        outcomes.add(type(error))
    assert outcomes == {StartupInterruptedError, ShutdownError, type(None)}


async def test_stop_of_the_server_interrupts_the_start_of_a_new_app() -> None:
    """The old app ends, and `swap()` raises an error."""
    first, second = Named("first"), Named("other", "hangs")
    swappable = Swappable(first)
    async with serving(swappable):
        task = asyncio.create_task(swappable.swap(second))
        await second.started.wait()
    await asyncio.wait({task})
    assert isinstance(task.exception(), StartupInterruptedError)
    assert (first.life, second.life) == (WHOLE_LIFE, ["startup", "lifespan over"])


async def test_stop_of_the_server_at_every_turn_of_a_swap_ends_both_apps() -> None:
    """Each once, whichever is the current one."""
    outcomes = set()
    for turn in range(MANY_TURNS):
        first, second = Slow("first"), Slow("other")
        swappable = Swappable(first)
        async with serving(swappable) as server:
            task = asyncio.create_task(swappable.swap(second))
            after(turn, server.close)
            await server.wait_closed()
        await asyncio.wait({task})
        error = task.exception()
        assert error is None or isinstance(error, StartupInterruptedError)
        assert first.life == WHOLE_LIFE
        assert second.has_ended_if_begun()
        assert error is not None or second.life == WHOLE_LIFE
        outcomes.add(error is None)
    assert outcomes == {True, False}


async def test_stop_during_a_swap_does_not_wait_for_a_stuck_handler() -> None:
    """The handler has had its time when the lifespan shuts down."""
    app = Named("first")
    swappable = Swappable(app)
    async with serving(swappable, shutdown_timeout=0) as server, connect(server) as connection:
        connection.ask("/cling")
        await app.holding.wait()
        async with swapping(swappable, Named("other"), shutdown_timeout=None) as swap:
            await turns()
            await server.aclose()
        swap.result()
    assert app.life == WHOLE_LIFE
    app.release.set()
    await turns()


async def test_shutdown_of_a_swappable_app_that_hangs_is_cancelled_by_the_server() -> None:
    """When its time is over: the cancellation is passed on to the app."""
    app = Named("first", shutdown="hangs")
    with pytest.raises(ShutdownError) as caught:
        async with serving(Swappable(app), shutdown_timeout=0) as server:
            pass
    assert isinstance(caught.value.__cause__, TimeoutError)
    assert server.report is not None
    assert not server.report.lifespan_stuck
    assert app.life == WHOLE_LIFE


async def test_swappable_that_is_served_again_begins_with_its_last_app() -> None:
    """One server after the other."""
    first, second = Named("first"), Named("other")
    swappable = Swappable(first)
    async with serving(swappable):
        await swappable.swap(second)
    async with serving(swappable) as server:
        assert (await get(server)).text == "other"
    assert (first.life, second.life) == (WHOLE_LIFE, WHOLE_LIFE * 2)


async def test_swappable_keeps_no_lifespan_state_after_its_server_has_stopped() -> None:
    """Nothing is left of what the lifespans have made."""
    swappable = Swappable(Named("first"))
    async with serving(swappable) as server:
        assert (await get(server)).text == "first"
    async with serving(swappable, lifespan="off") as server:
        assert (await get(server)).text == "hello"


async def test_swappable_can_be_served_by_one_server_at_a_time() -> None:
    """The second one cannot start."""
    swappable = Swappable(Named("first"))
    async with serving(swappable) as server:
        with pytest.raises(StartupError, match="a Swappable is for one server at a time"):
            await start(swappable)
        assert (await get(server)).text == "first"


def test_end_of_the_loop_shuts_a_swapped_app_down_in_order() -> None:
    """`asyncio.run()` cancels every task at its end, the app's as well; the last request is over before."""
    events = []
    asked = asyncio.Event()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            yield
            events.append("in order")
        finally:
            events.append("over")

    app = FastAPI(lifespan=lifespan)

    @app.get("/")
    async def hold() -> None:
        asked.set()
        try:
            await asyncio.Event().wait()
        finally:
            await turns(5)
            events.append("tidied up")

    async def main() -> socket.socket:
        swappable = Swappable(without_lifespan)
        server = await start(swappable)
        await swappable.swap(app)
        client = socket.create_connection((server.host, server.port))
        client.sendall(b"GET / HTTP/1.1\r\nhost: test\r\n\r\n")
        await asked.wait()
        return client

    asyncio.run(main()).close()
    assert events == ["tidied up", "in order", "over"]


async def test_swappable_works_with_uvicorns_own_server() -> None:
    """It is an ASGI app, and does not depend on the server."""
    first, second = Named("first"), Named("other")
    swappable = Swappable(first)
    async with Plain(swappable) as server:
        reader, writer = await asyncio.open_connection(server.host, server.port)
        connection = Connection(reader, writer)
        connection.ask("/")
        assert await connection.reader.readuntil(b"first")
        connection.ask("/hold")
        await first.holding.wait()
        async with swapping(swappable, second, shutdown_timeout=0) as swap:
            assert (await connection.reader.readuntil(b"try again.\n")).startswith(b"HTTP/1.1 503")
        swap.result()
        connection.ask("/")
        assert await connection.reader.readuntil(b"other")
        writer.close()
        await writer.wait_closed()
    assert (first.life, second.life) == (WHOLE_LIFE, WHOLE_LIFE)


@pytest.mark.parametrize("lifespan", ["on", "auto"])
async def test_uvicorns_own_server_logs_a_failed_shutdown_of_a_swappable(
    lifespan: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """It logs the message that it receives."""
    app = Named("first", shutdown="raises")
    async with Plain(Swappable(app), lifespan=lifespan):
        pass
    assert "the app's lifespan failed to shut down: AppError: the app's own" in caplog.text
    assert app.life == WHOLE_LIFE


async def test_uvicorns_own_server_logs_a_crash_of_a_swappable(caplog: pytest.LogCaptureFixture) -> None:
    """And goes on serving."""
    app = Named("first")
    async with Plain(Swappable(app), lifespan="on"):
        app.crash.set()
        await turns()
    assert "Exception in 'lifespan' protocol" in caplog.text
    assert "AppError: the app's own" in caplog.text
    assert app.life == ["startup", "lifespan over"]


@pytest.mark.parametrize("when", ["while it serves", "while it shuts down"])
async def test_cancelled_lifespan_of_a_swappable_ends_its_app(when: str) -> None:
    """As when the loop of another server ends; the app's lifespan ends, and then the cancellation goes on."""
    app = Named("first", shutdown="clings")
    messages = asyncio.Queue[dict[str, Any]]()
    said: list[str] = []

    async def send(message: Any) -> None:
        said.append(message["type"])

    scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}
    lifespan = asyncio.create_task(Swappable(app)(scope, messages.get, send))
    messages.put_nowait({"type": "lifespan.startup"})
    await turns()
    assert said == ["lifespan.startup.complete"]
    if when == "while it shuts down":
        messages.put_nowait({"type": "lifespan.shutdown"})
        await app.holding.wait()
    else:
        app.release.set()
    lifespan.cancel()
    await turns()
    app.release.set()
    await asyncio.wait({lifespan})
    assert lifespan.cancelled()
    assert app.life == WHOLE_LIFE
    assert said == ["lifespan.startup.complete"]


async def test_current_app_that_dies_during_a_swap_crashes_the_server() -> None:
    """The body, which awaits the swap, gets the server's error, with the app's own as its cause."""
    app = App()
    swappable = Swappable(app)
    with pytest.raises(ServerCrashedError) as caught:
        async with serving(swappable):
            after(5, app.crash.set)
            await swappable.swap(App("hangs"))
    assert caught.value.__cause__ is app.error


async def test_swap_interrupted_by_the_death_of_the_current_app_says_so() -> None:
    """With a server from `start()`, which cancels nobody."""
    app = App()
    swappable = Swappable(app)
    server = await start(swappable)
    after(5, app.crash.set)
    with pytest.raises(StartupInterruptedError, match="the current app's lifespan died, and so the server ends"):
        await swappable.swap(App("hangs"))
    with pytest.raises(ServerCrashedError):
        await server.aclose()
