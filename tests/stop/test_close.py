"""
Closing connections over TLS: what was sent reaches the client first.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from aioserve import start
from tests.helpers.apps import App
from tests.helpers.clients import REQUEST, connect_tls
from tests.helpers.turns import MANY_TURNS, MOMENT, after, turns

pytestmark = pytest.mark.usefixtures("short_grace")


async def test_client_that_reads_slowly_gets_its_whole_response_over_tls(tls: Any) -> None:
    """A closing connection is dropped when everything has been sent, and not before."""
    size = 20_000_000

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": bytes(size)})

    def ask() -> ssl.SSLSocket:
        client: ssl.SSLSocket = context.wrap_socket(
            socket.create_connection((server.host, server.port)), server_hostname="127.0.0.1"
        )
        client.sendall(REQUEST % b"/")
        assert client.recv(1)
        return client

    def read(client: socket.socket) -> int:
        received = 0
        while chunk := client.recv(65536):
            received += len(chunk)
        return received

    options, context = tls
    server = await start(app, **options)
    # In threads: an asyncio client may itself drop what it has not yet read when its connection closes.
    with ThreadPoolExecutor(1) as executor:
        loop = asyncio.get_running_loop()
        with await loop.run_in_executor(executor, ask) as client:
            closing = asyncio.create_task(server.aclose())
            await turns()
            assert not closing.done()
            assert await loop.run_in_executor(executor, read, client) > size
            await closing


@pytest.mark.parametrize("turn", range(8))
async def test_tls_client_that_disconnects_during_the_stop_does_no_harm(tls: Any, turn: int) -> None:
    """Its socket may be closed already when the stop wants to close its connection."""
    options, context = tls
    app = App()
    server = await start(app, **options)
    async with connect_tls(server, context) as idle, connect_tls(server, context) as busy:
        idle.ask("/")
        await idle.answer()
        busy.ask("/hold")
        await app.holding.wait()
        after(turn, idle.writer.transport.abort)
        after(MANY_TURNS, app.release.set)
        await server.aclose()
        assert (await busy.rest()).endswith(b"hello")
    assert app.events[-2:] == ["shutdown", "lifespan over"]


async def test_closing_tls_connection_without_a_free_descriptor_waits_for_the_budget(
    tls: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A closing connection whose client does not read cannot be watched without one; nothing breaks."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": bytes(20_000_000)})

    def exhausted(descriptor: int) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    options, context = tls
    server = await start(app, shutdown_timeout=MOMENT, **options)
    async with connect_tls(server, context) as client:
        client.ask("/")
        await client.reader.readuntil(b"\r\n\r\n")
        transport: Any = client.writer.transport
        transport.pause_reading()
        monkeypatch.setattr("aioserve._net.transports.socket.dup", exhausted)
        await server.aclose()
        monkeypatch.undo()
    assert server.report is not None
    assert server.report.aborted == 1
