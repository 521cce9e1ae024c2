"""
Close: a connection whose client is still sending is closed without a reset, which would take back its answer.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import threading
from contextlib import closing
from functools import partial
from http.client import HTTPConnection, HTTPSConnection
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import connect as connect_websocket
from websockets.exceptions import ConnectionClosed

from aioserve import Server, serving
from tests.helpers import not_portable
from tests.helpers.threads import in_thread
from tests.helpers.turns import turns

pytestmark = pytest.mark.usefixtures("short_grace")

# More than the kernel keeps of it on a connection that nobody reads.
UPLOAD = 8_000_000
ANSWER = 4_000_000

# As much as the kernel takes at once, and more than a client that does not read gets.
IN_KERNEL = 1_000_000

PROTOCOLS = ["h11", "httptools"]


class Early:
    """Answers an upload without reading it, when it is told to."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.began = asyncio.Event()
        self.go = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return
        self.began.set()
        await self.go.wait()
        head = [(b"content-length", b"%d" % self.size)]
        await send({"type": "http.response.start", "status": 401, "headers": head})
        await send({"type": "http.response.body", "body": b"x" * self.size})


def upload(connection: HTTPConnection) -> tuple[int, int]:
    """Send it all, and then read the answer: its status and its length."""
    with closing(connection):
        connection.request("POST", "/", body=bytes(UPLOAD))
        response = connection.getresponse()
        return response.status, len(response.read())


async def begin_upload(server: Server, app: Early) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Send the head of a request; its body is still to come."""
    reader, writer = await asyncio.open_connection(server.host, server.port)
    writer.write(b"POST / HTTP/1.1\r\nhost: test\r\ncontent-length: 1000\r\n\r\n")
    await app.began.wait()
    return reader, writer


async def stop_with_early_answer(server: Server, app: Early, connection: HTTPConnection) -> tuple[int, int]:
    uploading = in_thread(lambda: upload(connection))
    await app.began.wait()
    server.close()
    await asyncio.sleep(0)
    app.go.set()
    await server.wait_closed()
    assert server.report is not None
    assert not server.report.was_forced
    result: tuple[int, int] = await uploading
    return result


@pytest.mark.parametrize("size", [2, ANSWER], ids=["small", "big"])
@pytest.mark.parametrize("http", PROTOCOLS)
@not_portable.resets
async def test_early_answer_to_an_upload_arrives_in_a_stop(http: str, size: int) -> None:
    """Its client sends all before it reads."""
    app = Early(size)
    async with serving(app, http=http, shutdown_timeout=None) as server:
        client = HTTPConnection("127.0.0.1", server.port, timeout=30)
        assert await stop_with_early_answer(server, app, client) == (401, size)


@pytest.mark.parametrize("http", PROTOCOLS)
@not_portable.resets
async def test_early_answer_that_is_on_its_way_when_the_stop_begins_arrives(http: str) -> None:
    """Nothing is unread at that moment, but the rest of the body is still to come."""
    app = Early(IN_KERNEL)
    app.go.set()
    async with serving(app, http=http, shutdown_timeout=None) as server:
        port, may_send = server.port, threading.Event()

        def talk() -> int:
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.sendall(b"POST / HTTP/1.1\r\nhost: test\r\ncontent-length: 100000\r\n\r\n")
                may_send.wait()
                client.sendall(bytes(100_000))
                client.settimeout(10)
                return len(b"".join(iter(partial(client.recv, 65536), b"")))

        talking = in_thread(talk)
        while not server.stats.served:
            await asyncio.sleep(0)
        (connection,) = server._engine.connections.state.connections
        assert connection.transport.get_write_buffer_size() == 0
        closing_server = asyncio.create_task(server.aclose())
        await turns()
        may_send.set()
        await closing_server
        assert await talking > IN_KERNEL


@pytest.mark.usefixtures("short_linger")
async def test_default_timeout_of_sockets_does_not_block_the_loop() -> None:
    app = Early(2)
    async with serving(app, shutdown_timeout=None) as server:
        reader, writer = await begin_upload(server, app)
        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(100)
        try:
            server.close()
            app.go.set()
            assert (await reader.read()).startswith(b"HTTP/1.1 401 ")
            writer.write(b"x")
            await server.wait_closed()
        finally:
            socket.setdefaulttimeout(before)
    writer.transport.abort()


@pytest.mark.parametrize("size", [2, ANSWER], ids=["small", "big"])
@not_portable.resets
async def test_early_answer_to_an_upload_over_tls_arrives_in_a_stop(
    size: int, tls: tuple[dict[str, Any], ssl.SSLContext]
) -> None:
    options, context = tls
    app = Early(size)
    async with serving(app, shutdown_timeout=None, **options) as server:
        client = HTTPSConnection("127.0.0.1", server.port, timeout=30, context=context)
        assert await stop_with_early_answer(server, app, client) == (401, size)


class UnixConnection(HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=30)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(30)
        self.sock.connect(self.path)


@not_portable.unix_sockets
async def test_early_answer_to_an_upload_on_a_unix_socket_arrives_in_a_stop(tmp_path: Path) -> None:
    app = Early(ANSWER)
    path = str(tmp_path / "app.sock")
    async with serving(app, uds=path, shutdown_timeout=None) as server:
        assert await stop_with_early_answer(server, app, UnixConnection(path)) == (401, ANSWER)


@pytest.mark.usefixtures("short_linger")
@pytest.mark.parametrize("http", PROTOCOLS)
async def test_client_that_sends_without_end_does_not_hold_the_stop(http: str) -> None:
    """It is cut off after a time, which counts as no use of force."""
    app = Early(2)
    async with serving(app, http=http, shutdown_timeout=None) as server:
        assert server.port is not None
        ended = threading.Event()

        def send() -> bool:
            with socket.create_connection(("127.0.0.1", server.port)) as client:
                client.sendall(b"POST / HTTP/1.1\r\nhost: test\r\ncontent-length: 9999999999\r\n\r\n")
                try:
                    while not ended.is_set():
                        client.sendall(bytes(1000))
                except ConnectionError:
                    return True
                return False

        sending = in_thread(send)
        await app.began.wait()
        server.close()
        app.go.set()
        await server.wait_closed()
        assert await sending
    assert server.report is not None
    assert not server.report.was_forced


@pytest.mark.usefixtures("short_linger")
async def test_client_that_is_silent_after_its_early_answer_does_not_hold_the_stop() -> None:
    """It has not sent all, and does not close."""
    app = Early(2)
    async with serving(app, shutdown_timeout=None) as server:
        reader, writer = await begin_upload(server, app)
        server.close()
        app.go.set()
        assert (await reader.read()).startswith(b"HTTP/1.1 401 ")
        await server.wait_closed()
    writer.transport.abort()
    assert server.report is not None
    assert not server.report.was_forced


@not_portable.resets
async def test_force_ends_what_lingers() -> None:
    app = Early(2)
    async with serving(app, shutdown_timeout=None) as server:
        reader, writer = await begin_upload(server, app)
        server.close()
        app.go.set()
        assert (await reader.read()).startswith(b"HTTP/1.1 401 ")
        descriptors = len(os.listdir("/dev/fd"))
        server.close(timeout=0)
        await server.wait_closed()
        assert len(os.listdir("/dev/fd")) < descriptors
    writer.transport.abort()


@pytest.mark.parametrize("ws", ["websockets", "websockets-sansio", "wsproto"])
@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "TLS"])
@not_portable.resets
async def test_tail_of_a_websocket_and_its_close_arrive_at_a_client_that_sends(
    ws: str, encrypted: bool, tls: tuple[dict[str, Any], ssl.SSLContext]
) -> None:
    options, context = tls if encrypted else ({}, None)
    sent = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return
        await receive()
        await send({"type": "websocket.accept"})
        for _ in range(8):
            await send({"type": "websocket.send", "bytes": bytes(UPLOAD // 8)})
        sent.set()
        while (await receive())["type"] != "websocket.disconnect":
            pass

    async with serving(app, ws=ws, shutdown_timeout=None, **options) as server:

        async def talk() -> tuple[int, int | None]:
            received = 0
            url = server.url.replace("http", "ws", 1)
            async with connect_websocket(url, max_size=None, ssl=context, proxy=None, ping_interval=None) as client:

                async def send() -> None:
                    try:
                        while True:
                            await client.send(bytes(10_000))
                            await asyncio.sleep(0)  # it does not wait as long as the kernel takes what it sends
                    except ConnectionClosed:
                        pass

                sender = asyncio.create_task(send())
                try:
                    while True:
                        received += len(await client.recv())
                except ConnectionClosed as exc:
                    return received, None if exc.rcvd is None else exc.rcvd.code
                finally:
                    await sender

        # In a thread, so that it sends whatever the server does. The client without a loop would read and write in two
        # threads, with which an ssl.SSLSocket crashes or hangs (python/cpython#151508).
        talking = in_thread(lambda: asyncio.run(talk()))
        await sent.wait()
        await server.aclose()
        assert await talking == (UPLOAD, 1012)
    assert server.report is not None
    assert not server.report.was_forced
