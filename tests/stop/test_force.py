"""
Force: when the budget is over, handlers are cancelled and awaited, and connections are dropped.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import threading
from typing import Any

import pytest
from fastapi import FastAPI
from websockets.asyncio.client import connect as connect_websocket

import aioserve
from aioserve import serving, start
from tests.helpers.apps import App
from tests.helpers.clients import (
    connect,
)

pytestmark = pytest.mark.usefixtures("short_grace")


async def test_handlers_are_cancelled_and_awaited_when_the_budget_is_over(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The lifespan ends after the last of them; one line in the log says what was forced."""
    app = App()

    async with serving(app, shutdown_timeout=0.01) as server, connect(server) as connection:
        connection.ask("/hold")
        await app.holding.wait()

    assert app.events == ["startup", "GET /hold", "cancelled /hold", "shutdown", "lifespan over"]
    (line,) = (record.message for record in caplog.records if record.levelno >= logging.WARNING)
    assert re.fullmatch(
        rf"{server.url}: forced shutdown: 0 handlers disconnected, 1 cancelled, 0 connections dropped "
        r"\(GET /hold from 127\.0\.0\.1:\d+, waiting at App\.request \(.*apps\.py:\d+\)\); let long handlers watch "
        r"server\.stopping, or set disconnect_after",
        line,
    )
    report = server.report
    assert report is not None
    (handler,) = report.cancelled
    assert (handler.method, handler.path) == ("GET", "/hold")
    assert not handler.stuck
    assert handler.where[0].startswith("RequestResponseCycle.run_asgi (")
    assert handler.where[-1].startswith("Event.wait (")


async def test_endless_stream_is_cut_off_when_the_budget_is_over() -> None:
    """It does not block the stop."""
    async with serving(App(), shutdown_timeout=0.01) as server, connect(server) as connection:
        connection.ask("/stream")
        await connection.reader.readuntil(b"data: 0\n\n")
        await server.aclose()
        await connection.rest()


async def test_connection_whose_client_never_reads_is_dropped_when_the_budget_is_over(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whatever was still to be sent."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        writing.set()
        while True:
            await send({"type": "http.response.body", "body": bytes(1_000_000), "more_body": True})

    writing = asyncio.Event()
    async with serving(app, shutdown_timeout=0.01) as server, connect(server) as connection:
        transport: Any = connection.writer.transport
        transport.pause_reading()
        connection.ask("/")
        await writing.wait()
        await server.aclose()

    assert "1 cancelled," in caplog.text


async def test_handler_that_swallows_its_cancellation_does_not_block_the_stop(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It goes on by itself, the log says so, and the lifespan ends without it."""
    app = App()

    async with serving(app, shutdown_timeout=0) as server, connect(server) as connection:
        connection.ask("/cling")
        await app.holding.wait()
        (handler,) = server.uvicorn.server_state.tasks
        await server.aclose()
        assert "which is still running" in caplog.text
        assert app.events[-2:] == ["shutdown", "lifespan over"]
        app.release.set()
        await asyncio.wait({handler})


async def test_deadline_of_close_can_only_shorten_the_budget() -> None:
    """A later one than the server's own changes nothing, an earlier one does, also after other calls."""
    app = App()

    async with serving(app, shutdown_timeout=None) as server, connect(server) as connection:
        connection.ask("/hold")
        await app.holding.wait()
        server.close(timeout=3600)
        server.close(timeout=0.01)
        server.close(timeout=7200)
        await server.wait_closed()

    assert "cancelled /hold" in app.events


async def test_close_with_timeout_0_forces_the_stop() -> None:
    """Every handler is cancelled at once, and awaited; the lifespan still ends in an orderly way."""
    app = App()

    async with serving(app, shutdown_timeout=None) as server, connect(server) as connection:
        connection.ask("/hold")
        await app.holding.wait()
        server.close(timeout=0)
        await server.wait_closed()

    assert app.events == ["startup", "GET /hold", "cancelled /hold", "shutdown", "lifespan over"]


@pytest.mark.parametrize("level", [logging.ERROR, logging.CRITICAL])
async def test_cancelled_handler_is_not_logged_as_an_exception_of_the_app(
    level: int, caplog: pytest.LogCaptureFixture
) -> None:
    """
    uvicorn logs no traceback for it; other exceptions that it raises meanwhile are logged, if the logger's level
    allows.
    """
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
    caplog.handler.setLevel(logging.NOTSET)  # from other loggers, everything is recorded
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
    assert not any(record.pathname.startswith(os.path.dirname(aioserve.__file__)) for record in failed), (
        "These lines are uvicorn's, not aioserve's."
    )


def test_synchronous_endpoint_stuck_in_its_thread_does_not_block_the_stop() -> None:
    """Its thread cannot be cancelled, but its task can; and the report says where the task was."""
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

    asyncio.run(main())  # a loop of its own: the worker thread lives as long as its loop
