"""
sse-starlette: it watches uvicorn's signal handlers, which aioserve does not use; it notices a stop by its disconnect.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import anyio
import httpx
import pytest
from sse_starlette import EventSourceResponse
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import Message

from aioserve import Server, serving
from aioserve.testing import assert_nothing_left
from tests.integration.frameworks import Play, end_sse_starlettes_watcher

# The budget of a stop that has to be forced, in seconds; nothing depends on how long it is.
MOMENT = 0.05


@pytest.fixture
async def nothing_is_left_in_the_loop() -> AsyncIterator[None]:
    """Check as everywhere, except for the threads of the loop, which run synchronous generators."""
    async with assert_nothing_left():
        yield
        await end_sse_starlettes_watcher()


def make(play: Play) -> Starlette:
    async def forever() -> AsyncIterator[str]:
        try:
            yield "hello"
            play.holding.set()
            await asyncio.Event().wait()
        finally:
            play.note("generator over")

    async def has_gone(message: Message) -> None:
        play.note("client has gone")

    async def work() -> None:
        play.note("background over")

    async def unaware(request: Request) -> EventSourceResponse:
        return EventSourceResponse(forever(), client_close_handler_callable=has_gone, background=BackgroundTask(work))

    async def aware(request: Request) -> EventSourceResponse:
        stopping: anyio.Event = request.state.aioserve.stopping

        async def until_stopping() -> AsyncIterator[str]:
            yield "hello"
            play.holding.set()
            await stopping.wait()
            await play.hold()
            yield "the end"

        return EventSourceResponse(until_stopping())

    async def synchronous(request: Request) -> EventSourceResponse:
        def ticks() -> Iterator[str]:
            yield "hello"
            while not play.is_over(MOMENT):
                yield "tick"

        return EventSourceResponse(ticks())

    return Starlette(
        routes=[Route("/unaware", unaware), Route("/aware", aware), Route("/synchronous", synchronous)],
    )


async def events_of(response: httpx.Response) -> AsyncIterator[str]:
    async for line in response.aiter_lines():
        if line.startswith("data: "):
            yield line.removeprefix("data: ")


def client_of(server: Server) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=server.url, trust_env=False, verify=False)  # noqa: S501


async def test_event_stream_that_watches_stopping_sends_a_last_event(loop_name: str) -> None:
    """It may take its time, and its client gets a complete response."""
    play = Play()
    async with serving(make(play), shutdown_timeout=None) as server, client_of(server) as client:
        async with client.stream("GET", "/aware") as response:
            events = events_of(response)
            assert await anext(events) == "hello"
            await play.holding.wait()
            server.close()
            play.release()
            assert [event async for event in events] == ["the end"]
        await server.wait_closed()
    assert server.report is not None
    assert not server.report.was_forced


@pytest.mark.parametrize("path", ["/unaware", "/synchronous"])
async def test_event_stream_of_a_browser_ends_with_the_stop(path: str, loop_name: str) -> None:
    """Its client sees a complete response. For one server after the other."""
    for _ in range(2):
        play = Play()
        async with serving(make(play), shutdown_timeout=None) as server, client_of(server) as client:
            async with client.stream("GET", path, headers={"accept": "text/event-stream"}) as response:
                events = events_of(response)
                assert await anext(events) == "hello"
                server.close()
                assert {event async for event in events} <= {"tick"}
            await server.wait_closed()
        if path == "/unaware":
            assert sorted(play.events) == ["background over", "client has gone", "generator over"]
        assert server.report is not None
        assert not server.report.was_forced


@pytest.mark.parametrize("path", ["/unaware", "/synchronous"])
async def test_disconnect_after_ends_an_event_stream_that_does_not_watch_stopping(path: str, loop_name: str) -> None:
    """For one server after the other: the end of the first one does not end the streams of the next one."""
    for _ in range(2):
        play = Play()
        async with (
            serving(make(play), shutdown_timeout=None, disconnect_after=0) as server,
            client_of(server) as client,
        ):
            async with client.stream("GET", path) as response:
                events = events_of(response)
                assert await anext(events) == "hello"
                server.close()
                with pytest.raises(httpx.RemoteProtocolError):
                    async for _event in events:
                        pass
            await server.wait_closed()
        if path == "/unaware":
            assert sorted(play.events) == ["background over", "client has gone", "generator over"]
        assert server.report is not None
        assert not server.report.was_forced


@pytest.mark.usefixtures("short_grace")
async def test_event_stream_ends_when_the_budget_is_over(loop_name: str) -> None:
    play = Play()
    async with serving(make(play), shutdown_timeout=MOMENT) as server, client_of(server) as client:
        async with client.stream("GET", "/unaware") as response:
            events = events_of(response)
            assert await anext(events) == "hello"
            await server.aclose()
            with pytest.raises(httpx.RemoteProtocolError):
                async for _ in events:
                    pass
    assert server.report is not None
    (handler,) = server.report.disconnected
    assert (handler.method, handler.path) == ("GET", "/unaware")
    assert (server.report.aborted, server.report.cancelled) == (0, ())
    assert "generator over" in play.events
