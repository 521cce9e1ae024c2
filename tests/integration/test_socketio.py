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
from tests.helpers.turns import turns

TRANSPORTS = [["websocket"], ["polling"], ["polling", "websocket"]]
NAMES = ["websocket", "polling", "upgraded"]

# How long polls may take before they are cancelled, in seconds; nothing depends on how long it is.
MOMENT = 0.05

# Without these, the loggers of python-socketio get handlers and levels, which stay.
QUIET = {"logger": logging.getLogger(__name__), "engineio_logger": logging.getLogger(__name__)}


@pytest.fixture(autouse=True)
async def engineios_tasks_end(nothing_is_left_in_the_loop: None) -> AsyncIterator[None]:
    """End the task that the server has for each client, which sleeps until the next ping and is never ended."""
    yield
    sleeping = {task for task in asyncio.all_tasks() if "AsyncSocket._send_ping" in repr(task.get_coro())}
    for task in sleeping:
        task.cancel()
    if sleeping:
        await asyncio.wait(sleeping)


class Chat:
    """An app that echoes everything, and records who has connected and disconnected."""

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
    """A client that sets an event each time that it is connected or disconnected."""

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
    assert not server.report.was_forced


@pytest.mark.usefixtures("short_grace")
@pytest.mark.parametrize("transports", TRANSPORTS, ids=NAMES)
async def test_socketio_client_and_server_exchange_messages(transports: list[str], loop_name: str) -> None:
    """In both directions."""
    chat = Chat()
    async with serving(chat.app, shutdown_timeout=MOMENT) as server, connected(server, transports) as client:
        assert client.sio.transport() == transports[-1]
        assert await client.sio.call("say", "hello") == "hello"
        news: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        client.sio.on("news", news.set_result)
        await chat.sio.emit("news", "there is none")
        assert await news == "there is none"
        # A client that polls waits for its last poll before it disconnects, and that for messages that do not come.
        await server.aclose()
        await client.disconnected.wait()


async def test_socketio_server_notices_a_client_that_disconnects(loop_name: str) -> None:
    chat = Chat()
    async with serving(chat.app, shutdown_timeout=None) as server:
        async with connected(server, ["websocket"]):
            pass
    # It sends a message, and closes the connection; either can become the reason.
    assert chat.events in (["connected", f"disconnected: {why}"] for why in ("client disconnect", "transport close"))
    assert_nothing_was_forced(server)


@pytest.mark.parametrize("transports", TRANSPORTS[::2], ids=NAMES[::2])
async def test_stop_closes_a_socketio_websocket_at_once(transports: list[str], loop_name: str) -> None:
    """Client and server both notice, without the clock."""
    chat = Chat()
    async with serving(chat.app, shutdown_timeout=None) as server, connected(server, transports) as client:
        await server.aclose()
        await client.disconnected.wait()
    assert chat.events == ["connected", "disconnected: transport close"]
    assert_nothing_was_forced(server)


@pytest.mark.usefixtures("short_grace")
async def test_stop_waits_for_a_socketio_poll_until_the_budget_is_over(loop_name: str) -> None:
    """The poll waits for messages and not in `receive()`; its client notices its end."""
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
    assert (handler.method, handler.path) == ("GET", "/socket.io/")
    assert not handler.stuck
    assert (server.report.aborted, server.report.disconnected) == (0, ())
    assert chat.events == ["connected", "disconnected: transport error"]


@pytest.mark.usefixtures("short_grace")
@pytest.mark.parametrize("transports", TRANSPORTS, ids=NAMES)
async def test_socketio_client_reconnects_after_a_restart_on_the_same_port(
    transports: list[str], loop_name: str
) -> None:
    """By itself, and messages can be exchanged again."""
    first, second = Chat(), Chat()
    async with serving(first.app, shutdown_timeout=MOMENT) as server:
        async with connected(server, transports, reconnection=True) as client:
            await server.aclose()
            await client.disconnected.wait()
            async with serving(second.app, port=server.port or 0, shutdown_timeout=MOMENT):
                await client.connected.wait()
                assert await client.sio.call("say", "hello again") == "hello again"
                assert second.events == ["connected"]
                # It disconnects, so that it does not reconnect when this server stops, which ends its last poll.
                leaving = asyncio.create_task(client.sio.shutdown())
                await turns()
            await leaving
