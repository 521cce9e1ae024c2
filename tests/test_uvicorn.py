"""
What `server.uvicorn` is for code that knows uvicorn, and what we do in place of its tick.
"""

from __future__ import annotations

import asyncio
import email.utils
import time
from typing import Any

import pytest
import uvicorn
from websockets.asyncio.client import connect as connect_websocket

from aioserve import ServerCrashedError, _engine, _shutdown, serving, start
from tests.apps import App
from tests.clients import connect, get

pytestmark = pytest.mark.usefixtures("short_grace")


async def test_it_really_is_a_uvicorn_server() -> None:
    """And its `serve()` is the coroutine that runs as the task."""
    async with serving(App()) as server:
        assert isinstance(server.uvicorn, uvicorn.Server)
        assert server.uvicorn.started
        assert [sock for each in server.uvicorn.servers for sock in each.sockets]
        assert server.uvicorn.server_state.total_requests == 0
        assert server.uvicorn.lifespan.state is server.state
        coroutines = [task.get_coro() for task in asyncio.all_tasks()]
        assert [c for c in coroutines if getattr(c, "__qualname__", "") == "Engine.serve"]


async def test_should_exit_closes() -> None:
    """As code does that polls nothing and just sets it."""
    async with serving(App()) as server:
        assert not server.uvicorn.should_exit
        server.uvicorn.should_exit = False
        assert not server.stopping.is_set()
        server.uvicorn.should_exit = True
        assert server.uvicorn.should_exit
        await server.wait_closed()


async def test_should_exit_can_be_set_in_another_thread() -> None:
    """The loop is woken up for it."""
    async with serving(App()) as server:
        await asyncio.to_thread(setattr, server.uvicorn, "should_exit", True)
        await server.wait_closed()
    await asyncio.get_running_loop().shutdown_default_executor()


async def test_force_exit_forces() -> None:
    """Handlers are cancelled at once."""
    app = App()
    async with serving(app, shutdown_timeout=None) as server, connect(server) as connection:
        connection.ask("/hold")
        await app.holding.wait()
        server.uvicorn.force_exit = False
        assert not server.uvicorn.force_exit
        server.uvicorn.force_exit = True
        assert server.uvicorn.force_exit
        await server.wait_closed()
    assert "cancelled /hold" in app.events


async def test_handle_exit_closes() -> None:
    """What uvicorn's own signal handler would call."""
    async with serving(App()) as server:
        server.uvicorn.handle_exit(15, None)
        await server.wait_closed()


async def test_what_else_is_called_on_it_does_not_break_the_exit() -> None:
    """It is run once, by us."""
    async with serving(App()) as server:
        for call in (server.uvicorn.serve, server.uvicorn.startup):
            with pytest.raises(RuntimeError, match="only once"):
                await call()
        await server.uvicorn.on_tick(0)
        assert (await get(server)).text == "hello"
        await server.uvicorn.shutdown()
        await server.wait_closed()


async def test_the_limit_of_requests_is_obeyed_at_the_very_request(caplog: pytest.LogCaptureFixture) -> None:
    """uvicorn looks ten times a second; we close as the last response is complete."""
    caplog.set_level("INFO", "uvicorn.error")
    async with serving(App(), limit_max_requests=2) as server:
        for _ in range(2):
            assert not server.stopping.is_set()
            assert (await get(server)).text == "hello"
        assert server.stopping.is_set()
        await server.wait_closed()
    assert server.stats.served == 2
    assert caplog.text.count("Maximum request limit of 2 exceeded") == 1


async def test_the_date_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for the first request after a long time without a connection, when no timer has kept it."""
    now = [time.time()]
    monkeypatch.setattr("aioserve._engine.time.time", lambda: now[0])

    def shown(response: Any) -> float:
        return email.utils.parsedate_to_datetime(response.headers["date"]).timestamp()

    async with serving(App()) as server:
        assert shown(await get(server)) == int(now[0])
        while server.stats.connections:
            await asyncio.sleep(0)
        engine: Any = server.uvicorn
        engine._date_timer.cancel()
        engine._tick()  # the next second comes, and nobody is connected
        assert engine._date_timer is None
        now[0] += 3600
        assert shown(await get(server)) == int(now[0])


async def test_the_date_is_kept_right_while_somebody_is_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    """By one timer a second, however many connections there are."""
    now = [time.time()]
    monkeypatch.setattr("aioserve._engine.time.time", lambda: now[0])

    async with serving(App()) as server, connect(server) as one, connect(server) as two:
        for connection in (one, two):
            connection.ask("/")
            await connection.answer()
        engine: Any = server.uvicorn
        timer = engine._date_timer
        now[0] += 1
        engine._tick()  # what the timer calls
        timer.cancel()
        one.ask("/")
        expected = email.utils.formatdate(now[0], usegmt=True)
        assert f"date: {expected}".encode() in await one.answer()


async def test_a_reset_connection_leaves_no_timer() -> None:
    """uvicorn's keep-alive timer outlives it, and holds the whole app for five seconds."""
    async with serving(App()) as server:
        async with connect(server) as connection:
            connection.ask("/")
            await connection.answer()
            (protocol,) = server.uvicorn.server_state.connections
            timer: Any = protocol.timeout_keep_alive_task  # type: ignore[union-attr]
            assert not timer.cancelled()
            protocol.connection_lost(ConnectionResetError())
            assert timer.cancelled()


async def test_a_connection_of_the_last_moment_is_no_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is accepted in the turn in which the stop begins, and made in the next; asyncio alone would leak it."""
    monkeypatch.setattr(_shutdown, "FIRST_REQUEST", 0.01)
    for turns in range(12):
        server = await start(App())
        connecting = asyncio.create_task(asyncio.open_connection(server.host, server.port))
        for _ in range(turns):
            await asyncio.sleep(0)
        await server.aclose()
        try:
            reader, writer = await connecting
            assert await reader.read() == b""
            writer.close()
        except ConnectionError:
            pass  # too late, and told so


async def test_a_bug_of_ours_takes_down_neither_the_program_nor_the_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever happens in the server's own task, the body hears of it, and the port is free."""

    async def broken(engine: Any) -> None:
        raise ZeroDivisionError

    app = App()
    monkeypatch.setattr(_engine, "shut_down", broken)
    with pytest.raises(ServerCrashedError, match="while it was stopping: ZeroDivisionError"):
        async with serving(app) as server, connect(server) as connection:
            connection.ask("/hold")
            await app.holding.wait()
    assert app.events[-3:] == ["cancelled /hold", "shutdown", "lifespan over"]
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(server.host, server.port)


@pytest.mark.parametrize("loop_name", ["asyncio", "uvloop"])  # on others, the server's own task does it
async def test_a_bug_of_ours_in_beginning_to_stop_is_told_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """All is ended as always."""

    def broken(engine: Any) -> None:
        raise ZeroDivisionError

    app = App()
    server = await start(app)
    async with connect(server) as connection:
        connection.ask("/hold")
        await app.holding.wait()
        monkeypatch.setattr(_engine, "begin_to_stop", broken)
        asyncio.get_running_loop().call_soon(app.release.set)
        with pytest.raises(ServerCrashedError, match="could not begin to stop: ZeroDivisionError"):
            await server.aclose()
        assert (await connection.rest()).endswith(b"hello")
    assert app.events[-2:] == ["shutdown", "lifespan over"]
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(server.host, server.port)


@pytest.mark.parametrize("http", ["h11", "httptools"])
@pytest.mark.parametrize("ws", ["websockets-sansio", "wsproto"])
async def test_each_protocol_finishes_and_lets_go(http: Any, ws: Any) -> None:
    """A request in flight, an idle connection, and a WebSocket."""
    app = App()
    async with serving(app, http=http, ws=ws, shutdown_timeout=None) as server:
        async with (
            connect_websocket(server.url.replace("http", "ws"), proxy=None) as client,
            connect(server) as busy,
            connect(server) as idle,
        ):
            idle.ask("/")
            await idle.answer()
            busy.ask("/hold")
            await app.holding.wait()
            await client.send("hello")
            assert await client.recv() == "hello"
            server.close()
            app.release.set()
            assert (await busy.rest()).endswith(b"hello")
            await client.wait_closed()
            assert client.close_code == 1012
            await server.wait_closed()
