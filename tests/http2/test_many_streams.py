"""
A connection of HTTP/2 with many streams is closed in order, before zttp would break it off.
"""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from aioserve import _limits, serving
from tests.helpers.apps import App
from tests.helpers.http2 import ANY_STREAM, connect, needs_http2

pytestmark = [needs_http2, pytest.mark.usefixtures("quiet")]

FEW = 5


async def test_client_with_one_stream_after_the_other_is_told_behind_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """And its next connection is served like the first."""
    monkeypatch.setattr(_limits, "HTTP2_REQUESTS", FEW)
    async with serving(App(), http2=True) as server:
        for _ in range(2):
            async with connect(server) as client:
                with contextlib.suppress(AssertionError):  # it is told to go
                    while not client.goaways:
                        await client.answer(client.ask())
                await client.is_told()
                assert client.goaways == [(2 * FEW + 1, 0)]
        assert server.is_serving()


async def test_client_that_is_never_without_a_stream_is_told_to_open_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has opened until it has heard of that is answered."""
    monkeypatch.setattr(_limits, "HTTP2_REQUESTS", FEW)
    monkeypatch.setattr(_limits, "HTTP2_STREAMS", 1000.0)  # in vain
    app = App()
    async with serving(app, http2=True) as server, connect(server) as client:
        held = client.ask("/hold")
        while not client.goaways:
            await client.answer(client.ask())
        assert client.goaways == [(ANY_STREAM, 0)]
        late = client.ask()  # it has not heard of it yet
        assert (await client.answer(late)).body == b"hello"
        app.release.set()
        await client.is_told()
        assert client.answers[held].body == b"hello"
        assert client.goaways[-1] == (late, 0)


async def test_idle_connection_with_many_streams_stays_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the next one."""
    monkeypatch.setattr(_limits, "HTTP2_REQUESTS", FEW)
    async with serving(App(), http2=True) as server, connect(server) as client:
        for _ in range(FEW):
            await client.answer(client.ask())
        for _ in range(10):
            await asyncio.sleep(0)
        assert client.ended is None
        assert client.goaways == []


async def test_ten_thousand_requests_of_one_client_are_answered() -> None:
    """zttp 0.0.35 ends a connection with ENHANCE_YOUR_CALM at its 4,097th stream, however long it took."""
    answered = 0
    async with serving(App(), http2=True) as server:
        while answered < 10_000:
            async with connect(server) as client:
                with contextlib.suppress(AssertionError):
                    while not client.goaways:
                        for stream in [client.ask() for _ in range(50)]:
                            await client.answer(stream)
                await client.is_told()
                answered += sum(each.is_complete for each in client.answers.values())
