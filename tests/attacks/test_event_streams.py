"""
Event streams that cannot be ended properly: one that has said how long it is, and one whose client does not read.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import pytest

from aioserve import Swappable, serving
from tests.helpers.apps import App, Receive, Scope, Send, without_lifespan
from tests.helpers.clients import PIPELINING, connect, get
from tests.helpers.turns import turns

pytestmark = pytest.mark.usefixtures("short_grace")

LENGTH = 1000
FIRST = b"data: 1\n\n"
HEADS = {
    "HTTP/1.1": b"GET / HTTP/1.1\r\nhost: test\r\naccept: text/event-stream\r\n\r\n",
    "HTTP/1.0": b"GET / HTTP/1.0\r\naccept: text/event-stream\r\n\r\n",
    "kept-alive HTTP/1.0": b"GET / HTTP/1.0\r\nconnection: keep-alive\r\naccept: text/event-stream\r\n\r\n",
}
# What uvicorn logs of a response that was cut.
CUT = "ASGI callable returned without completing response."

each_head = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
each_http = pytest.mark.parametrize("http", PIPELINING)


def streaming(*, length: int | None) -> Any:
    """Make an app that sends an event and waits for the disconnect; perhaps it has announced more than it sends."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await without_lifespan(scope, receive, send)
        headers = [(b"content-type", b"text/event-stream")]
        if length is not None:
            headers.append((b"content-length", b"%d" % length))
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": FIRST, "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass

    return app


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@each_http
@each_head
@pytest.mark.parametrize("length", [None, LENGTH, len(FIRST)], ids=["chunked", "too long", "exact"])
@pytest.mark.parametrize("swappable", [False, True], ids=["plain", "Swappable"])
async def test_event_stream_of_any_length_ends_with_the_stop(
    http: str, head: bytes, length: int | None, swappable: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """One that is shorter than announced is cut, and that is no error of the app's and no use of force."""
    app = streaming(length=length)
    async with serving(Swappable(app) if swappable else app, http=http, shutdown_timeout=None) as server:
        async with connect(server) as client:
            client.writer.write(head)
            start = await client.reader.readuntil(FIRST)
            async with asyncio.timeout(10):
                await server.aclose()
            assert await client.rest() == (b"\r\n0\r\n\r\n" if b"chunked" in start else b"")
    assert server.report is not None
    assert not server.report.was_forced
    assert logged(caplog) == []


@each_head
@pytest.mark.parametrize(
    ("http", "length"),
    [
        ("h11", None),
        ("h11", LENGTH),
        ("h11", len(FIRST)),
        ("httptools", None),
        ("httptools", len(FIRST)),
    ],
)
async def test_event_stream_of_any_length_ends_when_its_app_is_swapped(
    http: str, head: bytes, length: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    """The swap waits for it, and the new app answers."""
    swappable = Swappable(streaming(length=length))
    async with serving(swappable, http=http) as server, connect(server) as client:
        client.writer.write(head)
        await client.reader.readuntil(FIRST)
        async with asyncio.timeout(10):
            await swappable.swap(App(), shutdown_timeout=None)
        assert (await get(server)).text == "hello"
    assert logged(caplog) == []
    assert server.report is not None
    assert not server.report.was_forced


@each_http
@pytest.mark.parametrize("timeout", [0, 0.1])
async def test_swap_does_not_wait_longer_for_an_event_stream_whose_client_does_not_read(
    http: str, timeout: float, caplog: pytest.LogCaptureFixture
) -> None:
    """Its handler hangs in `send()`; it is cancelled, and has ended when the swap returns."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await without_lifespan(scope, receive, send)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        sending.set()
        try:
            while True:
                await send({"type": "http.response.body", "body": bytes(1_000_000), "more_body": True})
        finally:
            ended.set()

    sending, ended = asyncio.Event(), asyncio.Event()
    swappable = Swappable(app)
    async with serving(swappable, http=http) as server, connect(server) as client:
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        client.writer.write(HEADS["HTTP/1.1"])
        await sending.wait()
        await turns()
        began = time.monotonic()
        await swappable.swap(App(), shutdown_timeout=timeout)
        assert time.monotonic() - began < timeout + 2
        assert ended.is_set()
        assert (await get(server)).text == "hello"
        client.writer.transport.abort()
    (line,) = (each for each in logged(caplog) if each != CUT)
    assert line.startswith("the replaced app: forced shutdown: 0 handlers disconnected, 1 cancelled, ")
    assert "still running" not in line


@each_http
async def test_swap_does_not_wait_for_the_end_of_a_stream_whose_client_does_not_read(
    http: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The handler has returned; the last chunk, which the `Swappable` sends, waits for the client."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await without_lifespan(scope, receive, send)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        sending = asyncio.ensure_future(
            send({"type": "http.response.body", "body": bytes(20_000_000), "more_body": True})
        )
        while (await receive())["type"] != "http.disconnect":
            waiting.set()
        sending.cancel()
        returned.set()

    waiting, returned = asyncio.Event(), asyncio.Event()
    swappable = Swappable(app)
    async with serving(swappable, http=http) as server, connect(server) as client:
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        client.writer.write(HEADS["HTTP/1.1"])
        await waiting.wait()
        await turns()
        began = time.monotonic()
        await swappable.swap(App(), shutdown_timeout=0.1)
        assert time.monotonic() - began < 2
        assert returned.is_set()
        assert (await get(server)).text == "hello"
        client.writer.transport.abort()
    assert [line for line in logged(caplog) if "still running" in line] == []
