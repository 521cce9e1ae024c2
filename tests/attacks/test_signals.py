"""
Blocks whose task has ended, as where one task fills an exit stack and another one closes it: nothing can be cancelled.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from contextlib import AsyncExitStack
from typing import Any

import pytest

from aioserve import Server, ServerCrashedError, serving, serving_process
from tests.helpers import not_portable
from tests.helpers.apps import App
from tests.helpers.clients import connect
from tests.helpers.processes import TALKING, asking, linux_only
from tests.helpers.turns import turns

pytestmark = pytest.mark.usefixtures("short_grace")


async def entered(context: Any) -> tuple[AsyncExitStack, Any]:
    """Enter a block in a task that ends; return its exit stack, and the server."""
    stack = AsyncExitStack()
    return stack, await asyncio.create_task(stack.enter_async_context(context))


def logged(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == level and record.name == "aioserve"]


async def test_stop_signal_closes_a_server_whose_block_has_lost_its_task(caplog: pytest.LogCaptureFixture) -> None:
    """A warning says so, and the exit stack can be closed in another task."""
    app = App()
    server: Server
    stack, server = await entered(serving(app, stop_on_signals=[signal.SIGUSR1]))
    signal.raise_signal(signal.SIGUSR1)
    async with asyncio.timeout(10):
        await server.wait_closed()
    assert app.events == ["startup", "shutdown", "lifespan over"]
    assert logged(caplog, logging.WARNING) == [
        f"SIGUSR1: closing {server.url}; its block cannot be cancelled, since the task that entered it has ended"
    ]
    await asyncio.create_task(stack.aclose())
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_stop_signal_lets_requests_finish_where_the_block_has_lost_its_task() -> None:
    """It is a graceful stop."""
    app = App()
    stack, server = await entered(serving(app, stop_on_signals=[signal.SIGUSR1], shutdown_timeout=None))
    async with connect(server) as client:
        client.ask("/hold")
        await app.holding.wait()
        signal.raise_signal(signal.SIGUSR1)
        async with asyncio.timeout(10):
            await server.stopping.wait()
        await turns()
        app.release.set()
        assert b"connection: close" in await client.answer()
        await server.wait_closed()
    await stack.aclose()


async def test_second_stop_signal_forces_where_the_block_has_lost_its_task() -> None:
    """As anywhere else."""
    app = App()
    stack, server = await entered(serving(app, stop_on_signals=[signal.SIGUSR1], shutdown_timeout=None))
    async with connect(server) as client:
        client.ask("/hold")
        await app.holding.wait()
        signal.raise_signal(signal.SIGUSR1)
        async with asyncio.timeout(10):
            await server.stopping.wait()
            signal.raise_signal(signal.SIGUSR1)
            await server.wait_closed()
    assert "cancelled /hold" in app.events
    await stack.aclose()


async def test_cancellation_of_another_task_is_not_taken_for_that_of_a_signal() -> None:
    """The exit stack is closed by a task that is cancelled, after a signal that could cancel nothing."""

    async def close() -> None:
        async with stack:
            await asyncio.Event().wait()

    stack, server = await entered(serving(App(), stop_on_signals=[signal.SIGUSR1]))
    closing = asyncio.create_task(close())
    signal.raise_signal(signal.SIGUSR1)
    async with asyncio.timeout(10):
        await server.wait_closed()
    closing.cancel()
    await asyncio.wait({closing})
    assert closing.cancelled()


async def test_crash_is_logged_where_the_block_has_lost_its_task(caplog: pytest.LogCaptureFixture) -> None:
    """Nobody can be cancelled, so it would go unnoticed until the exit stack is closed, which raises it."""
    app = App()
    stack, server = await entered(serving(app))
    app.crash.set()
    async with asyncio.timeout(10):
        await server._engine.closed.wait()
    assert logged(caplog, logging.ERROR) == [
        f"{server.url}: the app's lifespan died while it was serving: AppError: the app's own"
    ]
    with pytest.raises(ServerCrashedError) as raised:
        await asyncio.create_task(stack.aclose())
    assert raised.value.__cause__ is app.error


async def test_crash_is_not_logged_where_the_block_can_be_cancelled(caplog: pytest.LogCaptureFixture) -> None:
    """The block raises it."""
    app = App()
    with pytest.raises(ServerCrashedError):
        async with serving(app):
            app.crash.set()
            await asyncio.Event().wait()
    assert logged(caplog, logging.ERROR) == []


@linux_only
@not_portable.child_processes
async def test_crash_of_a_child_process_is_logged_where_the_block_has_lost_its_task(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Likewise."""
    stack, server = await entered(serving_process(TALKING))
    async with asking(server, "/exit"), asyncio.timeout(10):
        await server._engine.closed.wait()
    (line,) = logged(caplog, logging.ERROR)
    assert line.startswith(f"{server.url}: ")
    with pytest.raises(ServerCrashedError) as raised:
        await asyncio.create_task(stack.aclose())
    assert str(raised.value) in line


@linux_only
@not_portable.child_processes
async def test_stop_signal_closes_a_child_process_whose_block_has_lost_its_task(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Likewise."""
    stack, server = await entered(serving_process(TALKING, stop_on_signals=[signal.SIGUSR1]))
    signal.raise_signal(signal.SIGUSR1)
    async with asyncio.timeout(10):
        await server.wait_closed()
    assert server.returncode == 0
    (line,) = logged(caplog, logging.WARNING)
    assert line.startswith(f"SIGUSR1: closing {server.url}; ")
    await asyncio.create_task(stack.aclose())
