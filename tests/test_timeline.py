"""
The shutdown's timeline, row by row: what had arrived is answered, who is owed nothing goes at once, and what is held up
is told, persuaded, cancelled and named.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import errno
import logging
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio
import pytest
import websockets
from fastapi import FastAPI
from sse_starlette.sse import EventSourceResponse
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route
from uvicorn.config import HTTP_PROTOCOLS, WS_PROTOCOLS
from websockets.asyncio.client import connect as connect_websocket

from aioserve import Server, ServerCrashedError, _acceptor, _engine, _shutdown, serving, start
from tests.apps import App
from tests.clients import REQUEST, connect, connect_tls
from tests.turns import MANY_TURNS, after, turns

pytestmark = pytest.mark.usefixtures("short_grace")

BURST = 50

# Whatever is to be seen without the clock has been seen by then.

# A moment, for tests that let one pass: it is short, and nothing depends on how short.
MOMENT = 0.05

UPGRADE = (
    b"GET / HTTP/1.1\r\nhost: test\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
    b"sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)

PIPELINING = [name for name in ("h11", "httptools") if name in HTTP_PROTOCOLS]


@contextlib.contextmanager
def burst(server: Server, count: int = BURST) -> Iterator[list[socket.socket]]:
    """Send requests on new connections without giving the loop a turn, as a client elsewhere may have."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection((server.host, server.port))) for _ in range(count)]
        for client in clients:
            client.sendall(REQUEST % b"/")
        yield clients


def answers(clients: list[socket.socket]) -> int:
    """How many were answered; to be asked when the server has gone."""
    count = 0
    for client in clients:
        client.settimeout(10)
        received = b""
        while chunk := client.recv(1000):
            received += chunk
        count += received.startswith(b"HTTP/1.1 200") and b"connection: close" in received
    return count


# What had arrived is answered.


CONTEXT = contextvars.ContextVar("CONTEXT", default="the server's")


async def test_what_waits_in_the_queue_is_answered_in_the_servers_context() -> None:
    """And not in that of whoever asks for the stop, with the ids and spans that are in it."""
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
        assert answers(clients) == BURST
    assert {*seen} == {"the server's"}


@pytest.mark.parametrize("http", ["h11", "httptools"])
@pytest.mark.parametrize("wait", range(4))
async def test_what_waits_behind_a_body_that_nobody_read_is_answered_over_tls(http: str, wait: int, tls: Any) -> None:
    """Reading is paused by the body, and what comes behind it is in TLS's own buffer when the block ends."""
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


@pytest.mark.parametrize("how", ["the block ends", "close()", "a handler closes it"])
async def test_what_waits_in_the_queue_is_answered(how: str) -> None:
    """The connections have not even been accepted when the stop is asked for."""
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
        assert answers(clients) == BURST


async def test_what_waits_on_kept_alive_connections_is_answered() -> None:
    """It has been sent, and nobody has read it."""
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


async def test_what_waits_behind_a_body_that_came_late_is_answered() -> None:
    """Its request had been answered before; so nobody has looked at it."""
    server = await start(App())
    async with connect(server) as client:
        client.writer.write(b"POST / HTTP/1.1\r\nhost: test\r\ncontent-length: 4\r\n\r\n")
        await client.answer()
        client.writer.write(b"body")
        await turns()
        client.ask("/")
        await server.aclose()
        assert (await client.rest()).startswith(b"HTTP/1.1 200")


async def test_what_waits_on_kept_alive_connections_is_answered_over_tls(tls: Any) -> None:
    """The same, encrypted; and an idle one, whose client does not answer the goodbye, holds nobody."""
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


@pytest.mark.parametrize("http", PIPELINING)
@pytest.mark.parametrize("begun", [False, True], ids=["waiting", "begun"])
async def test_pipelined_requests_are_answered_and_only_the_last_says_close(
    http: str, begun: bool, loop_name: str
) -> None:
    """After one that says so, the client could not take the others for answered (RFC 9112, 9.6)."""
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
async def test_a_pipelined_request_that_nobody_has_read_is_answered(http: str, loop_name: str) -> None:
    """uvicorn stops reading when one waits; what comes after that is left with the kernel."""
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


async def test_a_silent_connection_may_still_send_a_first_request() -> None:
    """For a moment: it may be on its way."""
    async with serving(App()) as server, connect(server) as client:
        closing = asyncio.create_task(server.aclose())
        await turns()
        assert not closing.done()
        client.ask("/")
        assert b"connection: close" in await client.rest()
        await closing


async def test_what_has_arrived_and_is_no_request_counts_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between requests, empty lines are allowed (RFC 9112, 2.2); until it is read, it may be anything."""
    monkeypatch.setattr(_shutdown, "FIRST_REQUEST", MOMENT)
    for settled in (True, False):
        server = await start(App(), shutdown_timeout=None)
        with socket.create_connection((server.host, server.port)) as client:
            await turns()
            if not settled:  # it comes when all that had been there before is looked at already
                monkeypatch.setattr(_engine.Engine, "is_settled", lambda _: True)
            client.sendall(b"\r\n")
            await server.aclose()
            assert client.recv(1000)[:12] in (b"", b"HTTP/1.1 400")  # h11 does not allow them
        assert server.report is not None
        assert server.report.aborted == 0


@pytest.mark.parametrize("kept_alive", [False, True], ids=["new", "kept alive"])
@pytest.mark.parametrize("ws", sorted(WS_PROTOCOLS.keys() - {"auto", "none"}))
async def test_a_websocket_that_had_arrived_is_accepted(ws: str, kept_alive: bool) -> None:
    """And then told to come again."""
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


async def test_a_connection_that_stays_silent_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the moment is over; there is no budget here that could end it."""
    monkeypatch.setattr(_shutdown, "FIRST_REQUEST", MOMENT)
    async with serving(App(), shutdown_timeout=None) as server, connect(server) as client:
        await server.aclose()
        assert await client.rest() == b""


@pytest.mark.parametrize("http", PIPELINING)
@pytest.mark.parametrize("kept_alive", [False, True], ids=["new", "kept alive"])
@pytest.mark.parametrize("path", [b"/", b"/upload"])
async def test_the_rest_of_a_request_is_waited_for(http: str, kept_alive: bool, path: bytes) -> None:
    """Half of its head, or of its body, has arrived; the other half takes longer than the moment of the silent."""
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
async def test_what_never_comes_is_not_waited_for_beyond_the_budget(sent: bytes) -> None:
    """The client is dropped; garbage has been refused before."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        while (await receive()).get("more_body"):
            pass

    async with serving(app, shutdown_timeout=MOMENT) as server, connect(server) as client:
        client.writer.write(sent)
        await server.aclose()
        await client.rest()


# From the asking on, responses say close; and there may be a drain.


async def test_responses_say_close_once_the_stop_is_asked_for() -> None:
    """Also that of a request which had begun before; but not an answer to an upgrade."""
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


async def test_an_app_that_wants_to_keep_a_connection_alive_cannot() -> None:
    """There is one word for it in the response, and it is ours."""

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


async def test_during_the_drain_it_still_accepts() -> None:
    """And what is idle stays, to be told at its next request."""
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


async def test_the_drain_is_over_when_its_time_is() -> None:
    """Then the requests in flight get their budget."""
    app = App()
    async with serving(app, drain_delay=MOMENT, shutdown_timeout=None) as server, connect(server) as client:
        client.ask("/hold")
        await app.holding.wait()
        server.close()
        while server.is_serving():
            await asyncio.sleep(0)
        app.release.set()
        assert (await client.rest()).endswith(b"hello")


async def test_after_a_crash_there_is_no_drain() -> None:
    """Nobody should be sent to it any more."""
    app = App()
    with pytest.raises(ServerCrashedError):
        async with asyncio.timeout(5), serving(app, drain_delay=60):
            app.crash.set()
            await asyncio.Event().wait()


# Persuading.


async def farewell(scope: Any, receive: Any, send: Any) -> None:
    """Stream until the client has gone, so it seems, and say farewell all the same."""
    assert scope["type"] == "http"
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello", "more_body": True})
    assert (await receive())["type"] == "http.disconnect"
    assert (await receive())["type"] == "http.disconnect"
    await send({"type": "http.response.body", "body": b"farewell"})


@pytest.mark.parametrize("disconnect_after", [0, MOMENT, None])
async def test_who_waits_in_receive_is_told_of_a_disconnect_and_may_say_farewell(
    disconnect_after: float | None,
) -> None:
    """At once, after a while, or when the budget is over."""
    budget = MOMENT if disconnect_after is None else None
    server = await start(farewell, disconnect_after=disconnect_after, shutdown_timeout=budget)
    async with connect(server) as client:
        client.ask("/")
        await client.answer()
        await server.aclose()
        assert b"farewell" in await client.rest()
        assert server.report is not None
        assert server.report.cancelled == ()


@pytest.mark.parametrize("disconnect_after", [0, MOMENT])
@pytest.mark.parametrize("how", ["in the queue", "in two parts", *PIPELINING])
async def test_who_begins_later_is_told_as_well(
    how: str, disconnect_after: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or an endless stream whose request was on its way when the stop was asked for would hold it up for ever."""
    told, persuade = asyncio.Event(), _engine.Engine.persuade

    def persuade_and_say_so(engine: _engine.Engine) -> None:
        persuade(engine)
        told.set()

    monkeypatch.setattr(_engine.Engine, "persuade", persuade_and_say_so)
    http = how if how in PIPELINING else "auto"
    if how == "in two parts" and HTTP_PROTOCOLS["auto"] == HTTP_PROTOCOLS.get("zttp"):
        http = "httptools"  # zttp does not tell of a part of a first request
    server = await start(farewell, disconnect_after=disconnect_after, shutdown_timeout=None, http=http)
    request = REQUEST % b"/"
    pipelined = request * 3, b""
    before, rest = {"in the queue": (request, b""), "in two parts": (request[:9], request[9:])}.get(how, pipelined)
    with socket.create_connection((server.host, server.port)) as client:
        client.sendall(before)
        if how != "in the queue":
            await turns()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(server.aclose())
            await told.wait()
            await turns()
            client.sendall(rest)
        assert client.recv(10_000).count(b"farewell") == (3 if how in PIPELINING else 1)


@pytest.mark.parametrize("size", [10, 400_000])
@pytest.mark.parametrize("reading", [False, True], ids=["not yet in receive()", "in receive()"])
async def test_a_body_that_has_arrived_is_read_before_the_disconnect(
    size: int, reading: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is in the kernel when the handler is to be told."""
    seen: list[dict[str, Any]] = []
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        begun.set()
        await go_on.wait()
        while not seen or seen[-1].get("more_body"):
            seen.append(await receive())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"hello"})

    # That all has been read is true when it is asked for, and then the body comes.
    monkeypatch.setattr(_engine.Engine, "is_settled", lambda _: True)
    server = await start(app, disconnect_after=0, shutdown_timeout=None)
    with socket.create_connection((server.host, server.port)) as client:
        client.sendall(b"POST / HTTP/1.1\r\nhost: test\r\ncontent-length: %d\r\n\r\n" % size)
        await begun.wait()
        if reading:
            go_on.set()
            await turns()
        asyncio.get_running_loop().call_soon(client.sendall, bytes(size))  # when this turn has looked at the sockets
        after(MANY_TURNS, go_on.set)
        await server.aclose()
        assert client.recv(1000).startswith(b"HTTP/1.1 200")
    assert sum(len(message.get("body", b"")) for message in seen) == size
    assert {message["type"] for message in seen} == {"http.request"}


async def test_what_arrives_without_an_end_is_not_waited_for_without_an_end() -> None:
    """However quick its client is."""

    class Cycle:
        more_body = True
        persuading = False
        message_event = asyncio.Event()

    cycle = Cycle()
    persuasion = _engine._Persuasion(cycle, lambda _: 1)
    await persuasion.wait()
    persuasion.clear()
    assert cycle.persuading


async def test_a_body_that_goes_on_and_on_does_not_hold_up_the_stop() -> None:
    """Neither of a request that is answered already, nor of one whose handler reads it."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        if scope["path"] == "/read":
            while (await receive())["type"] != "http.disconnect":
                pass
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"hello"})

    def send_on(client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client.sendall(bytes(50_000))

    for path in (b"/", b"/read"):
        server = await start(app, disconnect_after=0, shutdown_timeout=None)
        with socket.create_connection((server.host, server.port)) as client, ThreadPoolExecutor(1) as executor:
            client.sendall(b"POST %s HTTP/1.1\r\nhost: test\r\ncontent-length: %d\r\n\r\n" % (path, 10**12))
            sending = executor.submit(send_on, client)
            await turns()
            await server.aclose()
            with contextlib.suppress(OSError):  # it is closed from there
                client.shutdown(socket.SHUT_RDWR)
            sending.result()


async def test_a_body_of_which_half_has_arrived_does_not_hold_up_the_stop() -> None:
    """What has come is read; then there is the disconnect."""
    seen: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        begun.set()
        while not seen or seen[-1].get("more_body"):
            seen.append(await receive())

    begun = asyncio.Event()
    server = await start(app, disconnect_after=0, shutdown_timeout=None)
    with socket.create_connection((server.host, server.port)) as client:
        client.sendall(b"POST / HTTP/1.1\r\nhost: test\r\ncontent-length: 1000\r\n\r\n")
        await begun.wait()
        client.sendall(b"half")
        await server.aclose()
    assert [message.get("body") for message in seen] == [b"half", None]
    assert seen[-1]["type"] == "http.disconnect"


async def test_who_had_to_be_told_because_the_time_was_over_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """It held up the stop; that its response is cut off is no mistake of the app's, and uvicorn does not say so."""

    async def endless(request: Request) -> StreamingResponse:
        async def hello() -> AsyncIterator[str]:
            yield "hello"
            await asyncio.Event().wait()

        return StreamingResponse(hello())

    for disconnect_after in (0, None):
        caplog.clear()
        app = Starlette(routes=[Route("/endless", endless)])
        server = await start(app, disconnect_after=disconnect_after, shutdown_timeout=MOMENT)
        async with connect(server) as client:
            client.ask("/endless")
            await client.answer()
            await server.aclose()
            await client.rest()
        assert server.report is not None
        assert server.report.cancelled == ()
        logged = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        if disconnect_after is None:
            (handler,) = server.report.persuaded
            assert handler[:2] == ("GET", "/endless")
            (line,) = logged
            assert "handlers told to end: 1, cancelled: 0; connections dropped: 0 (GET /endless of " in line
        else:
            assert server.report.persuaded == ()
            assert logged == []


async def test_who_has_been_told_before_its_response_began_may_leave_it_to_uvicorn(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its client gets a 500; but it is no mistake of the app's either."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        waiting.set()
        while (await receive())["type"] != "http.disconnect":
            pass

    waiting = asyncio.Event()
    server = await start(app, disconnect_after=0, shutdown_timeout=None)
    async with connect(server) as client:
        client.ask("/")
        await waiting.wait()
        await server.aclose()
        assert (await client.rest()).startswith(b"HTTP/1.1 500")
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_nobody_is_persuaded_earlier() -> None:
    """A stream that ends by itself is not cut off."""
    release = asyncio.Event()

    async def stream(request: Request) -> StreamingResponse:
        async def numbers() -> AsyncIterator[str]:
            yield "hello"
            await release.wait()
            yield "the end"

        return StreamingResponse(numbers())

    server = await start(Starlette(routes=[Route("/", stream)]), disconnect_after=60, shutdown_timeout=None)
    async with connect(server) as client:
        client.ask("/")
        await client.answer()
        after(MANY_TURNS, release.set)
        await server.aclose()
        assert b"the end" in await client.rest()


async def test_a_body_that_has_come_is_not_lost_by_persuading() -> None:
    """A handler that reads it late gets it first, and then hears of the disconnect."""
    release = asyncio.Event()
    seen: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"hello", "more_body": True})
        await release.wait()
        seen.extend([await receive(), await receive()])
        await send({"type": "http.response.body", "body": b""})

    server = await start(app, disconnect_after=0, shutdown_timeout=None)
    async with connect(server) as client:
        client.writer.write(b"POST / HTTP/1.1\r\nhost: test\r\ncontent-length: 4\r\n\r\nbody")
        await client.answer()
        after(MANY_TURNS, release.set)
        await server.aclose()
        await client.rest()
    assert [message["type"] for message in seen] == ["http.request", "http.disconnect"]
    assert seen[0]["body"] == b"body"


@pytest.fixture
async def sse_starlettes_watcher_ends() -> AsyncIterator[None]:
    """It has a task for each loop, which looks for uvicorn's end twice a second, and lives as long as the loop."""
    yield
    watchers = {task for task in asyncio.all_tasks() if "_shutdown_watcher" in repr(task.get_coro())}
    for task in watchers:
        task.cancel()
    if watchers:
        await asyncio.wait(watchers)


@pytest.mark.usefixtures("sse_starlettes_watcher_ends")
async def test_starlettes_endless_streams_end_unchanged() -> None:
    """They listen for the disconnect; so does sse-starlette, for which there is one server after the other."""

    async def endless() -> AsyncIterator[str]:
        yield "hello"
        await asyncio.Event().wait()

    async def stream(request: Request) -> StreamingResponse:
        return StreamingResponse(endless())

    async def events(request: Request) -> EventSourceResponse:
        return EventSourceResponse(endless())

    app = Starlette(routes=[Route("/stream", stream), Route("/events", events)])
    for _ in range(2):
        server = await start(app, disconnect_after=0, shutdown_timeout=None)
        async with connect(server) as one, connect(server) as other:
            one.ask("/stream")
            other.ask("/events")
            await one.answer()
            await other.answer()
            await server.aclose()
            await one.rest()
            await other.rest()
            assert server.report is not None
            assert server.report.cancelled == ()


@pytest.mark.usefixtures("sse_starlettes_watcher_ends")
async def test_sse_starlette_takes_our_event() -> None:
    """Its streams see the stop, have a grace of their own, and say goodbye."""

    async def events(request: Request) -> EventSourceResponse:
        stopping: anyio.Event = request.state.aioserve.stopping

        async def until_stopping() -> AsyncIterator[str]:
            yield "hello"
            await stopping.wait()
            yield "goodbye"

        return EventSourceResponse(until_stopping(), shutdown_event=stopping, shutdown_grace_period=5)

    server = await start(Starlette(routes=[Route("/", events)]), shutdown_timeout=None)
    async with connect(server) as client:
        client.ask("/")
        await client.answer()
        await server.aclose()
        assert b"goodbye" in await client.rest()


# WebSockets.


@pytest.mark.parametrize("ws", sorted(WS_PROTOCOLS.keys() - {"none", "auto"}))
async def test_a_websocket_whose_handler_waits_for_the_stop_can_say_farewell(ws: str) -> None:
    """It hears of the stop before its client does."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "websocket"
        await receive()
        await send({"type": "websocket.accept"})
        await scope["state"]["aioserve"].stopping.wait()
        await send({"type": "websocket.send", "text": "farewell"})
        await send({"type": "websocket.close", "code": 4000})

    server = await start(app, ws=ws)
    async with connect_websocket(server.url.replace("http", "ws"), proxy=None) as client:
        await turns()
        await asyncio.gather(server.aclose(), client.wait_closed())
        assert await client.recv() == "farewell"
        assert client.close_code == 4000


async def test_a_websocket_whose_handler_sleeps_is_told_at_once_and_cancelled_when_the_budget_is_over() -> None:
    """Its client hears 1012 at once."""
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


async def test_a_websocket_of_the_last_moment_is_told_as_well() -> None:
    """It becomes one when the others have been told already."""
    server = await start(App(), shutdown_timeout=None)
    async with connect(server) as client:
        closing = asyncio.create_task(server.aclose())
        await turns()
        client.writer.write(UPGRADE)
        await client.rest()
        await closing


# Force.


@pytest.mark.parametrize("level", [logging.ERROR, logging.CRITICAL])
async def test_a_cancelled_handler_is_no_exception_of_the_apps(level: int, caplog: pytest.LogCaptureFixture) -> None:
    """uvicorn logs no traceback for it; for what else it raises meanwhile, it does, if its logger is to."""
    app_is_in = asyncio.Semaphore(0)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.accept"})
        app_is_in.release()
        try:
            await asyncio.Event().wait()
        finally:
            if scope["path"] == "/fails":
                raise ZeroDivisionError

    caplog.set_level(level, "uvicorn.error")
    caplog.handler.setLevel(logging.NOTSET)  # of the others, all is to be seen
    server = await start(app, lifespan="off", shutdown_timeout=0)
    async with (
        connect(server) as quiet,
        connect(server) as failing,
        connect_websocket(server.url.replace("http", "ws"), proxy=None),
    ):
        quiet.ask("/")
        failing.ask("/fails")
        for _ in range(3):
            await app_is_in.acquire()
        await server.aclose()
    logged = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [record.name for record in logged if not record.exc_info] == ["aioserve"]
    failed = [record for record in logged if record.exc_info]
    assert [record.exc_info and record.exc_info[0] for record in failed] == [ZeroDivisionError] * (
        level == logging.ERROR
    )
    assert not any(record.module == "_engine" for record in failed), "It was not the engine that said it."


def test_a_synchronous_endpoint_that_is_stuck_in_its_thread_holds_nobody() -> None:
    """Its thread cannot be cancelled; but its task can, and the report says where that was."""
    stuck, release = threading.Event(), threading.Event()
    app = FastAPI()

    @app.get("/")
    def wait() -> None:
        stuck.set()
        release.wait(30)

    async def main() -> None:
        async with serving(app, shutdown_timeout=0) as server, connect(server) as client:
            client.ask("/")
            while not stuck.is_set():
                await asyncio.sleep(0)
            await server.aclose()
            assert not release.is_set()
            release.set()
            assert server.report is not None
            (handler,) = server.report.cancelled
            assert any("run_sync_in_worker_thread" in each for each in handler.where)

    asyncio.run(main())  # a loop of its own: the worker thread lives as long


async def test_the_report_of_an_orderly_stop() -> None:
    """Nothing was forced."""
    async with serving(App()) as server:
        assert server.report is None
    assert server.report is not None
    assert 0 <= server.report.duration < 60
    assert server.report[1:] == (0, (), (), False)


async def test_a_deadline_is_for_the_requests_and_leaves_the_lifespan_its_time() -> None:
    """The requests were done in time; the app's shutdown takes longer than the deadline allowed them."""
    ended: list[bool] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await passed.wait()
        ended.append(True)

    passed = asyncio.Event()
    async with serving(app) as server:
        server.close(timeout=MOMENT)
        asyncio.get_running_loop().call_later(6 * MOMENT, passed.set)
    assert ended


async def test_a_deadline_ends_the_drain_as_well() -> None:
    """It counts from the call."""
    app = App()
    async with asyncio.timeout(5), serving(app, drain_delay=60) as server, connect(server) as client:
        client.ask("/hold")
        await app.holding.wait()
        server.close(timeout=MOMENT)
        await server.wait_closed()
    assert "cancelled /hold" in app.events


# TLS.


async def test_a_handshake_that_is_never_finished_ends_with_the_stop(tls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """asyncio's own server would leave a task, a timer and a socket behind for a minute."""
    monkeypatch.setattr(_shutdown, "FIRST_REQUEST", MOMENT)
    options, _ = tls
    server = await start(App(), shutdown_timeout=None, **options)
    async with connect(server) as silent, connect(server) as half:
        half.writer.write(b"\x16\x03\x01\x02\x00\x01")
        while len(server.uvicorn.servers[0].making) < 2:  # type: ignore[attr-defined]
            await asyncio.sleep(0)
        await server.aclose()
        assert await silent.rest() == b""
        assert await half.rest() == b""


@pytest.mark.parametrize("turn", range(8))
async def test_a_client_that_leaves_in_the_middle_of_the_stop_does_no_harm(tls: Any, turn: int) -> None:
    """Its socket may be closed already when we want to close its connection."""
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


async def test_without_a_descriptor_to_spare_the_budget_decides(tls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A closing TLS connection whose client reads nothing cannot be watched then; nothing breaks of it."""

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
        monkeypatch.setattr("aioserve._engine.os.dup", exhausted)
        await server.aclose()
        monkeypatch.undo()
    assert server.report is not None
    assert server.report.aborted == 1


async def test_a_websocket_over_tls_is_gone_with_the_stop(tls: Any) -> None:
    """uvicorn closes its transport twice, after which asyncio's cannot be aborted."""
    options, context = tls
    server = await start(App(), shutdown_timeout=None, **options)
    # A client that reads nothing, and so does not answer.
    async with connect_tls(server, context) as client:
        client.writer.write(UPGRADE)
        await client.reader.readuntil(b"\r\n\r\n")
        transport: Any = client.writer.transport
        transport.pause_reading()
        await server.aclose()


async def test_a_websocket_over_tls_that_cannot_be_told_is_dropped(tls: Any) -> None:
    """What it was sent before is still in the way, so not even the goodbye gets through."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        await asyncio.sleep(0)  # an eager task is here before uvicorn is ready to hold it back
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
    assert server.report is not None
    assert server.report.aborted == 1


async def test_a_slow_reader_gets_all_of_its_response_over_tls(tls: Any) -> None:
    """A closing connection is dropped when what we sent is on its way, and not before."""
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
    # In threads: a client in a loop of Python's may itself drop what it has not yet read when its connection closes.
    with ThreadPoolExecutor(1) as executor:
        loop = asyncio.get_running_loop()
        with await loop.run_in_executor(executor, ask) as client:
            closing = asyncio.create_task(server.aclose())
            await turns()
            assert not closing.done()
            assert await loop.run_in_executor(executor, read, client) > size
            await closing


# Crowds.


@pytest.mark.parametrize("loop_name", ["asyncio"])  # the methods of a uvloop cannot be replaced
async def test_a_crowd_of_idle_connections_takes_no_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are owed nothing."""
    made: list[object] = []
    server = await start(App(), shutdown_timeout=None)
    with burst(server, 500) as clients:
        while server.stats.served < len(clients):
            await asyncio.sleep(0)
        loop: Any = asyncio.get_running_loop()
        for name in ("call_later", "call_at"):
            monkeypatch.setattr(loop, name, lambda *args: made.append(args))
        await server.aclose()
        monkeypatch.undo()
    assert made == []
    assert server.report is not None
    assert server.report.aborted == 0


async def test_a_crowd_of_silent_connections_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them have the same moment."""
    monkeypatch.setattr(_shutdown, "FIRST_REQUEST", MOMENT)
    server = await start(App(), shutdown_timeout=None)
    with contextlib.ExitStack() as stack:
        for _ in range(500):
            stack.enter_context(socket.create_connection((server.host, server.port)))
        await server.aclose()
    assert server.report is not None
    assert server.report[1:] == (0, (), (), False)


# Odds and ends of a stop.


async def test_a_generator_that_is_closed_hears_of_the_crash() -> None:
    """It has no error of its own that could win."""
    app = App()

    async def generator() -> AsyncIterator[Server]:
        async with serving(app) as server:
            yield server

    async def use() -> None:
        servers = generator()
        async with contextlib.aclosing(servers):  # type: ignore[type-var]
            async for _server in servers:
                app.crash.set()
                await asyncio.Event().wait()

    task = asyncio.create_task(use())
    await asyncio.wait({task})
    assert not task.cancelled()
    assert isinstance(task.exception(), ServerCrashedError)
    assert task.cancelling() == 0


def test_closing_when_the_loop_is_closed_is_no_mistake() -> None:
    """There is nothing left that could be asked."""
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(start(App(), lifespan="off"))
    sockets = server.sockets
    loop.close()
    server.close()
    assert not server.is_serving()
    for sock in sockets:  # the loop was closed too early for us to do so
        sock.close()


@pytest.mark.parametrize("http", PIPELINING)
async def test_an_upgrade_right_behind_a_request_leaves_no_timer(http: str) -> None:
    """uvicorn answers the first when the connection is a WebSocket's already, and then waits for a next request."""
    app = App()
    async with serving(app, http=http, shutdown_timeout=MOMENT) as server, connect(server) as client:
        client.writer.write(REQUEST % b"/" + UPGRADE)
        await client.reader.readuntil(b"hello")
        await turns()


async def test_out_of_descriptors_it_accepts_again_later(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The queue waits; and a stop meanwhile leaves no timer."""
    exhausted = [True]

    class Exhausted(socket.socket):
        def accept(self) -> tuple[socket.socket, Any]:
            if exhausted:
                raise OSError(errno.EMFILE, "Too many open files")
            return super().accept()

    monkeypatch.setattr("aioserve._acceptor.socket.socket", Exhausted)
    monkeypatch.setattr(_acceptor, "_ACCEPT_AGAIN_AFTER", MOMENT)
    again: Callable[[], bool] = lambda: "cannot accept: Too many open files" in caplog.text  # noqa: E731
    async with serving(App()) as server, connect(server) as client:
        client.ask("/")
        while not again():
            await asyncio.sleep(0)
        exhausted.clear()
        assert (await client.answer()).endswith(b"hello")
        exhausted.append(True)
        async with connect(server):
            await turns()
            await server.aclose()
    assert "cannot accept: Too many open files; what waits in the queue is lost" in caplog.text


@pytest.mark.parametrize("families", [[socket.AF_INET], [socket.AF_INET, socket.AF_INET6]])
async def test_lent_sockets_stay_their_owners(families: list[socket.AddressFamily], loop_name: str) -> None:
    """They stay open, what waits in their queue is the next one's, and answers are sent without delay."""
    with contextlib.ExitStack() as stack:
        lent = [stack.enter_context(socket.socket(family, socket.SOCK_STREAM)) for family in families]
        for sock in lent:
            sock.bind(("127.0.0.1" if sock.family == socket.AF_INET else "::1", 0))
        async with serving(App(), sockets=lent) as server:
            assert len(server.urls) == len(families)
            async with connect(server) as client:
                client.ask("/")
                await client.answer()
                (protocol,) = server.uvicorn.server_state.connections
                connection = protocol.transport.get_extra_info("socket")
                assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        async with serving(App(), sockets=lent) as again:
            assert again.url == server.url
            clients = stack.enter_context(burst(again))
        assert again.stats.served == 0 or loop_name == "uvloop"  # which looks at its sockets before it lets us
        async with serving(App(), sockets=lent) as last:
            while again.stats.served + last.stats.served < BURST:
                await asyncio.sleep(0)
            assert sum(client.recv(1000).startswith(b"HTTP/1.1 200") for client in clients) == BURST
        assert all(sock.fileno() != -1 for sock in lent)


async def test_two_servers_may_share_a_lent_socket() -> None:
    """As when the new one starts before the old one stops."""
    with socket.socket() as lent:
        lent.bind(("127.0.0.1", 0))
        async with serving(App(), sockets=[lent]) as old:
            new = await start(App(), sockets=[lent])
            async with connect(old) as client:
                client.ask("/")
                await client.answer()
        async with new, connect(new) as client:
            client.ask("/")
            await client.answer()
            assert old.stats.served + new.stats.served == 2
