"""
`cancel_on_disconnect`: the handler of a request whose client has gone is cancelled, if the server is asked to.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import StreamingResponse
from uvicorn.config import HTTP_PROTOCOLS

from aioserve import Swappable, serving, start
from tests.helpers import not_portable
from tests.helpers.apps import App, AppError, Receive, Scope, Send
from tests.helpers.clients import PIPELINING, REQUEST, UPGRADE, connect, connect_tls
from tests.helpers.turns import MOMENT, turns

PROTOCOLS = [name for name in HTTP_PROTOCOLS if name != "auto"]
FEW = 20  # turns of the loop, in which something that is not to happen would happen


class Cleaning(App):
    """An app whose handlers of "/hold" clean up when they are cancelled."""

    def __init__(self) -> None:
        super().__init__()
        self.cancelled = asyncio.Event()
        self.may_end = asyncio.Event()

    async def request(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().request(scope, receive, send)
        except asyncio.CancelledError:
            self.cancelled.set()
            await self.may_end.wait()
            self.events.append("cleaned up")
            raise


def nothing_is_logged(caplog: pytest.LogCaptureFixture) -> bool:
    return [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("http", PROTOCOLS)
@pytest.mark.parametrize("swappable", [False, True])
async def test_handler_is_cancelled_and_cleans_up(http: str, swappable: bool, caplog: pytest.LogCaptureFixture) -> None:
    """uvicorn has no word for it in the log, since it is no mistake of the app's; and others are answered."""
    app = Cleaning()
    served: Any = Swappable(app) if swappable else app
    async with serving(served, http=http, cancel_on_disconnect=True) as server, connect(server) as other:
        async with connect(server) as client:
            client.ask("/hold")
            await app.holding.wait()
        await app.cancelled.wait()
        other.ask("/")
        assert (await other.answer()).startswith(b"HTTP/1.1 200 ")
        app.may_end.set()
    assert "cleaned up" in app.events
    assert nothing_is_logged(caplog)


@pytest.mark.parametrize("http", PROTOCOLS)
async def test_handler_runs_on_by_default(http: str) -> None:
    """As in uvicorn: what it does may be worth it for others."""
    app = App()
    async with serving(app, http=http) as server:
        async with connect(server) as client:
            client.ask("/hold")
            await app.holding.wait()
        while server.stats.connections:
            await asyncio.sleep(0)
        await turns(FEW)
        app.release.set()
    assert "answered /hold" in app.events


async def test_clean_up_is_awaited_in_a_stop(caplog: pytest.LogCaptureFixture) -> None:
    """And the lifespan ends after it."""
    app = Cleaning()
    server = await start(app, cancel_on_disconnect=True)
    async with connect(server) as client:
        client.ask("/hold")
        await app.holding.wait()
    await app.cancelled.wait()
    closing = asyncio.create_task(server.aclose())
    await turns(FEW)
    assert not closing.done()
    app.may_end.set()
    await closing
    assert app.events[-3:] == ["cleaned up", "shutdown", "lifespan over"]
    assert server.report is not None
    assert not server.report.was_forced
    assert nothing_is_logged(caplog)


@pytest.mark.usefixtures("short_grace")
async def test_handler_that_a_stop_has_cancelled_is_not_disturbed_in_its_clean_up() -> None:
    """Its connection is dropped then, and that is no reason to cancel it once more."""
    app = Cleaning()
    async with serving(app, cancel_on_disconnect=True, shutdown_timeout=0) as server, connect(server) as client:
        client.ask("/hold")
        await app.holding.wait()
        closing = asyncio.create_task(server.aclose())
        await app.cancelled.wait()
        await client.rest()
        await turns(FEW)
        app.may_end.set()
        await closing
    assert "cleaned up" in app.events


async def test_clean_up_is_not_disturbed_by_a_stop_that_is_forced() -> None:
    """It was cancelled just now, and has its second for that, as a handler that the stop cancels."""
    app = Cleaning()
    server = await start(app, cancel_on_disconnect=True)
    async with connect(server) as client:
        client.ask("/hold")
        await app.holding.wait()
    await app.cancelled.wait()
    server.close(timeout=0)
    await turns(FEW)
    app.may_end.set()
    await server.wait_closed()
    assert app.events[-3:] == ["cleaned up", "shutdown", "lifespan over"]


@pytest.mark.usefixtures("short_grace")
async def test_handler_that_goes_on_is_cancelled_again_by_force() -> None:
    """When it has had its time."""
    cancellations = 0

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal cancellations
        began.set()
        while cancellations < 2:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancellations += 1
                began.set()

    began = asyncio.Event()
    server = await start(app, lifespan="off", cancel_on_disconnect=True, shutdown_timeout=2 * MOMENT)
    async with connect(server) as client:
        client.ask("/")
        await began.wait()
        began.clear()
    await began.wait()
    await server.aclose()
    assert cancellations == 2


async def test_client_that_goes_in_a_stop_ends_it_soon() -> None:
    """Nobody waits for the answer."""
    app = Cleaning()
    app.may_end.set()
    server = await start(app, cancel_on_disconnect=True, shutdown_timeout=None)
    async with connect(server) as client:
        client.ask("/hold")
        await app.holding.wait()
        closing = asyncio.create_task(server.aclose())
        await turns(FEW)
        assert not closing.done()
    await closing
    assert "cleaned up" in app.events


async def test_handler_behind_http_middleware_is_cancelled(caplog: pytest.LogCaptureFixture) -> None:
    """`BaseHTTPMiddleware` runs the app in a task of its own, and hides the disconnect from it."""
    app = FastAPI()
    began, ended = asyncio.Event(), asyncio.Event()

    async def through(request: Any, call_next: Any) -> Any:
        return await call_next(request)

    app.add_middleware(BaseHTTPMiddleware, dispatch=through)
    app.add_middleware(BaseHTTPMiddleware, dispatch=through)

    @app.get("/")
    async def endpoint() -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with serving(app, cancel_on_disconnect=True) as server:
        async with connect(server) as client:
            client.ask("/")
            await began.wait()
        await ended.wait()
    assert nothing_is_logged(caplog)


@pytest.mark.parametrize("http", PROTOCOLS)
async def test_streams_are_cancelled(http: str, caplog: pytest.LogCaptureFixture) -> None:
    """Also where the response has begun, and the app sends without looking for a disconnect."""
    ended = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            while True:
                await send({"type": "http.response.body", "body": b"x" * 1000, "more_body": True})
                await asyncio.sleep(0)
        finally:
            ended.set()

    async with serving(app, http=http, lifespan="off", cancel_on_disconnect=True) as server:
        async with connect(server) as client:
            client.ask("/")
            await client.reader.readuntil(b"xxx")
        await ended.wait()
    assert nothing_is_logged(caplog)


async def test_streaming_response_is_cancelled_once(caplog: pytest.LogCaptureFixture) -> None:
    """Starlette's own watches for the disconnect as well."""
    ends = []

    async def numbers() -> Any:
        try:
            while True:
                yield b"1"
                await asyncio.sleep(0)
        finally:
            ends.append(1)

    app = FastAPI()

    @app.get("/")
    async def endpoint() -> StreamingResponse:
        return StreamingResponse(numbers())

    async with serving(app, cancel_on_disconnect=True) as server:
        async with connect(server) as client:
            client.ask("/")
            await client.reader.readuntil(b"1")
        while not ends:
            await asyncio.sleep(0)
    assert ends == [1]
    assert nothing_is_logged(caplog)


async def test_handler_is_cancelled_over_tls(tls: Any) -> None:
    """As in clear text."""
    app = Cleaning()
    app.may_end.set()
    options, context = tls
    async with serving(app, cancel_on_disconnect=True, **options) as server:
        async with connect_tls(server, context) as client:
            client.ask("/hold")
            await app.holding.wait()
        await app.cancelled.wait()


@not_portable.unix_sockets
async def test_handler_is_cancelled_on_a_unix_socket(tmp_path: Path) -> None:
    """As on TCP."""
    app = Cleaning()
    app.may_end.set()
    async with serving(app, uds=tmp_path / "app.sock", cancel_on_disconnect=True) as server:
        async with connect(server) as client:
            client.ask("/hold")
            await app.holding.wait()
        await app.cancelled.wait()


@pytest.mark.parametrize("http", PIPELINING)
async def test_client_that_goes_behind_pipelined_requests_has_no_line_in_the_access_log(
    http: str, caplog: pytest.LogCaptureFixture
) -> None:
    """None of them was answered, with 500 or anything else."""
    caplog.set_level("INFO", "uvicorn.access")
    told = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["type"] != "http.disconnect":  # so that the connection is read
            told.set()
        await asyncio.Event().wait()

    async with serving(app, http=http, lifespan="off", cancel_on_disconnect=True) as server:
        async with connect(server) as client:
            client.writer.write(REQUEST % b"/one" + REQUEST % b"/two")
            await told.wait()
    assert [record.getMessage() for record in caplog.records if record.name == "uvicorn.access"] == []


@pytest.mark.parametrize("http", PIPELINING)
async def test_handler_with_an_upgrade_behind_it_is_not_cancelled(http: str) -> None:
    """Its client is there, though uvicorn gives the connection to another protocol before it has its answer."""
    app = App()
    async with serving(app, http=http, cancel_on_disconnect=True) as server, connect(server) as client:
        client.writer.write(REQUEST % b"/hold" + UPGRADE)
        await app.holding.wait()
        await turns(FEW)
        app.release.set()
        assert b"HTTP/1.1 200 " in await client.answer()


@pytest.mark.parametrize("middleware", [False, True])
def test_handler_in_a_thread_is_cancelled_when_the_thread_is_done(middleware: bool) -> None:
    """Before, the thread would be left behind, where neither anyio's limit nor a stop knows of it."""
    app = FastAPI()
    began, ended = threading.Event(), threading.Event()
    cancelled: list[str] = []

    if middleware:

        @app.middleware("http")
        async def through(request: Any, call_next: Any) -> Any:
            return await call_next(request)

    def work() -> None:
        began.set()
        ended.wait(20)

    @app.get("/")
    async def endpoint() -> None:
        await run_in_threadpool(work)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append("behind the thread")
            raise

    async def main() -> None:
        server = await start(app, cancel_on_disconnect=True)
        try:
            async with connect(server) as client:
                client.ask("/")
                while not began.is_set():
                    await asyncio.sleep(0)
            while server.stats.connections:
                await asyncio.sleep(0)
            await turns(FEW)
            assert server.stats.in_flight == 1
            closing = asyncio.create_task(server.aclose())
            await turns(FEW)
            assert not closing.done()
        finally:
            ended.set()
        await closing
        assert server.report is not None
        assert not server.report.was_forced

    asyncio.run(main())  # a loop of its own: the worker thread lives as long as its loop
    assert cancelled == ["behind the thread"]


async def test_mistake_of_the_app_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """What it raises in place of the cancellation is its own."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise AppError from None

    began = asyncio.Event()
    async with serving(app, lifespan="off", cancel_on_disconnect=True) as server:
        async with connect(server) as client:
            client.ask("/")
            await began.wait()
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [AppError]


async def test_answered_requests_are_not_cancelled() -> None:
    """A handler may work on behind its response, as Starlette's background tasks do."""
    done = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
        await send({"type": "http.response.body", "body": b"hello"})
        while server.stats.connections:
            await asyncio.sleep(0)
        await turns(FEW)
        done.set()

    async with serving(app, lifespan="off", cancel_on_disconnect=True) as server:
        async with connect(server) as client:
            client.ask("/")
            await client.answer()
        await done.wait()


async def test_wrong_values_are_refused() -> None:
    """In one sentence."""
    with pytest.raises(TypeError, match="cancel_on_disconnect must be bool, not 1"):
        await start(App(), cancel_on_disconnect=1)  # type: ignore[arg-type]
