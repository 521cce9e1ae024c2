"""
The loop ends before a server with streams in flight: one line of log, and no exception of the handlers'.
"""

from __future__ import annotations

import asyncio
import gc
import socket
import sys
from collections.abc import Callable
from typing import Any

import pytest
import uvloop

from aioserve import start
from tests.helpers.http2 import Frames, StreamApp, needs_http2

pytestmark = [needs_http2, pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")]


class Simple(StreamApp):
    """An app without any task of its own, whose end asyncio would report."""

    async def lifespan(self, scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_loop_that_is_closed_with_streams_in_flight(
    new_loop: Callable[[], asyncio.AbstractEventLoop],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unraisable: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)

    async def leave_running(client: socket.socket) -> None:
        app = Simple()
        server = await start(app, http2=True)
        gc.collect()  # what is in an older generation is ended first; otherwise a handler may be, by chance
        client.connect((server.host, server.port))
        frames = Frames()
        frames.h2.initiate_connection()
        for _ in range(5):
            frames.request("/hold")
        client.sendall(frames.h2.data_to_send())
        await app.come(5)

    loop = new_loop()
    with socket.socket() as client:
        loop.run_until_complete(leave_running(client))
        loop.close()
        gc.collect()
    assert [str(each.exc_value) for each in unraisable if "unclosed" not in str(each.exc_value)] == []
    assert "its event loop has ended before the server" in caplog.text
