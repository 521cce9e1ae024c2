"""
What the user holds: asking it to close from anywhere, waiting for it, and what it tells.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
import time
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
import trio
from anyio import to_thread
from anyio.from_thread import start_blocking_portal
from fastapi import FastAPI, Request, Response

from aioserve import Server, serve, serving, start
from tests.apps import App, without_lifespan
from tests.clients import connect, get
from tests.turns import turns

pytestmark = pytest.mark.usefixtures("short_grace")


async def test_a_handler_can_close_its_server() -> None:
    """Its response is sent, and the block ends normally when it ends."""
    async with serving(App()) as server:
        assert (await get(server, "/close")).text == "hello"
        await server.wait_closed()
        assert not server.is_serving()


async def test_a_block_is_for_once() -> None:
    """Entered again, it would have two servers to end, and know one."""
    block = serving(App())
    async with block:
        with pytest.raises(RuntimeError, match=r"call serving\(\) anew"):
            await block.__aenter__()
    with pytest.raises(RuntimeError, match=r"call serving\(\) anew"):
        await block.__aenter__()


async def test_a_block_is_for_one_task() -> None:
    """The second to come is refused, also while the first still waits for the start."""

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
    with pytest.raises(RuntimeError, match=r"call serving\(\) anew"):
        await block.__aenter__()
    release.set()
    await first
    await block.__aexit__(None, None, None)


async def test_being_asked_to_close_does_not_end_the_body() -> None:
    """It may have other things to do."""
    ran = []
    async with serving(App()) as server:
        server.close()
        assert server.stopping.is_set()
        await server.wait_closed()
        ran.append(True)
    assert ran


async def test_stopping_is_set_at_once_also_in_a_callback() -> None:
    """Of the loop, where there is no task."""
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


async def test_another_thread_can_close_it() -> None:
    """The loop is woken up for it."""
    async with serving(App()) as server:
        thread = threading.Thread(target=server.close)
        thread.start()
        await server.wait_closed()
        thread.join()


async def test_a_signal_handler_can_close_it() -> None:
    """Also while the loop sleeps, which it would go on to do."""
    server: Server

    def interrupt() -> None:
        time.sleep(0.05)  # by now the loop is asleep; were it not, the test would only be easier to pass
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


def test_closing_after_the_loop_is_gone_is_no_mistake() -> None:
    """There is nothing left to close."""

    async def main() -> Server:
        async with serving(App()) as server:
            return server

    asyncio.run(main()).close()


@pytest.mark.parametrize("timeout", ["soon", True])
async def test_a_deadline_must_be_a_number(timeout: Any) -> None:
    """Of seconds."""
    async with serving(App()) as server:
        with pytest.raises(TypeError, match="timeout must be a number of seconds"):
            server.close(timeout)
        with pytest.raises(ValueError, match="must be 0 or more seconds"):
            server.close(-1)
        assert server.is_serving()


@pytest.mark.parametrize("method", ["aclose", "wait_closed"])
async def test_a_request_cannot_wait_for_its_own_end(method: str) -> None:
    """It would wait for itself; it is told what to call instead."""
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


async def test_nor_can_the_lifespan() -> None:
    """For the same reason."""
    errors = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await scope["state"]["aioserve"].aclose()
        except RuntimeError as exc:
            errors.append(str(exc))

    async with serving(app):
        pass

    assert "would wait for itself" in errors[0]


async def test_a_background_task_of_a_request_can() -> None:
    """It is no part of the request, and nobody waits for it."""
    app = FastAPI()
    tasks: list[asyncio.Task[None]] = []

    @app.get("/")
    async def end(request: Request) -> None:
        tasks.append(asyncio.create_task(request.state.aioserve.aclose()))

    async with serving(app) as server:
        await get(server)
        await server.wait_closed()
        await asyncio.wait(tasks)


async def test_a_readiness_check_can_tell() -> None:
    """From the moment that a stop is asked for."""
    app = FastAPI()
    release = asyncio.Event()
    checking = asyncio.Event()

    @app.get("/ready")
    async def ready(request: Request) -> Response:
        checking.set()
        await release.wait()
        return Response(status_code=503 if request.state.aioserve.stopping.is_set() else 200)

    async with serving(app) as server:
        release.set()
        assert (await get(server, "/ready")).status_code == 200

        release.clear()
        checking.clear()
        asking = asyncio.create_task(get(server, "/ready"))
        await checking.wait()
        server.close()
        release.set()
        assert (await asking).status_code == 503


async def test_stats_tell_what_it_does_and_has_done() -> None:
    """Connections, requests in flight, responses completed."""
    app = App()
    async with serving(app) as server, connect(server) as connection:
        connection.ask("/")
        await connection.answer()
        assert server.stats == (1, 0, 1)
        assert server.stats.served == 1
        connection.ask("/hold")
        await app.holding.wait()
        assert server.stats == (1, 1, 1)
        app.release.set()
        await connection.answer()
    assert server.stats == (0, 0, 2)


async def test_repr_tells_how_it_is() -> None:
    """And where."""
    app = App()
    async with serving(app) as server, connect(server) as connection:
        assert repr(server) == f"<aioserve.Server {server.url} serving>"
        connection.ask("/hold")
        await app.holding.wait()
        server.close()
        assert repr(server) == f"<aioserve.Server {server.url} stopping>"
        app.release.set()
    assert repr(server) == f"<aioserve.Server {server.url} closed>"


async def test_a_notebook_shows_links() -> None:
    """To every address, as long as there is something behind them; and how it is."""
    app = App()
    async with serving(app, host=["127.0.0.1", "::1"]) as server, connect(server) as connection:
        one, two = (f'<a href="{url}" target="_blank">{url}</a>' for url in server.urls)
        assert server._repr_html_() == f"aioserve.Server {one}, {two} <em>serving</em>"
        connection.ask("/hold")
        await app.holding.wait()
        server.close()
        assert server._repr_html_() == f"aioserve.Server {one}, {two} <em>stopping</em>"
        app.release.set()
    assert server._repr_html_() == f"aioserve.Server {server.urls[0]}, {server.urls[1]} <em>closed</em>"


async def test_a_notebook_shows_no_link_where_no_browser_gets(tmp_path: Path) -> None:
    """To a Unix socket."""
    async with serving(App(), uds=tmp_path / "app.sock") as server:
        assert server._repr_html_() == f"aioserve.Server {server.url} <em>serving</em>"


async def test_a_notebook_is_shown_text_and_no_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever an address may look like."""
    async with serving(App()) as server:
        monkeypatch.setattr(server._engine, "urls", ['http://<b>&"'])
        url = "http://&lt;b&gt;&amp;&quot;"
        assert server._repr_html_() == f'aioserve.Server <a href="{url}" target="_blank">{url}</a> <em>serving</em>'


async def test_a_server_that_nobody_has_called_is_gone_when_nobody_holds_it() -> None:
    """It needs no garbage collector. (Connections do: in uvicorn, they and their requests hold each other.)"""

    async def app(scope: Any, receive: Any, send: Any) -> None:  # not one that keeps its state
        for phase in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{phase}.complete"})

    gc.disable()
    try:
        server = await start(app)
        await server.aclose()
        await turns()  # its task has callbacks
        left = weakref.ref(server), weakref.ref(server.uvicorn)
        del server
        assert [each() for each in left] == [None, None]
    finally:
        gc.enable()


async def test_several_servers_live_in_one_loop() -> None:
    """And end in any order."""
    async with serving(App()) as one:
        two, three = await start(App()), await start(App())
        assert len({one.port, two.port, three.port}) == 3
        for server in (one, two, three):
            assert (await get(server)).text == "hello"
        await two.aclose()
        assert (await get(three)).text == "hello"
        await three.aclose()
        assert (await get(one)).text == "hello"


async def test_serve_hands_its_server_to_a_task_group() -> None:
    """With anyio's own protocol for that."""
    async with anyio.create_task_group() as task_group:
        server: Server = await task_group.start(partial(serve, App()))
        assert (await get(server)).text == "hello"
        task_group.cancel_scope.cancel()
    assert not server.is_serving()


async def test_serve_returns_when_its_server_closes() -> None:
    """So a task group ends, too."""
    async with anyio.create_task_group() as task_group:
        server: Server = await task_group.start(partial(serve, App()))
        await get(server, "/close")


async def test_serve_in_an_asyncio_task_group() -> None:
    """Cancelled by a sibling that is done, say."""
    async with asyncio.TaskGroup() as group:
        task = group.create_task(serve(App()))
        await asyncio.sleep(0)
        task.cancel()


def test_outside_asyncio_it_says_so() -> None:
    """In one sentence, with what to do; and leaves nothing half made."""

    async def main() -> None:
        async with serving(App()):
            raise AssertionError

    with pytest.raises(RuntimeError, match=r'needs a running asyncio event loop.*backend="asyncio"'):
        trio.run(main)


def test_in_another_loop_it_says_so() -> None:
    """Waiting belongs to the server's own loop; closing can be done from anywhere."""
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
            with pytest.raises(RuntimeError, match=r"is for the event loop that the server runs in; .* use close\(\)"):
                await method()
        server.close()

    thread = threading.Thread(target=asyncio.run, args=(here(),))
    thread.start()
    both.wait()
    asyncio.run(there())
    thread.join()


def test_a_synchronous_program_serves_through_a_portal() -> None:
    """What a thread with polling is used for today."""
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(serving(without_lifespan)) as server:
        assert portal.call(get, server).text == "hello"


async def test_the_state_is_there_without_a_lifespan() -> None:
    """The server is in it all the same."""
    async with serving(without_lifespan, lifespan="off") as server:
        assert server.state == {"aioserve": server}
