"""
sse-starlette: it watches uvicorn's signal handlers, which we do not use; so it hears of a stop in other ways.
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

# What a stop gets where it has to be forced, in seconds; nothing depends on how long it is.
MOMENT = 0.05


@pytest.fixture
async def nothing_is_left_in_the_loop() -> AsyncIterator[None]:
    """As everywhere, but for the threads that run synchronous generators: the loop keeps them."""
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
            yield "goodbye"

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


async def test_a_stream_that_watches_our_event_says_goodbye(loop_name: str) -> None:
    """It may take its time; and its client sees a whole response."""
    play = Play()
    async with serving(make(play), shutdown_timeout=None) as server, client_of(server) as client:
        async with client.stream("GET", "/aware") as response:
            events = events_of(response)
            assert await anext(events) == "hello"
            await play.holding.wait()
            server.close()
            play.release()
            assert [event async for event in events] == ["goodbye"]
        await server.wait_closed()
    assert server.report is not None
    assert server.report[1:] == (0, (), (), False)


@pytest.mark.parametrize("path", ["/unaware", "/synchronous"])
async def test_a_stream_that_knows_nothing_is_ended_where_that_is_asked_for(path: str, loop_name: str) -> None:
    """By `disconnect_after`, for one server after the other: it does not take the first one's end for the next's."""
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
        assert server.report[1:] == (0, (), (), False)


@pytest.mark.usefixtures("short_grace")
async def test_otherwise_it_is_ended_when_the_time_is_over(loop_name: str) -> None:
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
    (handler,) = server.report.persuaded
    assert handler[:2] == ("GET", "/unaware")
    assert (server.report.aborted, server.report.cancelled) == (0, ())
    assert "generator over" in play.events
