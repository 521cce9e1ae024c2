"""
`aioserve.testing.server()` and `live_server()`: servers for the length of a block.
"""

from __future__ import annotations

import asyncio
import io
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import anyio
import httpx
import pytest

from aioserve import ServerCrashedError, ShutdownError, StartupError, testing
from aioserve.testing.fixtures import LiveServers, Opened
from tests.helpers.apps import App, AppError


async def hold(app: App, client: httpx.AsyncClient) -> asyncio.Task[httpx.Response]:
    """Send a request that is not answered."""
    asking = asyncio.create_task(client.get("/hold"))
    await app.holding.wait()
    return asking


def test_the_check_for_leaks_does_not_import_uvicorn() -> None:
    """Each public name is loaded on its first use."""
    program = "import sys; from aioserve.testing import assert_nothing_left; print('uvicorn' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)  # noqa: S603
    assert done.stdout == "False\n"


def test_every_public_name_is_found_and_no_other() -> None:
    """Though each is loaded on its first use."""
    for name in testing.__all__:
        assert getattr(testing, name).__module__.startswith("aioserve.testing.")
    assert set(testing.__all__) <= set(dir(testing))
    with pytest.raises(AttributeError, match=r"module 'aioserve\.testing' has no attribute 'servr'"):
        testing.servr  # type: ignore[attr-defined]  # noqa: B018


class TestAServer:
    async def test_testing_server_serves_for_the_length_of_the_block(self) -> None:
        """With its options."""
        app = App()
        async with testing.server(app, root_path="/api") as server:
            assert server.is_serving()
            assert server.uvicorn.config.root_path == "/api"
        assert app.events == ["startup", "shutdown", "lifespan over"]

    async def test_forced_stop_of_a_testing_server_is_raised_at_the_end(self) -> None:
        """The message names the handler, and says what to do."""
        app = App()
        with pytest.raises(
            AssertionError,
            match=r"^GET /hold from .*: forced shutdown of http://.*, 1 cancelled, .*\. Stop what the test started",
        ):
            async with (
                testing.server(app, shutdown_timeout=0) as server,
                httpx.AsyncClient(base_url=server.url) as http,
            ):
                (await hold(app, http)).cancel()

    async def test_exception_of_the_block_wins_over_the_testing_servers(self) -> None:
        """The other errors are its notes."""
        app = App(shutdown="raises")
        error = KeyError("the test's own")
        with pytest.raises(KeyError) as caught:
            async with (
                testing.server(app, shutdown_timeout=0) as server,
                httpx.AsyncClient(base_url=server.url) as http,
            ):
                (await hold(app, http)).cancel()
                raise error
        assert caught.value is error
        notes = "\n".join(error.__notes__)
        assert "ShutdownError: the app's lifespan failed to shut down: AppError" in notes
        assert "1 cancelled," in notes

    async def test_crash_of_a_testing_server_cancels_nobody_and_is_raised_at_the_end(self) -> None:
        """A note names the server."""
        app = App()
        with pytest.raises(ServerCrashedError) as caught:
            async with testing.server(app) as server:
                app.crash.set()
                await server._engine.closed.wait()
                await asyncio.sleep(0)  # a cancellation would be raised here
        assert caught.value.__cause__ is app.error
        assert caught.value.__notes__ == [f"aioserve: this happened to {server.url}"]

    async def test_failed_shutdown_and_forced_stop_of_a_testing_server_are_both_reported(self) -> None:
        """One is raised, and the other one is its note."""
        app = App(shutdown="raises")
        with pytest.raises(ShutdownError) as caught:
            async with (
                testing.server(app, shutdown_timeout=0) as server,
                httpx.AsyncClient(base_url=server.url) as http,
            ):
                (await hold(app, http)).cancel()
        assert "1 cancelled," in "\n".join(caught.value.__notes__)

    async def test_crash_that_the_block_has_awaited_is_not_raised_again(self) -> None:
        """The block ends normally."""
        app = App()
        async with testing.server(app) as server:
            app.crash.set()
            with pytest.raises(ServerCrashedError):
                await server.wait_closed()

    async def test_cancellation_of_a_testing_servers_block_stays_in_its_scope(self) -> None:
        """The scope is anyio's."""
        app = App()
        with anyio.CancelScope() as scope:
            async with testing.server(app):
                scope.cancel()
                await anyio.sleep_forever()
        assert app.events[-2:] == ["shutdown", "lifespan over"]


class TestALiveServer:
    def test_live_server_serves_a_synchronous_block(self) -> None:
        """From a thread, which ends with the block."""
        app = App()
        with testing.live_server(app, shutdown_timeout=5) as server:
            assert httpx.get(server.url).text == "hello"
        assert app.events[-2:] == ["shutdown", "lifespan over"]

    def test_live_server_can_be_closed_from_another_thread(self) -> None:
        """From any thread."""
        with testing.live_server(App()) as server:
            server.close()

    def test_live_server_raises_the_errors_of_a_testing_server(self) -> None:
        """At its start and at its end; the exception of the body wins."""
        with pytest.raises(StartupError) as caught, testing.live_server(App(startup="raises")):
            pass
        assert isinstance(caught.value.__cause__, AppError)
        with pytest.raises(ShutdownError), testing.live_server(App(shutdown="raises")):
            pass
        error = KeyError("the test's own")
        with pytest.raises(KeyError) as raised, testing.live_server(App(shutdown="raises")):
            raise error
        assert raised.value is error
        assert "ShutdownError" in error.__notes__[0]


@pytest.mark.usefixtures("short_grace")
def test_handler_that_is_stuck_does_not_hold_the_end_of_a_live_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread is left behind, as long as the handler goes on."""
    monkeypatch.setattr("aioserve._limits.THREAD_EXIT", 0.05)
    monkeypatch.setattr(sys, "__stderr__", io.StringIO())
    app = App()
    with ThreadPoolExecutor() as executor:
        with (
            pytest.raises(AssertionError, match=r"GET /cling .* which is still running"),
            testing.live_server(app, shutdown_timeout=0) as server,
        ):
            asking = executor.submit(httpx.get, server.url + "/cling")
            asyncio.run_coroutine_threadsafe(app.holding.wait(), server._loop).result()
            thread = next(each for each in threading.enumerate() if each.name == f"aioserve {server.url}")
        server._loop.call_soon_threadsafe(app.release.set)
        thread.join()
        assert isinstance(asking.exception(), httpx.HTTPError)


async def test_server_factory_is_refused_in_another_loop() -> None:
    """Before anything starts."""
    async with Opened() as opened:

        def elsewhere() -> None:
            with pytest.raises(RuntimeError, match="runs in another event loop than the test"):
                asyncio.run(opened.server(App()))

        thread = threading.Thread(target=elsewhere)
        thread.start()
        while thread.is_alive():
            await asyncio.sleep(0)


@pytest.mark.usefixtures("short_grace")
async def test_handler_that_is_stuck_is_reported_to_the_uncaptured_standard_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The loop waits for it when it closes, so pytest may never print what it has captured."""
    app = App()
    monkeypatch.setattr(sys, "__stderr__", said := io.StringIO())
    with pytest.raises(AssertionError, match="find out why the handler does not end"):
        async with testing.server(app, shutdown_timeout=0) as server, httpx.AsyncClient(base_url=server.url) as http:
            asking = asyncio.create_task(http.get("/cling"))
            await app.holding.wait()
            asking.cancel()
    assert "GET /cling" in said.getvalue()
    assert "which is still running" in said.getvalue()
    app.release.set()


def test_live_servers_can_be_started_by_many_threads() -> None:
    """Each in a loop of its own."""
    with LiveServers() as servers, ThreadPoolExecutor(8) as executor:
        started = list(executor.map(lambda _: servers.start(App()), range(8)))
        assert len({server.url for server in started}) == 8
        assert len({server._loop for server in started}) == 8
