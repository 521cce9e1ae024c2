"""
Disconnecting: a handler that waits in `receive()` gets `http.disconnect`, and can still send.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio
import pytest
from sse_starlette.sse import AppStatus, EventSourceResponse
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route
from uvicorn.config import HTTP_PROTOCOLS

from aioserve import start
from aioserve._connections import Connections
from aioserve._uvicorn.disconnect import _DisconnectEvent
from tests.helpers.clients import PIPELINING, REQUEST, connect
from tests.helpers.turns import MANY_TURNS, MOMENT, after, turns

pytestmark = pytest.mark.usefixtures("short_grace")


async def stream_until_disconnect(scope: Any, receive: Any, send: Any) -> None:
    """Stream until the disconnect, and send a last chunk after it."""
    assert scope["type"] == "http"
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello", "more_body": True})
    assert (await receive())["type"] == "http.disconnect"
    assert (await receive())["type"] == "http.disconnect"
    await send({"type": "http.response.body", "body": b"last chunk"})


@pytest.mark.parametrize("disconnect_after", [0, MOMENT, None])
async def test_handler_that_waits_in_receive_gets_a_disconnect_and_can_still_send(
    disconnect_after: float | None,
) -> None:
    """At once, after `disconnect_after`, or when the budget is over."""
    budget = MOMENT if disconnect_after is None else None
    server = await start(stream_until_disconnect, disconnect_after=disconnect_after, shutdown_timeout=budget)
    async with connect(server) as client:
        client.ask("/")
        await client.answer()
        await server.aclose()
        assert b"last chunk" in await client.rest()
        assert server.report is not None
        assert server.report.cancelled == ()


@pytest.mark.parametrize("disconnect_after", [0, MOMENT])
@pytest.mark.parametrize("how", ["in the queue", "in two parts", *PIPELINING])
async def test_handler_that_begins_after_the_disconnect_gets_a_disconnect(
    how: str, disconnect_after: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise an endless stream whose request was on its way when the stop began would hold the stop for ever."""
    disconnected, disconnect_handlers = asyncio.Event(), Connections.disconnect_handlers

    def disconnect_and_record(connections: Connections) -> None:
        disconnect_handlers(connections)
        disconnected.set()

    monkeypatch.setattr(Connections, "disconnect_handlers", disconnect_and_record)
    http = how if how in PIPELINING else "auto"
    if how == "in two parts" and HTTP_PROTOCOLS["auto"] == HTTP_PROTOCOLS.get("zttp"):
        http = "httptools"  # with zttp, a part of a first request cannot be seen
    server = await start(stream_until_disconnect, disconnect_after=disconnect_after, shutdown_timeout=None, http=http)
    request = REQUEST % b"/"
    pipelined = request * 3, b""
    before, rest = {"in the queue": (request, b""), "in two parts": (request[:9], request[9:])}.get(how, pipelined)
    with socket.create_connection((server.host, server.port)) as client:
        client.sendall(before)
        if how != "in the queue":
            await turns()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(server.aclose())
            await disconnected.wait()
            await turns()
            client.sendall(rest)
        assert client.recv(10_000).count(b"last chunk") == (3 if how in PIPELINING else 1)


@pytest.mark.parametrize("size", [10, 400_000])
@pytest.mark.parametrize("reading", [False, True], ids=["not yet in receive()", "in receive()"])
async def test_request_body_that_has_arrived_is_received_before_the_disconnect(
    size: int, reading: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is in the kernel when the handlers are disconnected."""
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

    # When this is called, all has been read; the body arrives after that.
    monkeypatch.setattr(Connections, "is_settled", lambda _: True)
    server = await start(app, disconnect_after=0, shutdown_timeout=None)
    with socket.create_connection((server.host, server.port)) as client:
        client.sendall(b"POST / HTTP/1.1\r\nhost: test\r\ncontent-length: %d\r\n\r\n" % size)
        await begun.wait()
        if reading:
            go_on.set()
            await turns()
        asyncio.get_running_loop().call_soon(client.sendall, bytes(size))  # after this turn has polled the sockets
        after(MANY_TURNS, go_on.set)
        await server.aclose()
        assert client.recv(1000).startswith(b"HTTP/1.1 200")
    assert sum(len(message.get("body", b"")) for message in seen) == size
    assert {message["type"] for message in seen} == {"http.request"}


async def test_wait_for_a_request_body_without_an_end_is_bounded() -> None:
    """However fast the client sends."""

    class Cycle:
        more_body = True
        says_disconnected = False
        message_event = asyncio.Event()

    cycle = Cycle()
    disconnecting = _DisconnectEvent(cycle, asyncio.get_running_loop(), lambda _: True)
    await disconnecting.wait()
    disconnecting.clear()
    assert cycle.says_disconnected


@pytest.mark.usefixtures("short_linger")
async def test_request_body_without_an_end_does_not_delay_the_stop() -> None:
    """Neither of a request that is already answered, nor of one whose handler reads it."""

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
            with contextlib.suppress(OSError):  # the server has closed it
                client.shutdown(socket.SHUT_RDWR)
            sending.result()


@pytest.mark.usefixtures("short_linger")
async def test_incomplete_request_body_does_not_delay_the_stop() -> None:
    """The part that has arrived is received; the disconnect follows."""
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


async def test_handler_that_is_disconnected_when_the_budget_is_over_is_reported(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It delayed the stop. That its response is cut off is no error of the app, and uvicorn logs none."""

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
            (handler,) = server.report.disconnected
            assert (handler.method, handler.path) == ("GET", "/endless")
            (line,) = logged
            assert "forced shutdown: 1 handler disconnected, 0 cancelled, 0 connections dropped (GET /endless (" in line
        else:
            assert server.report.disconnected == ()
            assert logged == []


async def test_handler_that_returns_without_a_response_after_a_disconnect_gets_a_500(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """uvicorn sends the response; no error of the app is logged."""

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


async def test_handler_is_not_disconnected_before_disconnect_after() -> None:
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


async def test_request_body_that_a_handler_reads_late_is_not_lost() -> None:
    """The handler gets it first, and the disconnect after it."""
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
    """End the task of sse-starlette that checks twice a second whether uvicorn stops, as long as the loop lives."""
    AppStatus.should_exit = False  # of the process: an earlier test may have stopped a server of uvicorn's own
    yield
    watchers = {task for task in asyncio.all_tasks() if "_shutdown_watcher" in repr(task.get_coro())}
    for task in watchers:
        task.cancel()
    if watchers:
        await asyncio.wait(watchers)


@pytest.mark.usefixtures("sse_starlettes_watcher_ends")
async def test_endless_streams_of_starlette_and_sse_starlette_end_at_a_disconnect() -> None:
    """Both wait for it; sse-starlette also with one server after the other."""

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
async def test_generator_of_sse_starlette_can_watch_the_stopping_event() -> None:
    """It sees the stop, and can send a last event."""

    async def events(request: Request) -> EventSourceResponse:
        stopping: anyio.Event = request.state.aioserve.stopping

        async def until_stopping() -> AsyncIterator[str]:
            yield "hello"
            await stopping.wait()
            yield "the end"

        return EventSourceResponse(until_stopping())

    server = await start(Starlette(routes=[Route("/", events)]), shutdown_timeout=None)
    async with connect(server) as client:
        client.ask("/")
        await client.answer()
        await server.aclose()
        assert b"the end" in await client.rest()
