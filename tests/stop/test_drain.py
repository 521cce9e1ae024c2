"""
The drain: for `drain_delay` seconds the server still accepts connections.
"""

from __future__ import annotations

import asyncio

import pytest

from aioserve import ServerCrashedError, serving
from tests.helpers.apps import App
from tests.helpers.clients import connect
from tests.helpers.turns import MOMENT, turns

pytestmark = pytest.mark.usefixtures("short_grace")


async def test_server_accepts_connections_during_the_drain() -> None:
    """Idle connections stay open until their next response says "connection: close"."""
    async with serving(App(), drain_delay=60) as server, connect(server) as idle:
        idle.ask("/")
        await idle.answer()
        server.close()
        await turns()
        assert server.is_serving()
        async with connect(server) as new:
            new.ask("/")
            assert b"connection: close" in await new.rest()
        idle.ask("/")
        assert b"connection: close" in await idle.rest()
        server.close(timeout=0)
        await server.wait_closed()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(server.host, server.port)


async def test_drain_ends_after_drain_delay() -> None:
    """Then the requests in flight have their budget."""
    app = App()
    async with serving(app, drain_delay=MOMENT, shutdown_timeout=None) as server, connect(server) as client:
        client.ask("/hold")
        await app.holding.wait()
        server.close()
        while server.is_serving():
            await asyncio.sleep(0)
        app.release.set()
        assert (await client.rest()).endswith(b"hello")


async def test_deadline_of_close_ends_the_drain() -> None:
    """It counts from the call."""
    app = App()
    async with asyncio.timeout(5), serving(app, drain_delay=60) as server, connect(server) as client:
        client.ask("/hold")
        await app.holding.wait()
        server.close(timeout=MOMENT)
        await server.wait_closed()
    assert "cancelled /hold" in app.events


async def test_crash_skips_the_drain() -> None:
    """No client should be sent to the server any more."""
    app = App()
    with pytest.raises(ServerCrashedError):
        async with asyncio.timeout(5), serving(app, drain_delay=60):
            app.crash.set()
            await asyncio.Event().wait()


async def test_crash_ends_the_drain() -> None:
    """It is a crash: the app was not told to shut down before the end of the drain."""
    app = App()
    with pytest.raises(ServerCrashedError) as caught:
        async with asyncio.timeout(5), serving(app, drain_delay=60) as server:
            server.close()
            await turns()
            assert server.is_serving()
            app.crash.set()
            await server.wait_closed()
    assert caught.value.__cause__ is app.error
