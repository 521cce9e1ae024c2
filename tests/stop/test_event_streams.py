"""
Event streams have no end of their own: their handlers hear of the stop at once, and their clients see a proper end.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import StreamingResponse
from starlette.routing import Route
from uvicorn.config import HTTP_PROTOCOLS

from aioserve import Server, Swappable, serving
from tests.helpers.apps import Receive, Scope, Send, without_lifespan
from tests.helpers.clients import connect
from tests.helpers.turns import turns

pytestmark = pytest.mark.usefixtures("short_grace")

EVENTS = {"accept": "text/event-stream"}


async def endless(scope: Scope, receive: Receive, send: Send) -> None:
    """Send an event, and wait for the disconnect; the client gets no more."""
    if scope["type"] == "lifespan":
        await without_lifespan(scope, receive, send)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
    while (await receive())["type"] != "http.disconnect":
        pass


def streaming(*middleware: Middleware) -> Starlette:
    """Make an app whose stream is Starlette's own."""

    async def events() -> AsyncIterator[str]:
        yield "data: 1\n\n"
        await asyncio.Event().wait()

    async def endpoint(request: Any) -> StreamingResponse:
        return StreamingResponse(events(), media_type="text/event-stream")

    return Starlette(routes=[Route("/", endpoint)], middleware=middleware)


@asynccontextmanager
async def following(server: Server, path: str = "/") -> AsyncIterator[AsyncIterator[str]]:
    """Open an event stream, of which the first event has come."""
    async with (
        httpx.AsyncClient(base_url=server.url, trust_env=False, verify=False) as client,  # noqa: S501
        client.stream("GET", path, headers=EVENTS) as response,
    ):
        lines = response.aiter_lines()
        assert await anext(lines) == "data: 1"
        yield lines


@pytest.mark.parametrize("http", [name for name in ("h11", "httptools", "zttp") if name in HTTP_PROTOCOLS])
@pytest.mark.parametrize("make", [lambda: endless, streaming], ids=["ASGI", "Starlette"])
@pytest.mark.parametrize("swappable", [False, True], ids=["plain", "Swappable"])
async def test_event_stream_ends_with_the_stop(
    http: str, make: Any, swappable: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """There is no budget here that could end it; the client gets the last chunk, and nothing is logged as an error."""
    app = Swappable(make()) if swappable else make()
    async with serving(app, http=http, shutdown_timeout=None) as server, connect(server) as client:
        client.writer.write(b"GET / HTTP/1.1\r\nhost: test\r\naccept: text/html, text/event-stream\r\n\r\n")
        await client.reader.readuntil(b"data: 1\n\n")
        await server.aclose()
        assert (await client.rest()).endswith(b"\r\n0\r\n\r\n")
    assert server.report is not None
    assert not server.report.was_forced
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_event_stream_over_tls_ends_with_the_stop(tls: Any) -> None:
    """As in clear text."""
    options, _ = tls
    async with serving(streaming(), shutdown_timeout=None, **options) as server, following(server) as lines:
        await server.aclose()
        assert [line async for line in lines] == [""]


async def test_event_stream_ends_when_its_app_is_swapped() -> None:
    """The server goes on, and the client sees a proper end."""
    swappable = Swappable(streaming())
    async with serving(swappable) as server, following(server) as lines:
        await swappable.swap(streaming(), shutdown_timeout=None)
        assert [line async for line in lines] == [""]
        async with following(server) as lines:
            await server.aclose()
            assert [line async for line in lines] == [""]


async def test_event_stream_that_begins_during_the_stop_ends_as_well() -> None:
    """Its request was in flight."""
    began, go = asyncio.Event(), asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            began.set()
            await go.wait()
        await endless(scope, receive, send)

    async with serving(app, shutdown_timeout=None) as server, connect(server) as client:
        client.writer.write(b"GET / HTTP/1.1\r\nhost: test\r\naccept: text/event-stream\r\n\r\n")
        await began.wait()
        closing = asyncio.create_task(server.aclose())
        await turns(10)
        go.set()
        await closing
        assert (await client.rest()).endswith(b"data: 1\n\n\r\n0\r\n\r\n")


async def test_event_stream_goes_on_during_the_drain() -> None:
    """Until then, the server still accepts."""
    async with serving(endless, shutdown_timeout=None, drain_delay=1000) as server, connect(server) as client:
        client.writer.write(b"GET / HTTP/1.1\r\nhost: test\r\naccept: text/event-stream\r\n\r\n")
        await client.reader.readuntil(b"data: 1\n\n")
        server.close()
        await turns(10)
        assert server.stats.in_flight == 1
        server.close(timeout=0)
        await server.wait_closed()


@pytest.mark.parametrize("http", ["h11", "httptools"])
@pytest.mark.parametrize(
    "head", [b"GET / HTTP/1.1\r\naccept: */*", b"POST / HTTP/1.1\r\ncontent-length: 0\r\naccept: text/event-stream"]
)
async def test_other_stream_is_not_told_before_its_time(http: str, head: bytes) -> None:
    """A download would be cut short; and with POST, it is the answer to something, which ends by itself."""
    more = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await without_lifespan(scope, receive, send)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        message = asyncio.create_task(wait_for_disconnect(receive))
        await more.wait()
        assert not message.done()
        message.cancel()
        await send({"type": "http.response.body", "body": b"last"})

    async def wait_for_disconnect(receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    async with serving(app, http=http, shutdown_timeout=None) as server, connect(server) as client:
        client.writer.write(head + b"\r\nhost: test\r\n\r\n")
        await client.reader.readuntil(b"first")
        closing = asyncio.create_task(server.aclose())
        await turns(20)
        more.set()
        assert b"last" in await client.rest()
        await closing


async def test_other_stream_that_is_cut_does_not_look_complete() -> None:
    """A client must be able to tell a download that was cut from one that was not."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await without_lifespan(scope, receive, send)
        await endless(scope, receive, send)

    async with serving(app, disconnect_after=0) as server, connect(server) as client:
        client.ask("/")
        await client.reader.readuntil(b"data: 1\n\n")
        await server.aclose()
        assert not (await client.rest()).endswith(b"0\r\n\r\n")


async def test_event_stream_whose_client_reads_slowly_ends_with_the_stop() -> None:
    """What was sent waits in the buffers of both sides; the last chunk comes behind it."""
    size = 8_000_000

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await without_lifespan(scope, receive, send)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"." * size, "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass

    async with serving(app, shutdown_timeout=None) as server, connect(server) as client:
        client.writer.write(b"GET / HTTP/1.1\r\nhost: test\r\naccept: text/event-stream\r\n\r\n")
        await client.reader.readuntil(b"\r\n\r\n")
        closing = asyncio.create_task(server.aclose())
        await turns(20)
        rest = await client.rest()
        assert rest.count(b".") == size
        assert rest.endswith(b"\r\n0\r\n\r\n")
        await closing


async def test_event_stream_behind_middleware_ends_with_the_stop() -> None:
    """BaseHTTPMiddleware runs the app in a task of its own, and passes the disconnect on."""

    class Passing(BaseHTTPMiddleware):
        async def dispatch(self, request: Any, call_next: Any) -> Any:
            return await call_next(request)

    app = streaming(Middleware(Passing))
    async with serving(app, shutdown_timeout=None) as server, following(server) as lines:
        await server.aclose()
        assert [line async for line in lines] == [""]
