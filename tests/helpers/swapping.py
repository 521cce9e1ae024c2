"""
Apps that are swapped, and functions to begin a swap and to wait for it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from aioserve import (
    Swappable,
)
from tests.helpers.apps import App, Receive, Scope, Send
from tests.helpers.turns import turns

WHOLE_LIFE = ["startup", "shutdown", "lifespan over"]


class Named(App):
    """An app that answers with a name of five letters, which is in its lifespan's state."""

    def __init__(self, name: str, startup: str = "completes", shutdown: str = "completes") -> None:
        super().__init__(startup, shutdown)
        self.name = name
        self.started = asyncio.Event()

    async def lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def name_first(message: dict[str, Any]) -> None:
            if message["type"] == "lifespan.startup.complete":
                scope["state"]["greeting"] = self.name
            await send(message)

        self.started.set()
        await super().lifespan(scope, receive, name_first)

    @property
    def life(self) -> list[str]:
        """The events of its lifespan."""
        return [event for event in self.events if event in WHOLE_LIFE]

    def has_ended_if_begun(self) -> bool:
        return self.events.count("lifespan over") == int(self.started.is_set())


@contextlib.asynccontextmanager
async def swapping(swappable: Swappable, app: Any, **options: Any) -> AsyncIterator[asyncio.Task[None]]:
    """Begin a swap before the block, and wait for it after the block."""
    task = asyncio.create_task(swappable.swap(app, **options))
    try:
        yield task
    finally:
        await asyncio.wait({task})


async def switched(swappable: Swappable, app: object) -> None:
    """Wait until new requests go to an app."""
    while swappable.app is not app:
        await asyncio.sleep(0)


def sending(app: Any, before: Callable[[dict[str, Any]], Awaitable[None]]) -> Any:
    """Wrap an app in a middleware that does something before each message that is sent."""

    async def wrapped(scope: Any, receive: Any, send: Any) -> None:
        async def wrapped_send(message: Any) -> None:
            await before(message)
            await send(message)

        await app(scope, receive, wrapped_send)

    return wrapped


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what was logged, except by asyncio, whose debug mode reports a busy machine."""
    return [record.getMessage() for record in caplog.records if record.name != "asyncio"]


async def in_a_thread(act: Callable[[], None]) -> None:
    """Do something in a thread, and wait for the end of the thread."""
    with ThreadPoolExecutor(1) as executor:
        await asyncio.get_running_loop().run_in_executor(executor, act)


class Slow(Named):
    """An app that takes some turns to start and to end."""

    async def lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def slow_receive() -> dict[str, Any]:
            message = await receive()
            await turns(4)
            return message

        async def slow_send(message: dict[str, Any]) -> None:
            await turns(4)
            await send(message)

        await super().lifespan(scope, slow_receive, slow_send)
