"""
Very short times, and times that end in the very turn in which something comes.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from aioserve import Server, _limits, serving, serving_process, start
from tests.helpers import not_portable
from tests.helpers.apps import App
from tests.helpers.clients import PIPELINING, connect
from tests.helpers.processes import TALKING, asking, linux_only
from tests.helpers.turns import MOMENT, turns

# In seconds; a loop's timer may have a resolution of a millisecond.
TIMES = {
    "falling": [0.0009, 0.0005, 0.0001],
    "rising": [0.0001, 0.0005, 0.0009],
    "tiny": [1e-9, 1e-12],
    "between long ones": [3600, 0.0005, 7200],
    "none after": [0.0005, None, 0.0004, None],
}


@pytest.mark.parametrize("times", TIMES.values(), ids=TIMES)
async def test_shortest_of_several_closes_below_a_millisecond_counts(times: list[float | None]) -> None:
    """None of them raises, also where the timer of another one is about to expire."""
    app = App()
    server = await start(app, shutdown_timeout=None)
    async with connect(server) as client:
        client.ask("/hold")
        await app.holding.wait()
        for each in times:
            server.close(timeout=each)
        async with asyncio.timeout(10):
            await server.wait_closed()
    assert "cancelled /hold" in app.events
    assert server.report is not None
    assert server.report.duration < 5


async def test_closes_below_a_millisecond_in_several_turns_end_the_server() -> None:
    """Each turn, until it has closed."""
    app = App()
    async with serving(app, shutdown_timeout=None) as server, connect(server) as client:
        client.ask("/hold")
        await app.holding.wait()
        async with asyncio.timeout(10):
            while not server._engine.closed.is_set():
                server.close(timeout=0.0004)
                await asyncio.sleep(0)
    assert "cancelled /hold" in app.events


@linux_only
@pytest.mark.parametrize("times", TIMES.values(), ids=TIMES)
@not_portable.child_processes
async def test_shortest_of_several_closes_of_a_child_process_counts(
    times: list[float | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for a server of this process."""
    async with serving_process(TALKING, shutdown_timeout=None) as server, asking(server, "/stream") as reader:
        await reader.readuntil(b"data: 0\n\n")
        for each in times:
            server.close(timeout=each)
        async with asyncio.timeout(20):
            await server.wait_closed()


# Grace periods.


@asynccontextmanager
async def stopping_with_half_a_request(http: str) -> AsyncIterator[tuple[Server, socket.socket, asyncio.Task[None]]]:
    server = await start(App(), http=http, shutdown_timeout=None)
    with socket.create_connection((server.host, server.port)) as client:
        client.sendall(b"GET / HT")
        while not server.stats.connections:
            await asyncio.sleep(0)
        await turns(10)
        closing = asyncio.create_task(server.aclose())
        await turns(10)
        yield server, client, closing


@pytest.mark.parametrize("http", PIPELINING)
async def test_byte_that_comes_as_the_time_of_a_partial_request_ends_begins_it_anew(
    http: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The byte is unread when the time ends, so the connection is not closed then; and it is not forgotten."""
    monkeypatch.setattr(_limits, "PARTIAL_REQUEST", MOMENT)
    async with stopping_with_half_a_request(http) as (server, client, closing):
        assert not closing.done()
        # Both timers end in one turn, this one first.
        asyncio.get_running_loop().call_later(MOMENT / 10, client.sendall, b"T")
        time.sleep(2 * MOMENT)  # noqa: ASYNC251 (it is to block the loop)
        await asyncio.sleep(0)
        assert not closing.done(), "the byte has come in time"
        async with asyncio.timeout(10):
            await closing
        assert client.recv(100) == b""
    assert server.report is not None
    assert not server.report.was_forced


@pytest.mark.parametrize("http", PIPELINING)
async def test_rest_of_a_request_that_comes_as_its_time_ends_is_answered(
    http: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is in the kernel's buffer at that moment."""
    monkeypatch.setattr(_limits, "PARTIAL_REQUEST", MOMENT)
    async with stopping_with_half_a_request(http) as (_, client, closing):
        asyncio.get_running_loop().call_later(MOMENT / 10, client.sendall, b"TP/1.1\r\nhost: test\r\n\r\n")
        time.sleep(2 * MOMENT)  # noqa: ASYNC251 (it is to block the loop)
        async with asyncio.timeout(10):
            await closing
        answer = client.recv(1000)
        while chunk := client.recv(1000):
            answer += chunk
    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.endswith(b"hello")
