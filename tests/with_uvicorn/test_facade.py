"""
`server.uvicorn`, for code that expects a `uvicorn.Server`; and what aioserve does in place of uvicorn's tick.
"""

from __future__ import annotations

import asyncio
import email.utils
import time
from typing import Any

import pytest
import uvicorn
from websockets.asyncio.client import connect as connect_websocket

from aioserve import ServerCrashedError, _limits, serving, start
from aioserve._shutdown import Shutdown
from tests.helpers.apps import App
from tests.helpers.clients import connect, get

pytestmark = pytest.mark.usefixtures("short_grace")


async def test_server_uvicorn_is_a_uvicorn_server() -> None:
    """And one task runs the server: that of `Engine._serve()`."""
    async with serving(App()) as server:
        assert isinstance(server.uvicorn, uvicorn.Server)
        assert server.uvicorn.started
        assert [sock for each in server.uvicorn.servers for sock in each.sockets]
        assert server.uvicorn.server_state.total_requests == 0
        assert server.uvicorn.lifespan.state is server.state
        coroutines = [task.get_coro() for task in asyncio.all_tasks()]
        assert [c for c in coroutines if getattr(c, "__qualname__", "") == "Engine._serve"]


async def test_setting_should_exit_closes_the_server() -> None:
    """Code for uvicorn sets it and does nothing else."""
    async with serving(App()) as server:
        assert not server.uvicorn.should_exit
        server.uvicorn.should_exit = False
        assert not server.stopping.is_set()
        server.uvicorn.should_exit = True
        assert server.uvicorn.should_exit
        await server.wait_closed()


async def test_should_exit_can_be_set_in_another_thread() -> None:
    """The loop is woken up."""
    async with serving(App()) as server:
        await asyncio.to_thread(setattr, server.uvicorn, "should_exit", True)
        await server.wait_closed()
    await asyncio.get_running_loop().shutdown_default_executor()


async def test_setting_force_exit_forces_the_stop() -> None:
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


async def test_handle_exit_closes_the_server() -> None:
    """uvicorn's own signal handler would call it."""
    async with serving(App()) as server:
        server.uvicorn.handle_exit(15, None)
        await server.wait_closed()


async def test_other_methods_of_the_uvicorn_server_do_not_break_the_stop() -> None:
    """It is run once, by aioserve."""
    async with serving(App()) as server:
        for call in (server.uvicorn.serve, server.uvicorn.startup):
            with pytest.raises(RuntimeError, match="only once"):
                await call()
        await server.uvicorn.on_tick(0)
        assert (await get(server)).text == "hello"
        await server.uvicorn.shutdown()
        await server.wait_closed()


async def test_limit_max_requests_stops_the_server_at_the_very_request(caplog: pytest.LogCaptureFixture) -> None:
    """uvicorn checks it ten times a second; aioserve closes when the last response is complete."""
    caplog.set_level("INFO", "uvicorn.error")
    async with serving(App(), limit_max_requests=2) as server:
        for _ in range(2):
            assert not server.stopping.is_set()
            assert (await get(server)).text == "hello"
        assert server.stopping.is_set()
        await server.wait_closed()
    assert server.stats.served == 2
    assert caplog.text.count("Maximum request limit of 2 exceeded") == 1


async def test_date_header_is_right_after_a_long_time_without_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """When no timer has kept it up to date."""
    now = [time.time()]
    monkeypatch.setattr("aioserve._uvicorn.state.time.time", lambda: now[0])

    def shown(response: Any) -> float:
        return email.utils.parsedate_to_datetime(response.headers["date"]).timestamp()

    async with serving(App()) as server:
        assert shown(await get(server)) == int(now[0])
        while server.stats.connections:
            await asyncio.sleep(0)
        state = server._engine.connections.state
        assert state.timer is not None
        state.timer.cancel()
        state.begin()  # the next second comes, and nobody is connected
        assert state.timer is None
        now[0] += 3600
        assert shown(await get(server)) == int(now[0])


async def test_date_header_is_kept_right_while_clients_are_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    """By one timer a second, however many connections there are."""
    now = [time.time()]
    monkeypatch.setattr("aioserve._uvicorn.state.time.time", lambda: now[0])

    async with serving(App()) as server, connect(server) as one, connect(server) as two:
        for connection in (one, two):
            connection.ask("/")
            await connection.answer()
        state = server._engine.connections.state
        timer = state.timer
        assert timer is not None
        now[0] += 1
        state.begin()  # what the timer calls
        timer.cancel()
        one.ask("/")
        expected = email.utils.formatdate(now[0], usegmt=True)
        assert f"date: {expected}".encode() in await one.answer()


async def test_reset_connection_leaves_no_timer() -> None:
    """uvicorn's keep-alive timer would outlive the connection, and keep the whole app in memory for five seconds."""
    async with serving(App()) as server:
        async with connect(server) as connection:
            connection.ask("/")
            await connection.answer()
            (protocol,) = server.uvicorn.server_state.connections
            timer: Any = protocol.timeout_keep_alive_task  # type: ignore[union-attr]
            assert not timer.cancelled()
            protocol.connection_lost(ConnectionResetError())
            assert timer.cancelled()


async def test_connection_that_is_accepted_as_the_stop_begins_is_no_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is accepted in the turn in which the stop begins, and made in the next one; asyncio alone would leak it."""
    monkeypatch.setattr(_limits, "FIRST_REQUEST", 0.01)
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
            pass  # it was too late, and refused


async def test_bug_in_the_stop_is_raised_and_frees_the_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever happens in the server's own task, the block raises an error, and the port is free."""

    async def broken(shutdown: Any, *, drain: bool) -> None:
        raise ZeroDivisionError

    app = App()
    monkeypatch.setattr(Shutdown, "run", broken)
    with pytest.raises(ServerCrashedError, match="while it was stopping: ZeroDivisionError"):
        async with serving(app) as server, connect(server) as connection:
            connection.ask("/hold")
            await app.holding.wait()
    assert app.events[-3:] == ["cancelled /hold", "shutdown", "lifespan over"]
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(server.host, server.port)


@pytest.mark.parametrize("loop_name", ["asyncio", "uvloop"])  # on others, the server's own task does it
async def test_bug_in_the_beginning_of_the_stop_is_raised_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is ended as always."""

    refuse_new = Shutdown._refuse_new

    def broken(shutdown: Any) -> None:
        monkeypatch.setattr(Shutdown, "_refuse_new", refuse_new)
        raise ZeroDivisionError

    app = App()
    server = await start(app)
    async with connect(server) as connection:
        connection.ask("/hold")
        await app.holding.wait()
        monkeypatch.setattr(Shutdown, "_refuse_new", broken)
        asyncio.get_running_loop().call_soon(app.release.set)
        with pytest.raises(ServerCrashedError, match="failed to stop accepting: ZeroDivisionError"):
            await server.aclose()
        assert (await connection.rest()).endswith(b"hello")
    assert app.events[-2:] == ["shutdown", "lifespan over"]
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(server.host, server.port)


@pytest.mark.parametrize("http", ["h11", "httptools"])
@pytest.mark.parametrize("ws", ["websockets-sansio", "wsproto"])
async def test_each_protocol_finishes_its_requests_and_closes(http: Any, ws: Any) -> None:
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
