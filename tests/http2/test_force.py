"""
What a stop with HTTP/2 does when its time is over: handlers are cancelled, and what is left is dropped and reported.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from aioserve import ServerCrashedError, serving, start
from tests.helpers.http2 import StreamApp, connect, http2_context, needs_http2
from tests.helpers.turns import MOMENT, turns

pytestmark = [needs_http2, pytest.mark.usefixtures("short_grace")]

STREAMS = 5


async def test_handlers_of_all_streams_are_cancelled_and_reported_when_the_budget_is_over() -> None:
    app = StreamApp()
    async with serving(app, http2=True, shutdown_timeout=MOMENT) as server, connect(server) as client:
        for _ in range(STREAMS):
            client.ask("/hold")
        await app.come(STREAMS)
        server.close()
        await client.is_told()
    assert [each.status for each in client.answers.values()] == [500] * STREAMS
    assert app.events.count("cancelled /hold") == STREAMS
    assert server.report is not None
    assert len(server.report.cancelled) == STREAMS
    assert {each.path for each in server.report.cancelled} == {"/hold"}


async def test_stream_whose_answer_has_begun_is_reset_when_the_budget_is_over() -> None:
    app = StreamApp()
    async with serving(app, http2=True, shutdown_timeout=MOMENT) as server, connect(server) as client:
        stream = client.ask("/stream")
        await client.until(lambda: client.answers[stream].body)
        server.close()
        await client.is_told()
    assert client.answers[stream].error_code is not None
    assert server.report is not None
    assert len(server.report.cancelled) == 1


@pytest.mark.parametrize("with_tls", [False, True])
async def test_close_at_once_cancels_all_streams(with_tls: bool, request: pytest.FixtureRequest) -> None:
    app = StreamApp()
    options, context = {}, None
    if with_tls:
        options, trusting = request.getfixturevalue("tls")
        context = http2_context(trusting)
    async with serving(app, http2=True, **options) as server, connect(server, context) as client:
        for _ in range(STREAMS):
            client.ask("/hold")
        await app.come(STREAMS)
        server.close(timeout=0)
        await client.end()
    assert app.events.count("cancelled /hold") == STREAMS
    assert server.report is not None
    assert len(server.report.cancelled) == STREAMS


async def test_handlers_that_ignore_their_cancellation_are_left_behind_and_reported() -> None:
    app = StreamApp()
    async with serving(app, http2=True, shutdown_timeout=0) as server, connect(server) as client:
        for _ in range(STREAMS):
            client.ask("/cling")
        await app.come(STREAMS)
        server.close()
        await client.end()
        await server.wait_closed()
        assert server.report is not None
        assert len(server.report.cancelled) == STREAMS
        assert all(each.stuck for each in server.report.cancelled)
        assert server.report.aborted == 1
        app.release.set()
        await turns()


@pytest.mark.parametrize("path", ["/big", "/big-hold"])
async def test_answer_that_the_client_does_not_take_is_dropped_at_the_budget_and_counted(path: str) -> None:
    app = StreamApp()
    app.release.set()
    async with serving(app, http2=True, shutdown_timeout=MOMENT) as server:
        async with connect(server, window=1000, gives_credit=False) as client:
            stream = client.ask(path)
            await client.until(lambda: len(client.answers[stream].body) == 1000)
            server.close()
            await client.end()
    assert server.report is not None
    assert server.report.aborted == 1
    assert not server.report.cancelled


async def test_handlers_that_raise_in_the_stop_are_answered_with_500(caplog: pytest.LogCaptureFixture) -> None:
    app = StreamApp()
    async with serving(app, http2=True) as server, connect(server) as client:
        for path in ("/raise", "/hold", "/raise"):
            client.ask(path)
        await app.come(3)
        server.close()
        await turns()
        app.release.set()
        await client.is_told()
    assert [each.status for each in client.answers.values()] == [500, 200, 500]
    assert client.all_is_answered()
    assert caplog.text.count("\nZeroDivisionError") == 2
    assert server.report is not None
    assert not server.report.was_forced


@pytest.mark.parametrize("cancellations", [1, 2])
async def test_cancelled_block_answers_its_streams_and_one_cancelled_twice_cancels_them(cancellations: int) -> None:
    app = StreamApp()
    started: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    async def serve() -> None:
        async with serving(app, http2=True) as server:
            started.set_result(server)
            await asyncio.Event().wait()

    task = asyncio.create_task(serve())
    server = await started
    async with connect(server) as client:
        for _ in range(STREAMS):
            client.ask("/hold")
        await app.come(STREAMS)
        for _ in range(cancellations):
            task.cancel()
            await turns()
        if cancellations == 1:
            app.release.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        await client.end()
    assert client.all_is_answered()
    assert app.events.count("cancelled /hold") == (STREAMS if cancellations == 2 else 0)


async def test_crash_of_the_app_stops_the_server_with_streams_in_flight() -> None:
    app = StreamApp()
    async with contextlib.AsyncExitStack() as clients:
        with pytest.raises(ServerCrashedError):
            async with serving(app, http2=True) as server:
                client = await clients.enter_async_context(connect(server))
                client.ask("/hold")
                await app.come(1)
                app.crash.set()
                app.release.set()
                await asyncio.Event().wait()
        await client.end()
        assert client.all_is_answered()


async def test_second_close_shortens_the_first() -> None:
    app = StreamApp()
    server = await start(app, http2=True, shutdown_timeout=None)
    async with connect(server) as client:
        client.ask("/hold")
        await app.come(1)
        server.close()
        await turns()
        server.close(timeout=0)
        await server.wait_closed()
        await client.end()
    assert server.report is not None
    assert len(server.report.cancelled) == 1
