"""
Settling: a request that has arrived is read and answered, and an idle connection is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Any

import pytest

from aioserve import _limits, serving, start
from aioserve._connections import Connections
from tests.helpers.apps import App
from tests.helpers.clients import BURST, PIPELINING, REQUEST, UPGRADE, connect, connect_tls, get
from tests.helpers.turns import MOMENT, turns

pytestmark = pytest.mark.usefixtures("short_grace")


async def test_unread_requests_on_kept_alive_connections_are_answered() -> None:
    """They have been sent, and the server has not read them."""
    async with contextlib.AsyncExitStack() as stack:
        server = await start(App())
        clients = [await stack.enter_async_context(connect(server)) for _ in range(BURST)]
        for client in clients:
            client.ask("/")
            await client.answer()
        for client in clients:
            client.ask("/")
        await server.aclose()
        for client in clients:
            rest = await client.rest()
            assert rest.startswith(b"HTTP/1.1 200")
            assert b"connection: close" in rest


async def test_unread_requests_on_kept_alive_tls_connections_are_answered(tls: Any) -> None:
    """An idle connection whose client does not answer close_notify does not delay the stop."""
    options, context = tls
    async with contextlib.AsyncExitStack() as stack:
        server = await start(App(), shutdown_timeout=None, **options)
        clients = [await stack.enter_async_context(connect_tls(server, context)) for _ in range(10)]
        for client in clients:
            client.ask("/")
            await client.answer()
        for client in clients[1:]:
            client.ask("/")
        await server.aclose()
        for client in clients[1:]:
            assert (await client.rest()).endswith(b"hello")
        assert await clients[0].rest() == b""


async def test_unread_request_behind_a_late_body_is_answered() -> None:
    """The request of that body had been answered before, so nobody has read the body."""
    server = await start(App())
    async with connect(server) as client:
        client.writer.write(b"POST / HTTP/1.1\r\nhost: test\r\ncontent-length: 4\r\n\r\n")
        await client.answer()
        client.writer.write(b"body")
        await turns()
        client.ask("/")
        await server.aclose()
        assert (await client.rest()).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("http", ["h11", "httptools"])
@pytest.mark.parametrize("wait", range(4))
async def test_unread_request_behind_an_unread_body_is_answered_over_tls(http: str, wait: int, tls: Any) -> None:
    """The body has paused reading, and what follows it is in the buffer of TLS when the block ends."""
    options, trusting = tls
    begun, go_on, answering = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        begun.set()
        await go_on.wait()
        answering.set()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
        await send({"type": "http.response.body", "body": b"hello"})

    async with serving(app, http=http, **options) as server:
        reader, writer = await asyncio.open_connection(server.host, server.port, ssl=trusting)
        writer.write(b"POST / HTTP/1.1\r\nhost: test\r\ncontent-length: 100000\r\n\r\n" + bytes(100_000))
        await begun.wait()
        await turns()
        writer.write(REQUEST % b"/")
        await turns()
        go_on.set()
        await answering.wait()
        await turns(wait)
    assert (await reader.read()).count(b"hello") == 2
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


@pytest.mark.parametrize("http", PIPELINING)
@pytest.mark.parametrize("begun", [False, True], ids=["waiting", "begun"])
async def test_only_the_last_of_pipelined_requests_is_answered_with_connection_close(
    http: str, begun: bool, loop_name: str
) -> None:
    """After a response with it, the client could not count the others as answered (RFC 9112, 9.6)."""
    if loop_name == "eager":
        pytest.skip("an eager handler answers before what is behind its request is parsed, and known to be there")
    app = App()
    async with contextlib.AsyncExitStack() as stack:
        server = await start(app, http=http)
        client = await stack.enter_async_context(connect(server))
        client.writer.write(REQUEST % b"/hold" + REQUEST % b"/" * 4)
        if begun:
            await app.holding.wait()
        app.release.set()
        await server.aclose()
        rest = await client.rest()
        assert rest.count(b"hello") == 5
        assert rest.count(b"connection: close") == 1
        assert b"connection: close" in rest[rest.rindex(b"HTTP/1.1") :]


@pytest.mark.parametrize("http", PIPELINING)
async def test_unread_pipelined_request_is_answered(http: str, loop_name: str) -> None:
    """uvicorn stops reading when one waits; the next ones are left in the kernel."""
    if loop_name == "eager":
        pytest.skip("an eager handler answers before what is behind its request is parsed, and known to be there")
    app = App()
    server = await start(app, http=http)
    async with connect(server) as client:
        client.ask("/hold")
        await app.holding.wait()
        client.ask("/")
        await turns()
        client.ask("/")
        closing = asyncio.create_task(server.aclose())
        await turns()
        app.release.set()
        assert (await client.rest()).count(b"hello") == 3
        await closing


async def test_pipelined_request_behind_a_busy_one_does_not_block_the_stop() -> None:
    """There is no budget that could end the wait, so it must end by itself."""
    app = App()

    async with serving(app, shutdown_timeout=None) as server, connect(server) as connection:
        connection.ask("/hold")
        connection.ask("/")
        await app.holding.wait()
        server.close()
        app.release.set()
        assert (await connection.rest()).endswith(b"hello")


@pytest.mark.parametrize("http", PIPELINING)
@pytest.mark.parametrize("kept_alive", [False, True], ids=["new", "kept alive"])
@pytest.mark.parametrize("path", [b"/", b"/upload"])
async def test_stop_waits_for_the_rest_of_a_request(http: str, kept_alive: bool, path: bytes) -> None:
    """Half of its head, or of its body, has arrived; the other half takes longer than FIRST_REQUEST."""
    request = b"POST %s HTTP/1.1\r\nhost: test\r\ncontent-length: 10\r\n\r\n0123456789" % path
    half = request[:9] if path == b"/" else request[:-5]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        body = b""
        while (message := await receive()).get("more_body"):
            body += message["body"]
        body += message["body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body or b"hello"})

    async with serving(app, http=http) as server, connect(server) as client:
        if kept_alive:
            client.ask("/")
            await client.answer()
            await turns(5)
        client.writer.write(half)
        closing = asyncio.create_task(server.aclose())
        await turns()
        assert not closing.done()
        client.writer.write(request[len(half) :])
        rest = await client.rest()
        assert b"connection: close" in rest
        assert b"0123456789" in rest
        await closing


@pytest.mark.parametrize(
    "sent", [b"GET / HT", b"POST / HTTP/1.1\r\nhost: test\r\ncontent-length: 10\r\n\r\n01234", b"\0"]
)
async def test_request_that_never_completes_is_dropped_when_the_budget_is_over(sent: bytes) -> None:
    """Its connection is closed; bytes that are no HTTP were refused before."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        while (await receive()).get("more_body"):
            pass

    async with serving(app, shutdown_timeout=MOMENT) as server, connect(server) as client:
        client.writer.write(sent)
        await server.aclose()
        await client.rest()


async def test_idle_connections_are_closed_at_once() -> None:
    """Those that are kept alive, and those that have sent nothing."""
    async with serving(App(), shutdown_timeout=None) as server:
        async with connect(server) as kept_alive, connect(server) as silent:
            kept_alive.ask("/")
            await kept_alive.answer()
            await get(server)  # after this, the silent connection is accepted, too
            assert server.stats.connections >= 2
            await server.aclose()
            assert await kept_alive.rest() == b""
            assert await silent.rest() == b""


async def test_connection_that_has_sent_nothing_can_still_send_its_first_request() -> None:
    """For a short time: the request may be on its way."""
    async with serving(App()) as server, connect(server) as client:
        closing = asyncio.create_task(server.aclose())
        await turns()
        assert not closing.done()
        client.ask("/")
        assert b"connection: close" in await client.rest()
        await closing


async def test_connection_that_sends_no_first_request_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """After FIRST_REQUEST; there is no budget here that could end it."""
    monkeypatch.setattr(_limits, "FIRST_REQUEST", MOMENT)
    async with serving(App(), shutdown_timeout=None) as server, connect(server) as client:
        await server.aclose()
        assert await client.rest() == b""


async def test_stop_waits_once_for_all_connections_that_have_sent_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """They all have the same time."""
    monkeypatch.setattr(_limits, "FIRST_REQUEST", MOMENT)
    server = await start(App(), shutdown_timeout=None)
    with contextlib.ExitStack() as stack:
        for _ in range(500):
            stack.enter_context(socket.create_connection((server.host, server.port)))
        await server.aclose()
    assert server.report is not None
    assert not server.report.was_forced


async def test_empty_lines_that_have_arrived_do_not_delay_the_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are allowed between requests (RFC 9112, 2.2); until they are read, they may be anything."""
    monkeypatch.setattr(_limits, "FIRST_REQUEST", MOMENT)
    for settled in (True, False):
        server = await start(App(), shutdown_timeout=None)
        with socket.create_connection((server.host, server.port)) as client:
            await turns()
            if not settled:  # the bytes arrive after everything was read
                monkeypatch.setattr(Connections, "is_settled", lambda _: True)
            client.sendall(b"\r\n")
            await server.aclose()
            assert client.recv(1000)[:12] in (b"", b"HTTP/1.1 400")  # h11 does not allow empty lines
        assert server.report is not None
        assert server.report.aborted == 0


async def test_unfinished_tls_handshake_ends_with_the_stop(tls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """asyncio's own server would leave a task, a timer and a socket behind for a minute."""
    monkeypatch.setattr(_limits, "TLS_HANDSHAKE", MOMENT)
    options, _ = tls
    server = await start(App(), shutdown_timeout=None, **options)
    async with connect(server) as silent, connect(server) as half:
        half.writer.write(b"\x16\x03\x01\x02\x00\x01")
        while len(server._engine.connections.acceptor.pending) < 2:
            await asyncio.sleep(0)
        await server.aclose()
        assert await silent.rest() == b""
        assert await half.rest() == b""


@pytest.mark.parametrize("http", PIPELINING)
async def test_upgrade_right_behind_a_request_leaves_no_timer(http: str) -> None:
    """uvicorn answers the request when the connection is already a WebSocket, and then waits for the next request."""
    app = App()
    async with serving(app, http=http, shutdown_timeout=MOMENT) as server, connect(server) as client:
        client.writer.write(REQUEST % b"/" + UPGRADE)
        await client.reader.readuntil(b"hello")
        await turns()
