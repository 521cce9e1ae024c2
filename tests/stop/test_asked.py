"""
The stop has been asked for: every response from then on says "connection: close".
"""

from __future__ import annotations

from typing import Any

import pytest
from websockets.asyncio.client import connect as connect_websocket

from aioserve import serving
from tests.helpers.apps import App
from tests.helpers.clients import connect
from tests.helpers.turns import MOMENT

pytestmark = pytest.mark.usefixtures("short_grace")


async def test_response_has_connection_close_after_the_stop_is_asked_for() -> None:
    """Also the response to a request that had begun before; but not the response to an upgrade."""
    app = App()
    async with serving(app, drain_delay=60) as server:
        async with connect(server) as busy, connect(server) as idle:
            busy.ask("/hold")
            idle.ask("/")
            assert b"connection: close" not in await idle.answer()
            await app.holding.wait()
            server.close()
            app.release.set()
            assert b"connection: close" in await busy.rest()
            idle.ask("/")
            assert b"connection: close" in await idle.rest()
            async with connect_websocket(server.url.replace("http", "ws"), proxy=None) as websocket:
                assert websocket.response is not None
                assert "close" not in websocket.response.headers["connection"].lower()
        server.close(timeout=MOMENT)


async def test_connection_header_of_the_app_is_replaced_during_a_stop() -> None:
    """The response has one such header, and it says "close"."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        headers = [(b"connection", b"keep-alive"), (b"content-length", b"5")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"hello"})

    async with serving(app, drain_delay=60) as server, connect(server) as client:
        client.ask("/")
        assert b"keep-alive" in await client.answer()
        server.close()
        client.ask("/")
        rest = await client.rest()
        assert b"connection: close" in rest
        assert b"keep-alive" not in rest
        server.close(timeout=0)
