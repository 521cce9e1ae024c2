"""
`Server.close()`, `aclose()` and `wait_closed()`: from where they can be called, and what they wait for.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from typing import Any

import pytest
from anyio import to_thread
from fastapi import FastAPI, Request

from aioserve import Server, serving, start
from tests.helpers.apps import App
from tests.helpers.clients import get

pytestmark = pytest.mark.usefixtures("short_grace")


async def test_handler_can_close_its_server() -> None:
    """Its response is sent, and the block ends normally."""
    async with serving(App()) as server:
        assert (await get(server, "/close")).text == "hello"
        await server.wait_closed()
        assert not server.is_serving()


async def test_close_does_not_end_the_body() -> None:
    """It may have other things to do."""
    ran = []
    async with serving(App()) as server:
        server.close()
        assert server.stopping.is_set()
        await server.wait_closed()
        ran.append(True)
    assert ran


async def test_close_sets_stopping_at_once() -> None:
    """Also in a callback of the loop, where there is no task."""
    seen: list[bool] = []

    def callback() -> None:
        server.close()
        seen.append(server.stopping.is_set())

    async with serving(App()) as server:
        asyncio.get_running_loop().call_soon(callback)
        await server.wait_closed()
    assert seen == [True]


async def test_closing_is_idempotent() -> None:
    """Before, during and after the stop."""
    async with serving(App()) as server:
        server.close()
        server.close()
        await server.aclose()
        await server.aclose()
        server.close(timeout=0)
    server.close()
    await server.aclose()
    await server.wait_closed()


async def test_another_thread_can_close_a_server() -> None:
    """`close()` wakes the loop."""
    async with serving(App()) as server:
        thread = threading.Thread(target=server.close)
        thread.start()
        await server.wait_closed()
        thread.join()


async def test_signal_handler_can_close_a_server() -> None:
    """Also while the loop sleeps, which it would otherwise go on doing."""
    server: Server

    def interrupt() -> None:
        time.sleep(0.05)  # by now the loop sleeps; if it did not, the test would only be easier to pass
        os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, lambda *_: server.close())
    try:
        async with serving(App()) as server:
            thread = threading.Thread(target=interrupt)
            thread.start()
            await server.wait_closed()
            thread.join()
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_closing_a_closed_server_after_its_loop_is_no_error() -> None:
    """There is nothing left to close."""

    async def main() -> Server:
        async with serving(App()) as server:
            return server

    asyncio.run(main()).close()


def test_closing_a_running_server_after_its_loop_is_no_error() -> None:
    """The loop was closed without closing the server, whose task cannot run any more."""
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(start(App(), lifespan="off"))
    sockets = server.sockets
    loop.close()
    server.close()
    assert not server.is_serving()
    for sock in sockets:  # the loop was closed before the server could close them
        sock.close()


@pytest.mark.parametrize("timeout", ["soon", True])
async def test_close_requires_a_number_of_seconds(timeout: Any) -> None:
    """From 0 on."""
    async with serving(App()) as server:
        with pytest.raises(TypeError, match="timeout must be a number of seconds"):
            server.close(timeout)
        with pytest.raises(ValueError, match="must be 0 or more seconds"):
            server.close(-1)
        assert server.is_serving()


@pytest.mark.parametrize("method", ["aclose", "wait_closed"])
async def test_handler_cannot_wait_for_the_end_of_its_server(method: str) -> None:
    """It would wait for itself; the error says what to call instead."""
    app = FastAPI()
    errors = []

    @app.get("/")
    async def end(request: Request) -> None:
        try:
            await getattr(request.state.aioserve, method)()
        except RuntimeError as exc:
            errors.append(str(exc))

    async with serving(app) as server:
        await get(server)
        assert server.is_serving()

    assert errors == [f"{method}() in a request or the lifespan of this server would wait for itself; use close()"]


async def test_lifespan_cannot_wait_for_the_end_of_its_server() -> None:
    """It would wait for itself."""
    errors = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await scope["state"]["aioserve"].aclose()
        except RuntimeError as exc:
            errors.append(str(exc))

    async with serving(app):
        pass

    assert "would wait for itself" in errors[0]


async def test_background_task_can_wait_for_the_end_of_its_server() -> None:
    """It is no part of the request, and the stop does not wait for it."""
    app = FastAPI()
    tasks: list[asyncio.Task[None]] = []

    @app.get("/")
    async def end(request: Request) -> None:
        tasks.append(asyncio.create_task(request.state.aioserve.aclose()))

    async with serving(app) as server:
        await get(server)
        await server.wait_closed()
        await asyncio.wait(tasks)


def test_waiting_in_another_loop_is_refused() -> None:
    """Only the server's own loop can wait for it; `close()` can be called from anywhere."""
    both = threading.Barrier(2, timeout=10)
    servers: list[Server] = []

    async def here() -> None:
        async with serving(App()) as server:
            servers.append(server)
            await to_thread.run_sync(both.wait)
            await server.wait_closed()

    async def there() -> None:
        (server,) = servers
        for method in (server.wait_closed, server.aclose):
            with pytest.raises(
                RuntimeError, match=r"in the event loop that the server runs in; close\(\) works from anywhere"
            ):
                await method()
        server.close()

    thread = threading.Thread(target=asyncio.run, args=(here(),))
    thread.start()
    both.wait()
    asyncio.run(there())
    thread.join()


async def test_cancelling_wait_closed_does_not_close_the_server() -> None:
    """`wait_closed()` only watches."""
    async with serving(App()) as server:
        waiter = asyncio.create_task(server.wait_closed())
        await asyncio.sleep(0)
        waiter.cancel()
        await asyncio.wait({waiter})

        assert waiter.cancelled()
        assert server.is_serving()
