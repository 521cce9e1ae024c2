"""
The three ways to start: `serving()`, `start()` and `serve()`, in tasks, task groups, threads and loops.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import anyio
import pytest
import trio
from anyio.from_thread import start_blocking_portal

from aioserve import Server, serve, serving, start
from tests.helpers.apps import App, without_lifespan
from tests.helpers.clients import get

pytestmark = pytest.mark.usefixtures("short_grace")


async def test_serving_block_can_be_entered_only_once() -> None:
    """Entered again, it would have two servers to close, and know only one."""
    block = serving(App())
    async with block:
        with pytest.raises(RuntimeError, match=r"was entered before; call serving\(\) for each block"):
            await block.__aenter__()
    with pytest.raises(RuntimeError, match=r"was entered before; call serving\(\) for each block"):
        await block.__aenter__()


async def test_serving_block_can_be_entered_by_one_task_only() -> None:
    """The second task is refused, also while the first one still waits for the start."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        starting.set()
        await release.wait()
        await send({"type": "lifespan.startup.complete"})
        await receive()

    starting, release = asyncio.Event(), asyncio.Event()
    block = serving(app)
    first = asyncio.create_task(block.__aenter__())
    await starting.wait()
    with pytest.raises(RuntimeError, match=r"was entered before; call serving\(\) for each block"):
        await block.__aenter__()
    release.set()
    await first
    await block.__aexit__(None, None, None)


async def test_serving_block_can_be_left_in_another_task() -> None:
    """pytest-asyncio does so with fixtures; only a crash needs the task that entered."""
    block = serving(App())
    server = await asyncio.create_task(block.__aenter__())
    assert (await get(server)).text == "hello"
    await asyncio.create_task(block.__aexit__(None, None, None))
    assert not server.is_serving()


async def test_server_can_be_started_and_closed_in_different_tasks() -> None:
    """As in a notebook, where each cell is a task, or in hooks."""
    server = await asyncio.create_task(start(App()))
    assert (await get(server)).text == "hello"
    await asyncio.create_task(server.aclose())
    assert not server.is_serving()


async def test_several_servers_can_run_in_one_loop() -> None:
    """And close in any order."""
    async with serving(App()) as one:
        two, three = await start(App()), await start(App())
        assert len({one.port, two.port, three.port}) == 3
        for server in (one, two, three):
            assert (await get(server)).text == "hello"
        await two.aclose()
        assert (await get(three)).text == "hello"
        await three.aclose()
        assert (await get(one)).text == "hello"


async def test_serve_passes_its_server_to_an_anyio_task_group() -> None:
    """By anyio's own protocol."""
    async with anyio.create_task_group() as task_group:
        server: Server = await task_group.start(partial(serve, App()))
        assert (await get(server)).text == "hello"
        task_group.cancel_scope.cancel()
    assert not server.is_serving()


async def test_serve_returns_when_its_server_closes() -> None:
    """So the task group ends, too."""
    async with anyio.create_task_group() as task_group:
        server: Server = await task_group.start(partial(serve, App()))
        await get(server, "/close")


async def test_serve_runs_in_an_asyncio_task_group() -> None:
    """Here it is cancelled, for example by a sibling that has completed."""
    async with asyncio.TaskGroup() as group:
        task = group.create_task(serve(App()))
        await asyncio.sleep(0)
        task.cancel()


def test_synchronous_program_can_serve_through_a_blocking_portal() -> None:
    """Today such programs use a thread and polling."""
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(serving(without_lifespan)) as server:
        assert portal.call(get, server).text == "hello"


def test_serving_outside_asyncio_is_refused() -> None:
    """One sentence says what to do; nothing is left half made."""

    async def main() -> None:
        async with serving(App()):
            raise AssertionError

    with pytest.raises(RuntimeError, match=r'needs a running asyncio event loop.*backend="asyncio"'):
        trio.run(main)
