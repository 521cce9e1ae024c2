"""
How a server stops: what is in flight finishes within the budget, the rest is forced, and nothing waits on a clock.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
import websockets
from starlette.applications import Starlette
from websockets.asyncio.client import connect as connect_websocket

from aioserve import serving
from tests.apps import App
from tests.clients import Connection, connect, get

pytestmark = pytest.mark.usefixtures("short_grace")


async def test_a_request_in_flight_is_answered() -> None:
    """The block waits for it, and the connection closes after it."""
    app = App()

    async with serving(app, shutdown_timeout=None) as server, connect(server) as connection:
        connection.ask("/hold")
        await app.holding.wait()
        server.close()
        await server.stopping.wait()
        app.release.set()
        assert (await connection.rest()).endswith(b"hello")

    assert app.events == ["startup", "GET /hold", "answered /hold", "shutdown", "lifespan over"]


async def test_idle_connections_are_closed_at_once() -> None:
    """Kept alive or silent: nobody is owed anything."""
    async with serving(App(), shutdown_timeout=None) as server:
        async with connect(server) as kept_alive, connect(server) as silent:
            kept_alive.ask("/")
            await kept_alive.answer()
            await get(server)  # by now the silent one is accepted too
            assert server.stats.connections >= 2
            await server.aclose()
            assert await kept_alive.rest() == b""
            assert await silent.rest() == b""


async def test_a_websocket_is_told_to_come_again() -> None:
    """It is closed with 1012, "service restart"; its handler hears of it and ends."""
    app = App()

    async with serving(app, shutdown_timeout=None) as server:
        async with connect_websocket(server.url.replace("http", "ws"), proxy=None) as client:
            await client.send("hello")
            assert await client.recv() == "hello"
            server.close()
            with pytest.raises(websockets.ConnectionClosed):
                await client.recv()
            assert client.close_code == 1012
            await server.wait_closed()

    assert app.events[1:] == ["websocket 1012", "shutdown", "lifespan over"]


async def test_when_the_budget_is_over_the_handlers_are_cancelled_and_awaited(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The lifespan ends after the last of them; one line in the log says what was forced."""
    app = App()

    async with serving(app, shutdown_timeout=0.01) as server, connect(server) as connection:
        connection.ask("/hold")
        await app.holding.wait()

    assert app.events == ["startup", "GET /hold", "cancelled /hold", "shutdown", "lifespan over"]
    (line,) = (record.message for record in caplog.records if record.levelno >= logging.WARNING)
    assert re.fullmatch(
        rf"{server.url} was stopped by force; handlers told to end: 0, cancelled: 1; connections dropped: 0 "
        r"\(GET /hold of 127\.0\.0\.1:\d+ in App\.request \(.*apps\.py:\d+\)\)",
        line,
    )
    report = server.report
    assert report is not None
    (handler,) = report.cancelled
    assert handler[:2] == ("GET", "/hold")
    assert not handler.stuck
    assert handler.where[0].startswith("RequestResponseCycle.run_asgi (")
    assert handler.where[-1].startswith("Event.wait (")


async def test_an_endless_stream_does_not_hold_the_block() -> None:
    """It is cut off when the budget is over."""
    async with serving(App(), shutdown_timeout=0.01) as server, connect(server) as connection:
        connection.ask("/stream")
        await connection.reader.readuntil(b"data: 0\n\n")
        await server.aclose()
        await connection.rest()


async def test_a_client_that_never_reads_does_not_hold_the_block(caplog: pytest.LogCaptureFixture) -> None:
    """Its connection is dropped, whatever was still to be sent."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        writing.set()
        while True:
            await send({"type": "http.response.body", "body": bytes(1_000_000), "more_body": True})

    writing = asyncio.Event()
    async with serving(app, shutdown_timeout=0.01) as server, connect(server) as connection:
        transport: Any = connection.writer.transport
        transport.pause_reading()
        connection.ask("/")
        await writing.wait()
        await server.aclose()

    assert "cancelled: 1;" in caplog.text


async def test_a_handler_that_swallows_its_cancellation_does_not_hold_the_block(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It goes on by itself, the log says so, and the lifespan ends without it."""
    app = App()

    async with serving(app, shutdown_timeout=0) as server, connect(server) as connection:
        connection.ask("/cling")
        await app.holding.wait()
        (handler,) = server.uvicorn.server_state.tasks
        await server.aclose()
        assert "which is stuck" in caplog.text
        assert app.events[-2:] == ["shutdown", "lifespan over"]
        app.release.set()
        await asyncio.wait({handler})


async def test_without_a_limit_a_stop_waits_as_long_as_it_takes() -> None:
    """Here: until the handler is done, however many turns that takes."""
    app = App()

    async with serving(app, shutdown_timeout=None) as server, connect(server) as connection:
        connection.ask("/hold")
        await app.holding.wait()
        closing = asyncio.create_task(server.aclose())
        for _ in range(100):
            await asyncio.sleep(0)
        assert not closing.done()
        app.release.set()
        await closing


async def test_a_deadline_can_only_shorten() -> None:
    """A longer one than the server's own changes nothing, a shorter one does, also later on."""
    app = App()

    async with serving(app, shutdown_timeout=None) as server, connect(server) as connection:
        connection.ask("/hold")
        await app.holding.wait()
        server.close(timeout=3600)
        server.close(timeout=0.01)
        server.close(timeout=7200)
        await server.wait_closed()

    assert "cancelled /hold" in app.events


async def test_zero_forces() -> None:
    """Every handler is cancelled at once, and awaited; the lifespan still ends in order."""
    app = App()

    async with serving(app, shutdown_timeout=None) as server, connect(server) as connection:
        connection.ask("/hold")
        await app.holding.wait()
        server.close(timeout=0)
        await server.wait_closed()

    assert app.events == ["startup", "GET /hold", "cancelled /hold", "shutdown", "lifespan over"]


async def test_a_pipelined_request_behind_a_busy_one_does_not_hold_the_block() -> None:
    """There is no budget that could end the wait, so it must end by itself."""
    app = App()

    async with serving(app, shutdown_timeout=None) as server, connect(server) as connection:
        connection.ask("/hold")
        connection.ask("/")
        await app.holding.wait()
        server.close()
        app.release.set()
        assert (await connection.rest()).endswith(b"hello")


class Counting:
    """Counts what the running loop is asked for, by putting itself before its methods."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.timers = 0
        self.turns = 0
        self.counting = True
        loop: Any = asyncio.get_running_loop()
        for name in ("call_later", "call_at"):
            monkeypatch.setattr(loop, name, self.counted(getattr(loop, name)))
        loop.call_soon(self.turn)

    def counted(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.timers += self.counting
            return method(*args, **kwargs)

        return call

    def turn(self) -> None:
        self.turns += 1
        if self.counting:
            asyncio.get_running_loop().call_soon(self.turn)


@pytest.mark.parametrize("loop_name", ["asyncio"])  # the methods of a uvloop cannot be replaced
@pytest.mark.parametrize("connections", [0, 1, 20])
async def test_stopping_an_idle_server_makes_no_timer_and_takes_a_few_turns(
    connections: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many idle connections it has. Nothing in it can be slow, then."""
    clients: list[Connection] = []
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(serving(Starlette()))
        for _ in range(connections):
            client = await stack.enter_async_context(connect(server))
            client.ask("/nowhere")
            await client.reader.readuntil(b"Not Found")
            clients.append(client)
        counting = Counting(monkeypatch)
        await server.aclose()
        counting.counting = False

    assert counting.timers == 0
    assert counting.turns <= 3  # who asks; the lifespan, the connections and the server; and who waits
