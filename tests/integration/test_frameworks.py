"""
Unchanged apps of common frameworks: what they can do, and what happens to it during a stop.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import re
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple, Unpack

import anyio
import httpx
import pytest
import websockets
from websockets.asyncio.client import connect as connect_websocket

from aioserve import Options, Server, ShutdownError, serving, start
from aioserve.testing import assert_nothing_left
from tests.helpers.clients import Connection, connect
from tests.helpers.turns import turns
from tests.integration.frameworks import (
    FIRST,
    LAST,
    Play,
    received,
    with_django,
    with_fastapi,
    with_flask,
    with_litestar,
    with_quart,
    with_starlette,
)

# Django 5.2, the newest version for Python 3.11, does not close the body of a request that is cancelled.
pytestmark = pytest.mark.filterwarnings("ignore:Unclosed file <tempfile.SpooledTemporaryFile:ResourceWarning")

# What is sent in one chunk, and what in many.
LETTER = b"dear all\n" * 1000
PARCEL = bytes(range(256)) * 32768

# How long threads may take to end, in seconds.
ENDING_THREADS = 5.0


class Framework(NamedTuple):
    make: Callable[[Play], Any]
    has: frozenset[str]
    options: Options


# What every framework has, and what only some have. Django has no lifespan and, by itself, no WebSocket, nor has WSGI;
# and for Flask behind a2wsgi, a body of unknown length is empty.
EVERY = frozenset({"json", "form", "body", "sync", "stream", "events"})
ASYNC = EVERY | {"hold", "endless", "body of unknown length"}
ALL = ASYNC | {"lifespan", "websocket", "background"}

FRAMEWORKS = {
    "starlette": Framework(with_starlette.make, ALL, {}),
    "fastapi": Framework(with_fastapi.make, ALL, {}),
    "litestar": Framework(with_litestar.make, ALL, {}),
    "quart": Framework(with_quart.make, ALL, {}),
    "django": Framework(with_django.make, ASYNC, {}),
    "flask": Framework(with_flask.make, EVERY, {"interface": "wsgi"}),
}


def those_with(*features: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", [name for name, each in FRAMEWORKS.items() if each.has.issuperset(features)])


@pytest.fixture
async def nothing_is_left_in_the_loop() -> AsyncIterator[None]:
    """Check as everywhere, except for the pools of threads of the loop, which run synchronous functions."""
    async with assert_nothing_left():
        yield
        # Two kinds of threads are not awaited. The threads of a2wsgi's pool end when the pool is garbage; they may need
        # the loop before that. And asgiref, of Django, has one thread that waits for another.
        with anyio.move_on_after(ENDING_THREADS):
            while any(re.match(r"WSGI|.*\(join\)$", thread.name) for thread in threading.enumerate()):
                gc.collect()
                await asyncio.sleep(0)


@asynccontextmanager
async def playing(name: str, **options: Unpack[Options]) -> AsyncIterator[tuple[Play, Server]]:
    """Serve the app of a framework; at the end, let all of its handlers go."""
    framework = FRAMEWORKS[name]
    play = Play()
    both: Options = {**framework.options, **options}
    async with serving(framework.make(play), **both) as server:
        try:
            yield play, server
        finally:
            play.release()


def client_of(server: Server) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=server.url, trust_env=False, verify=False)  # noqa: S501


def assert_nothing_was_forced(server: Server) -> None:
    assert server.report is not None
    assert not server.report.was_forced


async def split(connection: Connection) -> tuple[str, bytes]:
    """Return head and body of the last response on a connection, with the chunks of the body joined."""
    head, _, rest = (await connection.rest()).partition(b"\r\n\r\n")
    lines = head.decode().lower()
    if "transfer-encoding: chunked" not in lines:
        return lines, rest
    body = b""
    while True:
        size, _, rest = rest.partition(b"\r\n")
        if not int(size, 16):
            assert rest == b"\r\n"
            return lines, body
        body += rest[: int(size, 16)]
        rest = rest[int(size, 16) + 2 :]


# What the frameworks can do.


@those_with("json")
async def test_framework_answers_with_json(name: str, loop_name: str) -> None:
    async with playing(name) as (_, server), client_of(server) as client:
        response = await client.get("/json")
        assert response.json() == {"hello": "world"}
        assert response.headers["content-type"].startswith("application/json")
    assert_nothing_was_forced(server)


@those_with("form")
@pytest.mark.parametrize("file", [LETTER, PARCEL], ids=["small", "large"])
async def test_framework_receives_a_form_with_a_file(name: str, file: bytes, loop_name: str) -> None:
    """A large one is kept in a file meanwhile, which is written to in a thread."""
    async with playing(name) as (_, server), client_of(server) as client:
        response = await client.post("/form", data={"name": "Ada"}, files={"file": ("file.bin", file)})
        assert response.json() == {"name": "Ada", **received(file)}
    assert_nothing_was_forced(server)


async def chunks_of(data: bytes) -> AsyncIterator[bytes]:
    for begin in range(0, len(data), 100_000):
        yield data[begin : begin + 100_000]


@those_with("body")
async def test_framework_receives_a_large_body_in_chunks(name: str, loop_name: str) -> None:
    async with playing(name) as (_, server), client_of(server) as client:
        length = {"content-length": str(len(PARCEL))}
        response = await client.post("/body", content=chunks_of(PARCEL), headers=length)
        assert response.json() == received(PARCEL)
    assert_nothing_was_forced(server)


@those_with("body of unknown length")
async def test_framework_receives_a_large_body_of_unknown_length(name: str, loop_name: str) -> None:
    async with playing(name) as (_, server), client_of(server) as client:
        response = await client.post("/body", content=chunks_of(PARCEL))
        assert response.request.headers["transfer-encoding"] == "chunked"
        assert response.json() == received(PARCEL)
    assert_nothing_was_forced(server)


@those_with("stream")
async def test_framework_streams_a_response(name: str, loop_name: str) -> None:
    """The first part arrives before the last has been made."""
    async with playing(name) as (play, server), client_of(server) as client:
        async with client.stream("GET", "/stream") as response:
            body = b""
            async for chunk in response.aiter_bytes():
                body += chunk
                if len(body) == len(FIRST):
                    play.release()
            assert body == FIRST + LAST
    assert_nothing_was_forced(server)


@those_with("websocket")
async def test_framework_answers_over_a_websocket(name: str, loop_name: str) -> None:
    async with playing(name) as (play, server):
        async with connect_websocket(f"{server.url.replace('http', 'ws')}/echo", proxy=None) as client:
            for said in ("hello", "still there?"):
                await client.send(said)
                assert await client.recv() == said
    assert play.events == ["startup", "websocket over", "shutdown"]
    assert_nothing_was_forced(server)


@those_with("lifespan")
async def test_lifespan_of_the_framework_surrounds_all_requests(name: str, loop_name: str) -> None:
    """It has started before the first, it ends once, and what it has prepared is there."""
    async with playing(name) as (play, server), client_of(server) as client:
        assert play.events == ["startup"]
        assert (await client.get("/greeting")).text == "hello"
    assert play.events == ["startup", "shutdown"]


@those_with("background")
async def test_background_task_of_the_framework_runs_after_the_response(name: str, loop_name: str) -> None:
    """The response does not wait for it."""
    async with playing(name) as (play, server):
        async with client_of(server) as client:
            assert (await client.get("/background")).text == "begun"
            await play.holding.wait()
            assert play.events == ["startup"]
    assert play.events == ["startup", "background over", "shutdown"]
    assert_nothing_was_forced(server)


# During a stop.


@pytest.mark.parametrize(
    ("name", "path"),
    [(name, path) for name, each in FRAMEWORKS.items() for path in ("/hold", "/sync") if path[1:] in each.has],
)
async def test_framework_answers_a_request_in_flight_during_a_stop(name: str, path: str, loop_name: str) -> None:
    """The whole response comes, with "connection: close"; whether the handler is a coroutine or runs in a thread."""
    async with playing(name, shutdown_timeout=None) as (play, server), connect(server) as client:
        client.ask(path)
        await play.holding.wait()
        server.close()
        play.release()
        head, body = await split(client)
        assert body == b"held"
        assert "connection: close" in head
        await server.wait_closed()
    assert_nothing_was_forced(server)


@those_with("stream")
async def test_framework_sends_a_download_in_flight_to_its_end(name: str, loop_name: str) -> None:
    async with playing(name, shutdown_timeout=None) as (play, server), client_of(server) as client:
        async with client.stream("GET", "/stream") as response:
            await play.holding.wait()
            server.close()
            play.release()
            assert b"".join([chunk async for chunk in response.aiter_bytes()]) == FIRST + LAST
        await server.wait_closed()
    assert_nothing_was_forced(server)


@those_with("form", "body")
@pytest.mark.parametrize("path", ["/form", "/body"])
async def test_framework_receives_the_rest_of_an_upload_during_a_stop(name: str, path: str, loop_name: str) -> None:
    """The second half is sent while the server is stopping, and the request is answered."""
    request = httpx.Request("POST", f"http://127.0.0.1{path}", content=PARCEL)
    expected = received(PARCEL)
    if path == "/form":
        request = httpx.Request("POST", request.url, data={"name": "Ada"}, files={"file": ("file.bin", PARCEL)})
        expected["name"] = "Ada"
    head = "".join(f"{key}: {value}\r\n" for key, value in request.headers.items())
    body = request.read()

    async with playing(name, shutdown_timeout=None) as (_, server), connect(server) as client:
        client.writer.write(f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body[: len(body) // 2])
        while not server.stats.in_flight:
            await asyncio.sleep(0)
        server.close()
        await client.writer.drain()
        client.writer.write(body[len(body) // 2 :])
        assert json.loads((await split(client))[1]) == expected
        await server.wait_closed()
    assert_nothing_was_forced(server)


@those_with("websocket")
async def test_websocket_of_the_framework_is_closed_with_1012_during_a_stop(name: str, loop_name: str) -> None:
    """Its handler gets the disconnect and ends, before the lifespan does."""
    async with playing(name, shutdown_timeout=None) as (play, server):
        async with connect_websocket(f"{server.url.replace('http', 'ws')}/echo", proxy=None) as client:
            await client.send("hello")
            assert await client.recv() == "hello"
            server.close()
            with pytest.raises(websockets.ConnectionClosed):
                await client.recv()
            assert client.close_code == 1012
            await server.wait_closed()
    assert play.events == ["startup", "websocket over", "shutdown"]
    assert_nothing_was_forced(server)


@those_with("events")
async def test_stream_of_the_framework_that_watches_stopping_ends_properly(name: str, loop_name: str) -> None:
    """It sends a last message, and its client gets a complete response."""
    async with playing(name, shutdown_timeout=None) as (_, server), client_of(server) as client:
        async with client.stream("GET", "/events") as response:
            said = []
            async for line in response.aiter_lines():
                if line:
                    said.append(line)
                    server.close()
            assert said == ["data: hello", "data: the end"]
        await server.wait_closed()
    assert_nothing_was_forced(server)


@those_with("endless")
async def test_disconnect_after_ends_an_endless_stream_of_the_framework(name: str, loop_name: str) -> None:
    """The framework gets the disconnect and ends the stream; the response is cut off."""
    async with playing(name, shutdown_timeout=None, disconnect_after=0) as (play, server), client_of(server) as client:
        async with client.stream("GET", "/endless") as response:
            lines = response.aiter_lines()
            assert await anext(lines) == "data: hello"
            server.close()
            with pytest.raises(httpx.RemoteProtocolError):
                async for _ in lines:
                    pass
        await server.wait_closed()
        assert "stream over" in play.events
    assert_nothing_was_forced(server)


@those_with("background")
async def test_background_task_of_the_framework_completes_during_a_stop(name: str, loop_name: str) -> None:
    """Its response was sent long before the stop; the lifespan waits for the task."""
    async with playing(name, shutdown_timeout=None) as (play, server), client_of(server) as client:
        assert (await client.get("/background")).text == "begun"
        await play.holding.wait()
        server.close()
        while server.is_serving():
            await asyncio.sleep(0)
        assert play.events == ["startup"]
        play.release()
        await server.wait_closed()
    assert play.events == ["startup", "background over", "shutdown"]
    assert_nothing_was_forced(server)


# When the budget is over.

DISCONNECTED, CANCELLED, STUCK = "disconnected", "cancelled", "cancelled, and still running"

# How a handler ends that does not end by itself; a thread is still running in any case, until it has finished.
FATES = {
    "starlette": {"/hold": CANCELLED, "/sync": CANCELLED, "/endless": DISCONNECTED, "/background": CANCELLED},
    "fastapi": {"/hold": CANCELLED, "/sync": CANCELLED, "/endless": DISCONNECTED, "/background": CANCELLED},
    "litestar": {"/hold": CANCELLED, "/sync": CANCELLED, "/endless": DISCONNECTED, "/background": CANCELLED},
    # Quart waits in `receive()` for every request.
    "quart": {"/hold": DISCONNECTED, "/sync": DISCONNECTED, "/endless": DISCONNECTED},
    # So does Django; but it cleans up in a thread, which can take longer than its time. And it waits for its threads.
    "django": {"/hold": f"{DISCONNECTED} or {CANCELLED}", "/endless": f"{DISCONNECTED} or {CANCELLED}", "/sync": STUCK},
    "flask": {"/sync": CANCELLED, "/endless": CANCELLED},
}


@pytest.mark.usefixtures("short_grace")
@pytest.mark.parametrize(("name", "path"), [(name, path) for name, fates in FATES.items() for path in fates])
async def test_handler_of_the_framework_that_exceeds_the_budget_is_ended(
    name: str, path: str, loop_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The report and one line in the log say which handler it was and how it ended, and nothing else is logged."""
    async with playing(name, shutdown_timeout=0.01) as (play, server), connect(server) as client:
        client.ask(path)
        await (client.reader.readuntil(b"hello") if path == "/endless" else play.holding.wait())
        await server.aclose()
        report = server.report
        assert report is not None
        (handler,) = report.disconnected + report.cancelled
        assert (handler.method, handler.path) == ("GET", path)
        fate = DISCONNECTED if report.disconnected else STUCK if handler.stuck else CANCELLED
        assert fate in FATES[name][path].split(" or ")
        assert report.aborted == (FATES[name][path] == STUCK)
        play.release()
    (line,) = (each for each in caplog.records if each.levelno >= logging.WARNING)
    assert line.name == "aioserve"
    assert ": forced shutdown: " in line.message


@pytest.mark.parametrize("name", ["starlette", "fastapi", "litestar"])
async def test_disconnect_after_spares_a_request_that_does_not_wait_in_receive(name: str, loop_name: str) -> None:
    """`disconnect_after` has no effect on it."""
    async with playing(name, shutdown_timeout=None, disconnect_after=0) as (play, server), connect(server) as client:
        client.ask("/hold")
        await play.holding.wait()
        server.close()
        await turns()
        play.release()
        assert (await split(client))[1] == b"held"
        await server.wait_closed()
    assert_nothing_was_forced(server)


@pytest.mark.parametrize("name", ["quart", "django"])
async def test_disconnect_after_cancels_every_request_of_quart_and_django(name: str, loop_name: str) -> None:
    """These frameworks wait in `receive()` for every request, and cancel its handler at a disconnect."""
    async with playing(name, shutdown_timeout=None, disconnect_after=0) as (play, server), connect(server) as client:
        client.ask("/hold")
        await play.holding.wait()
        server.close()
        assert (await split(client))[0].startswith("http/1.1 500")
        await server.wait_closed()
    assert_nothing_was_forced(server)


@pytest.mark.usefixtures("short_grace")
async def test_background_tasks_of_quart_are_bounded_by_the_lifespans_shutdown(loop_name: str) -> None:
    """They belong to no request: one that takes too long is an error of the shutdown."""
    play = Play()
    server = await start(with_quart.make(play), shutdown_timeout=0.01)
    async with client_of(server) as client:
        await client.get("/background")
    await play.holding.wait()
    with pytest.raises(ShutdownError, match="did not shut down within"):
        await server.aclose()
    assert play.events == ["startup"]
    assert_nothing_was_forced(server)
