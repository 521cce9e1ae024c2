"""
The server stops accepting: connections in the kernel's queue are taken out of it and answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import errno
import socket
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from aioserve import Server, _limits, serving, start
from aioserve._net import acceptor
from tests.helpers import not_portable
from tests.helpers.apps import App, Receive, Scope, Send, without_lifespan
from tests.helpers.clients import BURST, UPGRADE, burst, connect, count_answers
from tests.helpers.turns import MOMENT, turns

pytestmark = pytest.mark.usefixtures("short_grace")

CONTEXT = contextvars.ContextVar("CONTEXT", default="the server's")


@pytest.mark.parametrize("how", ["the block ends", "close()", "a handler closes it"])
async def test_requests_in_the_accept_queue_are_answered(how: str) -> None:
    """Their connections have not even been accepted when the stop is asked for."""
    async with contextlib.AsyncExitStack() as stack:
        async with serving(App()) as server:
            connection = await stack.enter_async_context(connect(server))
            if how == "a handler closes it":
                connection.ask("/close")
                await server.stopping.wait()
            clients = stack.enter_context(burst(server))
            if how == "close()":
                server.close()
                await server.wait_closed()
        assert count_answers(clients) == BURST


REQUEST = b"GET / HTTP/1.1\r\nhost: test\r\n\r\n"
STREAM = b"GET / HTTP/1.1\r\nhost: test\r\naccept: text/event-stream\r\n\r\n"


async def stream_or_websocket(scope: Scope, receive: Receive, send: Send) -> None:
    """Send a part of a stream, or accept a WebSocket, and wait for the disconnect."""
    if scope["type"] == "lifespan":
        await without_lifespan(scope, receive, send)
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"begun", "more_body": True})
    else:
        await receive()
        await send({"type": "websocket.accept"})
    while not (await receive())["type"].endswith("disconnect"):
        pass


def when_it_sleeps(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Call a function where the loop is blocked until the kernel has completed the last handshakes."""
    monkeypatch.setattr(_limits, "LAST_HANDSHAKES", 10.0)
    monkeypatch.setattr(acceptor, "time", SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: act()))


@pytest.mark.parametrize("ask", [Server.aclose, Server.close])
@not_portable.loop_accepts
async def test_websockets_and_streams_end_before_the_last_handshakes_are_waited_for(
    ask: Callable[[Server], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So their clients can close meanwhile, and a stop with them takes no longer for that."""
    loop = asyncio.get_running_loop()
    seen: list[bytes] = []
    async with serving(stream_or_websocket) as server, contextlib.AsyncExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection((server.host, server.port))) for _ in range(2)]
        for client, request, answer in zip(clients, (UPGRADE, STREAM), (b"\r\n\r\n", b"begun\r\n"), strict=True):
            client.setblocking(False)
            await loop.sock_sendall(client, request)
            received = b""
            while not received.endswith(answer):
                received += await loop.sock_recv(client, 1000)
        when_it_sleeps(monkeypatch, lambda: seen.extend(client.recv(100) for client in clients))
        if (closing := ask(server)) is not None:
            await closing
        await server.wait_closed()
    assert seen == [b"\x88\x02\x03\xf4", b"0\r\n\r\n"]  # 1012, and the last chunk


@pytest.mark.parametrize("ask", [Server.aclose, Server.close])
@not_portable.loop_accepts
async def test_request_on_an_idle_connection_is_answered_that_comes_while_handshakes_are_waited_for(
    ask: Callable[[Server], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A busy client has its last answer, and is about to send its next request."""
    app = App()
    loop = asyncio.get_running_loop()
    server = await start(app)
    async with connect(server) as busy:
        with socket.create_connection((server.host, server.port)) as idle:
            idle.setblocking(False)
            await loop.sock_sendall(idle, REQUEST)
            while not (await loop.sock_recv(idle, 1000)).endswith(b"hello"):
                pass
            busy.ask("/hold")
            await app.holding.wait()
            when_it_sleeps(monkeypatch, lambda: idle.send(REQUEST))
            loop.call_soon(app.release.set)
            if (closing := ask(server)) is not None:
                await closing
            await server.wait_closed()
            received = b""
            while chunk := idle.recv(1000):
                received += chunk
        assert received.endswith(b"hello")
        assert (await busy.rest()).endswith(b"hello")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere, nothing keeps a client from coming there")
@pytest.mark.parametrize("is_lent", [False, True])
@not_portable.loop_accepts
async def test_shared_port_and_lent_socket_close_as_soon_as_new_clients_are_refused(
    *, is_lent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Where a port is shared, a client that comes between tries again only after a second.

    And who waits in the queue of a lent socket is left to its next user. So streams and WebSockets are closed later.
    """
    later: list[str] = []
    end_new_connections = acceptor._end_new_connections

    def end(listening: Any) -> bool:
        asyncio.get_running_loop().call_soon(later.append, "turn")
        return end_new_connections(listening)

    app = App()
    lent = socket.create_server(("127.0.0.1", 0))
    options: dict[str, Any] = {"sockets": [lent]} if is_lent else {"reuse_port": True}
    server = await start(app, **options)
    async with connect(server) as connection:
        connection.ask("/hold")
        await app.holding.wait()
        monkeypatch.setattr(acceptor, "_end_new_connections", end)
        when_it_sleeps(monkeypatch, lambda: later.append("sleep"))
        asyncio.get_running_loop().call_soon(app.release.set)
        await server.aclose()
        assert (await connection.rest()).endswith(b"hello")
    lent.close()
    assert later[:2] == ["sleep", "turn"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere, nothing keeps a client from coming there")
@pytest.mark.parametrize("reuse_port", [False, True])
@not_portable.loop_accepts
async def test_client_between_the_last_look_at_the_queue_and_the_close_is_not_reset(
    *, reuse_port: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused; where a port is shared, it tries again, and reaches another server."""
    is_readable = acceptor._is_readable
    outcomes: list[int] = []
    with contextlib.ExitStack() as clients:

        def look(listening: socket.socket) -> bool:
            found = is_readable(listening)
            if not found:
                client = clients.enter_context(socket.socket())
                client.settimeout(0.1)
                outcomes.append(client.connect_ex(listening.getsockname()))
            return found

        async with serving(App(), port=0, reuse_port=reuse_port) as server, connect(server) as connection:
            connection.ask("/")
            assert b"hello" in await connection.answer()
            monkeypatch.setattr(acceptor, "_is_readable", look)
            await server.aclose()
    assert outcomes == [errno.EAGAIN if reuse_port else errno.ECONNREFUSED]


async def test_requests_in_the_accept_queue_are_answered_in_the_servers_context() -> None:
    """And not in the context of the caller of `close()`, with its ids and spans."""
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        seen.append(CONTEXT.get())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    server = await start(app)
    with burst(server) as clients:
        CONTEXT.set("the caller's")
        await server.aclose()
        assert count_answers(clients) == BURST
    assert {*seen} == {"the server's"}


@pytest.mark.parametrize(("count", "stops"), [(1, False), (3, False), (1, True), (2, True)])
@pytest.mark.parametrize("loop_name", ["portable"])
async def test_server_whose_loop_fails_to_accept_accepts_again(
    count: int, stops: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """
    asyncio's loop for Windows gives a socket up then. It is tried at once, and where that fails as well, later.

    Connections wait in the queue, also for a stop.
    """
    failures = [OSError(errno.ECONNRESET, "Connection reset by peer")] * count
    accept = socket.socket._accept  # type: ignore[attr-defined]

    def failing(sock: socket.socket) -> Any:
        if failures:
            raise failures.pop()
        return accept(sock)

    loop = asyncio.get_running_loop()
    handler = loop.get_exception_handler()
    async with serving(App()) as server:
        monkeypatch.setattr(_limits, "ACCEPT_RETRY", 1000 if stops else MOMENT)
        monkeypatch.setattr(socket.socket, "_accept", failing)
        loop.set_exception_handler(lambda *_: None)
        async with connect(server) as client:
            client.ask("/")
            while failures:
                await asyncio.sleep(0)
            await turns()  # for asyncio to report the last one
            loop.set_exception_handler(handler)
            if stops:
                await server.aclose()
            assert (await client.answer()).endswith(b"hello")
    assert ("cannot accept" in caplog.text) == (count > 1)


@not_portable.loop_accepts
async def test_server_without_free_descriptors_accepts_again_later(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Connections wait in the queue; and a stop in the meantime leaves no timer."""
    exhausted = [True]

    class Exhausted(socket.socket):
        def accept(self) -> tuple[socket.socket, Any]:
            if exhausted:
                raise OSError(errno.EMFILE, "Too many open files")
            return super().accept()

    monkeypatch.setattr("aioserve._net.acceptor.socket.socket", Exhausted)
    monkeypatch.setattr(_limits, "ACCEPT_RETRY", MOMENT)
    again: Callable[[], bool] = lambda: "cannot accept: Too many open files" in caplog.text  # noqa: E731
    async with serving(App(), shutdown_timeout=0.5) as server, connect(server) as client:
        client.ask("/")
        while not again():
            await asyncio.sleep(0)
        exhausted.clear()
        assert (await client.answer()).endswith(b"hello")
        exhausted.append(True)
        async with connect(server):
            await turns()
            await server.aclose()
    assert "no descriptor is left for connections that wait" in caplog.text
    assert server.report is not None
    assert server.report.aborted == 1
