"""
The server's own tasks: what happens when the program, or `asyncio.run()` at its end, cancels them.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest
from starlette.applications import Starlette

from aioserve import Server, ServerCrashedError, ShutdownError, StartupError, serve, serving, start
from aioserve.testing.leaks import open_descriptors
from tests.helpers.apps import App
from tests.helpers.clients import connect
from tests.helpers.turns import after

pytestmark = pytest.mark.usefixtures("short_grace")


async def test_cancelling_the_servers_task_forces_the_stop() -> None:
    """`asyncio.run()` does so at its end; the handlers are awaited and the lifespan ends."""
    app = App()

    async with asyncio.timeout(5):
        async with serving(app) as server, connect(server) as connection:
            connection.ask("/hold")
            await app.holding.wait()
            (own,) = (task for task in asyncio.all_tasks() if task.get_name() == f"aioserve {server.url}")
            own.cancel()
            await server.wait_closed()

    assert app.events == ["startup", "GET /hold", "cancelled /hold", "shutdown", "lifespan over"]


@pytest.mark.parametrize("turns", range(8))
async def test_cancelling_the_servers_task_during_the_start_leaves_nothing_open(turns: int) -> None:
    """Also before its first step, when none of its code runs: the start fails, or returns a server, which closes."""
    opened = open_descriptors()
    before = asyncio.all_tasks()
    starting = asyncio.create_task(start(App()))
    while not (own := [task for task in asyncio.all_tasks() - before if task.get_name().startswith("aioserve http")]):
        await asyncio.sleep(0)
    after(turns, own[0].cancel)
    try:
        await (await starting).wait_closed()
    except StartupError:
        pass  # it was too early to start
    assert open_descriptors() == opened


@pytest.mark.parametrize("turns", range(4))
async def test_cancelling_the_lifespans_task_during_the_start_is_an_error(turns: int) -> None:
    """
    Also before its first step: the start fails at once and does not wait for the timeout, or the server has crashed.
    """
    starting = asyncio.create_task(start(App(), startup_timeout=None))
    while not (lifespan := [task for task in asyncio.all_tasks() if task.get_name() == "aioserve lifespan"]):
        await asyncio.sleep(0)
    after(turns, lifespan[0].cancel)
    try:
        server = await starting
    except StartupError as exc:
        cause = exc.__cause__
    else:
        with pytest.raises(ServerCrashedError) as caught:
            await server.wait_closed()
        cause = caught.value.__cause__
    assert isinstance(cause, asyncio.CancelledError)


@pytest.mark.parametrize("way", ["start", "serve"])
def test_server_that_is_never_closed_ends_with_its_loop(way: str, caplog: pytest.LogCaptureFixture) -> None:
    """`asyncio.run()` cancels all tasks; the lifespan still shuts down, and nothing is logged."""
    events = []

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        events.append("started")
        yield
        await asyncio.sleep(0)
        events.append("shut down")

    async def main() -> None:
        app = Starlette(lifespan=lifespan)
        if way == "start":
            forgotten.append(await start(app))
        else:
            forgotten.append(asyncio.create_task(serve(app)))
            while not events:
                await asyncio.sleep(0)

    forgotten: list[object] = []
    asyncio.run(main())

    assert events == ["started", "shut down"]
    assert [record for record in caplog.records if record.name == "aioserve"] == []


def test_lifespan_that_ends_with_its_loop_has_not_crashed() -> None:
    """Where it does not wait in `receive()`, the cancellation by `asyncio.run()` is what tells it to shut down."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await asyncio.Event().wait()

    async def main() -> None:
        servers.append(await start(app))

    servers: list[Server] = []
    asyncio.run(main())
    error = servers[0]._engine.error
    assert isinstance(error, ShutdownError)
    assert isinstance(error.__cause__, asyncio.CancelledError)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with Python 3.12")
@pytest.mark.parametrize("loop_name", ["asyncio"])
async def test_server_works_with_eager_tasks() -> None:
    """The lifespan runs before `start()` has got its task."""
    watching: list[asyncio.Task[None]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        server = scope["state"]["aioserve"]
        assert "starting" in repr(server)
        watching.append(asyncio.create_task(server.wait_closed()))
        with pytest.raises(RuntimeError, match="would wait for itself"):
            await server.aclose()
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()

    loop = asyncio.get_running_loop()
    loop.set_task_factory(getattr(asyncio, "eager_task_factory"))  # noqa: B009 (mypy looks with the oldest Python)
    try:
        async with serving(app) as server:
            assert server.is_serving()
        await asyncio.wait(watching)
    finally:
        loop.set_task_factory(None)
