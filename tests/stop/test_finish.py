"""
Finishing: requests in flight run to their end, and WebSockets are closed with 1012.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import websockets
from uvicorn.config import WS_PROTOCOLS
from websockets.asyncio.client import connect as connect_websocket

from aioserve import serving, start
from tests.helpers.apps import App
from tests.helpers.clients import (
    UPGRADE,
    connect,
    connect_tls,
)
from tests.helpers.forking import open_at
from tests.helpers.turns import MOMENT, turns

pytestmark = pytest.mark.usefixtures("short_grace")


async def test_request_in_flight_is_answered_during_a_stop() -> None:
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


async def test_stop_without_a_limit_waits_for_its_handlers() -> None:
    """However many turns of the loop they take."""
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


async def test_stop_closes_websockets_with_1012() -> None:
    """1012 means "service restart"; the handler gets the disconnect and ends."""
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


@pytest.mark.parametrize("kept_alive", [False, True], ids=["new", "kept alive"])
@pytest.mark.parametrize("ws", sorted(WS_PROTOCOLS.keys() - {"auto", "none"}))
async def test_websocket_whose_upgrade_has_arrived_is_accepted_during_a_stop(ws: str, kept_alive: bool) -> None:
    """And then closed with 1012."""
    server = await start(App(), ws=ws)
    async with connect(server) as client:
        if kept_alive:
            client.ask("/")
            await client.answer()
        else:
            await turns()
        client.writer.write(UPGRADE)
        await server.aclose()
        assert (await client.rest()).startswith(b"HTTP/1.1 101")


async def test_websocket_that_opens_during_the_stop_is_closed() -> None:
    """It opens when the others have already been closed."""
    server = await start(App(), shutdown_timeout=None)
    async with connect(server) as client:
        closing = asyncio.create_task(server.aclose())
        await turns()
        client.writer.write(UPGRADE)
        await client.rest()
        await closing


@pytest.mark.parametrize("ws", sorted(WS_PROTOCOLS.keys() - {"none", "auto"}))
async def test_websocket_handler_that_watches_stopping_can_send_a_last_message(ws: str) -> None:
    """It notices the stop before its client does."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "websocket"
        await receive()
        await send({"type": "websocket.accept"})
        await scope["state"]["aioserve"].stopping.wait()
        await send({"type": "websocket.send", "text": "last message"})
        await send({"type": "websocket.close", "code": 4000})

    server = await start(app, ws=ws)
    async with connect_websocket(server.url.replace("http", "ws"), proxy=None) as client:
        await turns()
        await asyncio.gather(server.aclose(), client.wait_closed())
        assert await client.recv() == "last message"
        assert client.close_code == 4000


async def test_websocket_handler_that_sleeps_is_cancelled_when_the_budget_is_over() -> None:
    """Its client gets 1012 at once."""
    app_is_in, release = asyncio.Event(), asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "websocket"
        await receive()
        await send({"type": "websocket.accept"})
        app_is_in.set()
        await release.wait()

    server = await start(app, shutdown_timeout=MOMENT)
    async with connect_websocket(server.url.replace("http", "ws"), proxy=None) as client:
        await app_is_in.wait()
        closing = asyncio.create_task(server.aclose())
        with pytest.raises(websockets.ConnectionClosed):
            await client.recv()
        assert client.close_code == 1012
        await closing
    assert server.report is not None
    (handler,) = server.report.cancelled
    assert (handler.method, handler.path, handler.stuck) == ("WEBSOCKET", "/", False)


async def test_websocket_over_tls_is_closed_by_the_stop(tls: Any) -> None:
    """uvicorn closes its transport twice, after which asyncio's TLS transport cannot be aborted."""
    options, context = tls
    server = await start(App(), shutdown_timeout=None, **options)
    # A client that reads nothing does not answer.
    async with connect_tls(server, context) as client:
        client.writer.write(UPGRADE)
        await client.reader.readuntil(b"\r\n\r\n")
        transport: Any = client.writer.transport
        transport.pause_reading()
        await server.aclose()


async def test_websocket_over_tls_that_cannot_get_its_close_frame_is_dropped(tls: Any) -> None:
    """Earlier data still waits to be sent, so not even the close frame gets through."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        await asyncio.sleep(0)  # an eager task comes here before uvicorn can pause it
        while True:
            await send({"type": "websocket.send", "bytes": bytes(1_000_000)})

    options, context = tls
    server = await start(app, lifespan="off", shutdown_timeout=MOMENT, **options)
    async with connect_tls(server, context) as client:
        client.writer.write(UPGRADE)
        await client.reader.readuntil(b"\r\n\r\n")
        transport: Any = client.writer.transport
        transport.pause_reading()
        await turns()
        await server.aclose()
        assert open_at((server.host, server.port)) == 0
    assert server.report is not None
    assert server.report.aborted == 1
