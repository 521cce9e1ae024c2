"""
What a stop costs: for idle connections no timer, and a few turns of the loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
from starlette.applications import Starlette

from aioserve import _limits, serving, start
from tests.helpers.apps import App
from tests.helpers.clients import (
    Connection,
    burst,
    connect,
)

pytestmark = pytest.mark.usefixtures("short_grace")


class Counting:
    """Counts the timers and turns of the running loop, by wrapping its methods."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.timers = 0
        self.turns = 0
        self.counting = True
        loop: Any = asyncio.get_running_loop()
        for name in ("call_later", "call_at"):
            monkeypatch.setattr(loop, name, self.counted(getattr(loop, name)))
        loop.call_soon(self.turn)

    def counted(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.timers += self.counting
            return method(*args, **kwargs)

        return call

    def turn(self) -> None:
        self.turns += 1
        if self.counting:
            asyncio.get_running_loop().call_soon(self.turn)


@pytest.mark.parametrize("loop_name", ["asyncio"])  # the methods of a uvloop cannot be replaced
@pytest.mark.parametrize("connections", [0, 1, 20])
async def test_stop_of_an_idle_server_makes_no_timer_and_takes_a_few_turns(
    connections: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many idle connections it has. So nothing in it can be slow."""
    clients: list[Connection] = []
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(serving(Starlette()))
        for _ in range(connections):
            client = await stack.enter_async_context(connect(server))
            client.ask("/nowhere")
            await client.reader.readuntil(b"Not Found")
            clients.append(client)
        counting = Counting(monkeypatch)
        await server.aclose()
        counting.counting = False

    assert counting.timers == 0
    assert counting.turns <= 3  # the caller; the lifespan, the connections and the server; and the waiters


@pytest.mark.parametrize("loop_name", ["asyncio"])  # the methods of a uvloop cannot be replaced
async def test_stop_with_many_idle_connections_makes_no_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are closed at once."""
    made: list[Any] = []
    server = await start(App(), shutdown_timeout=None)
    with burst(server, 500) as clients:
        while server.stats.served < len(clients):
            await asyncio.sleep(0)
        loop: Any = asyncio.get_running_loop()
        for name in ("call_later", "call_at"):
            monkeypatch.setattr(loop, name, lambda *args: made.append(args))
        await server.aclose()
        monkeypatch.undo()
    graces = [when for when, *_ in made if when < _limits.SLOW_STOP / 2]
    assert graces == [], "there is only the timer of the warning of a slow stop"
    assert server.report is not None
    assert server.report.aborted == 0
