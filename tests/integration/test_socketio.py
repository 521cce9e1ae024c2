"""
python-socketio: an AsyncServer with its own AsyncClient, over WebSocket and by polling.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import socketio

from aioserve import Server, serving
from tests.turns import turns

TRANSPORTS = [["websocket"], ["polling"], ["polling", "websocket"]]
NAMES = ["websocket", "polling", "upgraded"]

# What polls get before they are cancelled, in seconds; nothing depends on how long it is.
MOMENT = 0.05

# Without loggers of ours, theirs get handlers and levels that stay.
QUIET = {"logger": logging.getLogger(__name__), "engineio_logger": logging.getLogger(__name__)}


@pytest.fixture(autouse=True)
async def engineios_tasks_end(nothing_is_left_in_the_loop: None) -> AsyncIterator[None]:
    """Each client has had one in the server, which sleeps until the next ping is due, and nobody ends it."""
    yield
    sleeping = {task for task in asyncio.all_tasks() if "AsyncSocket._send_ping" in repr(task.get_coro())}
    for task in sleeping:
        task.cancel()
    if sleeping:
        await asyncio.wait(sleeping)


class Chat:
    """An app that says everything back, and remembers who has come and gone."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.sio = socketio.AsyncServer(async_mode="asgi", **QUIET)
        self.sio.on("connect", self.connect)
        self.sio.on("disconnect", self.disconnect)
        self.sio.on("say", self.say)
        self.app = socketio.ASGIApp(self.sio, on_shutdown=self.sio.shutdown)

    async def connect(self, sid: str, environ: Any) -> None:
        self.events.append("connected")

    async def disconnect(self, sid: str, reason: str) -> None:
        self.events.append(f"disconnected: {reason}")

    async def say(self, sid: str, text: str) -> str:
        return text


class Client:
    """Notes each time that it is connected and disconnected."""

    def __init__(self, *, reconnection: bool) -> None:
        self.connected = asyncio.Event()
        self.disconnected = asyncio.Event()
        self.sio = socketio.AsyncClient(
            handle_sigint=False,  # not for the whole loop
            reconnection=reconnection,
            reconnection_delay=0.01,  # a second, by default
            randomization_factor=0,
            **QUIET,
        )
        self.sio.on("connect", self.connected.set)
        self.sio.on("disconnect", self.has_gone)

    async def has_gone(self, reason: str) -> None:
        self.connected.clear()
        self.disconnected.set()


@asynccontextmanager
async def connected(server: Server, transports: list[str], *, reconnection: bool = False) -> AsyncIterator[Client]:
    client = Client(reconnection=reconnection)
    await client.sio.connect(server.url, transports=transports, wait_timeout=10)
    try:
        await client.connected.wait()
        yield client
    finally:
        await client.sio.shutdown()
        await client.sio.eio.wait()


def assert_nothing_was_forced(server: Server) -> None:
    assert server.report is not None
    assert server.report[1:] == (0, (), (), False)


@pytest.mark.usefixtures("short_grace")
@pytest.mark.parametrize("transports", TRANSPORTS, ids=NAMES)
async def test_they_talk(transports: list[str], loop_name: str) -> None:
    """Both ways."""
    chat = Chat()
    async with serving(chat.app, shutdown_timeout=MOMENT) as server, connected(server, transports) as client:
        assert client.sio.transport() == transports[-1]
        assert await client.sio.call("say", "hello") == "hello"
        heard: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        client.sio.on("news", heard.set_result)
        await chat.sio.emit("news", "there is none")
        assert await heard == "there is none"
        # A client that polls waits for its last poll before it goes, and that for news that do not come.
        await server.aclose()
        await client.disconnected.wait()


async def test_a_client_that_goes_is_seen_off(loop_name: str) -> None:
    chat = Chat()
    async with serving(chat.app, shutdown_timeout=None) as server:
        async with connected(server, ["websocket"]):
            pass
    # It says so, and closes the connection; which of the two comes to be the reason is up to them.
    assert chat.events in (["connected", f"disconnected: {why}"] for why in ("client disconnect", "transport close"))
    assert_nothing_was_forced(server)


@pytest.mark.parametrize("transports", TRANSPORTS[::2], ids=NAMES[::2])
async def test_at_a_stop_its_websocket_is_closed_at_once(transports: list[str], loop_name: str) -> None:
    """Client and server both hear of it, without the clock."""
    chat = Chat()
    async with serving(chat.app, shutdown_timeout=None) as server, connected(server, transports) as client:
        await server.aclose()
        await client.disconnected.wait()
    assert chat.events == ["connected", "disconnected: transport close"]
    assert_nothing_was_forced(server)


@pytest.mark.usefixtures("short_grace")
async def test_at_a_stop_a_poll_is_held_until_the_time_is_over(loop_name: str) -> None:
    """It waits for news, and does not listen for a disconnect; the client hears of its end."""
    chat = Chat()
    async with serving(chat.app, shutdown_timeout=MOMENT, disconnect_after=0) as server:
        async with connected(server, ["polling"]) as client:
            await client.sio.call("say", "hello")
            while not server.stats.in_flight:
                await asyncio.sleep(0)
            await server.aclose()
            await client.disconnected.wait()
    assert server.report is not None
    (handler,) = server.report.cancelled
    assert handler[:2] == ("GET", "/socket.io/")
    assert not handler.stuck
    assert (server.report.aborted, server.report.persuaded) == (0, ())
    assert chat.events == ["connected", "disconnected: transport error"]


@pytest.mark.usefixtures("short_grace")
@pytest.mark.parametrize("transports", TRANSPORTS, ids=NAMES)
async def test_after_a_restart_on_the_same_port_the_client_is_back(transports: list[str], loop_name: str) -> None:
    """By itself, and it can talk again."""
    first, second = Chat(), Chat()
    async with serving(first.app, shutdown_timeout=MOMENT) as server:
        async with connected(server, transports, reconnection=True) as client:
            await server.aclose()
            await client.disconnected.wait()
            async with serving(second.app, port=server.port or 0, shutdown_timeout=MOMENT):
                await client.connected.wait()
                assert await client.sio.call("say", "hello again") == "hello again"
                assert second.events == ["connected"]
                # It goes, so as not to come again when this one stops, which ends its last poll.
                leaving = asyncio.create_task(client.sio.shutdown())
                await turns()
            await leaving
