"""
The end of a server in a thread: by `stop()`, `close()` and the end of the block, and by itself; what is raised then.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from aioserve import ServerCrashedError, ShutdownError, ThreadServer, start_in_thread
from tests.helpers.apps import App, AppError, Receive, Scope, Send
from tests.helpers.forking import in_child
from tests.helpers.processes import is_free

pytestmark = pytest.mark.usefixtures("short_grace")


def get(server: ThreadServer, path: str = "/") -> str:
    return httpx.get(server.url + path, trust_env=False, timeout=10).text


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what was logged at level WARNING or above."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.fixture
def clients() -> Iterator[ThreadPoolExecutor]:
    """Have threads for requests that are not answered at once."""
    with ThreadPoolExecutor() as executor:
        yield executor


class Held(App):
    """Tells other threads that "/hold" has begun, and ends it when a stop has."""

    def __init__(self, *, ends: bool = True, shutdown: str = "completes") -> None:
        super().__init__(shutdown=shutdown)
        self.has_begun = threading.Event()
        self.ends = ends

    async def request(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.has_begun.set()
        if self.ends:
            await scope["state"]["aioserve"].stopping.wait()
            self.release.set()
        await super().request(scope, receive, send)


def crash(server: ThreadServer, app: App) -> None:
    """Let the lifespan raise, and wait for the end of the thread; nobody asks for the error."""
    server._server._loop.call_soon_threadsafe(app.crash.set)
    server._thread._thread.join()


def test_stop_of_a_server_in_a_thread_answers_what_is_in_flight(clients: ThreadPoolExecutor) -> None:
    """It waits until everything is over, and may be repeated."""
    app = Held()
    server = start_in_thread(app)
    asking = clients.submit(get, server, "/hold")
    app.has_begun.wait()
    server.stop()
    assert asking.result() == "hello"
    assert threading.current_thread() is threading.main_thread()
    assert not server._thread._thread.is_alive()
    assert is_free(server.port)
    server.stop()
    assert server.wait_closed(0)
    server.close()


def test_stop_of_a_server_in_a_thread_can_be_limited(clients: ThreadPoolExecutor) -> None:
    """0 forces."""
    app = Held(ends=False)
    server = start_in_thread(app)
    asking = clients.submit(get, server, "/hold")
    app.has_begun.wait()
    with pytest.raises(TypeError, match="timeout must be a number"):
        server.stop("0")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="timeout must be 0 or more"):
        server.wait_closed(-1)
    assert not server.wait_closed(0)
    server.stop(0)
    assert server.report is not None
    assert [handler.path for handler in server.report.cancelled] == ["/hold"]
    assert asking.result() == "Internal Server Error"


def test_many_threads_can_stop_a_server_in_a_thread() -> None:
    """Each waits until everything is over."""
    app = App()
    server = start_in_thread(app)

    def stop(_: int) -> str:
        server.stop()
        return app.events[-1]

    with ThreadPoolExecutor(8) as executor:
        assert list(executor.map(stop, range(8))) == ["lifespan over"] * 8


def test_stop_in_the_servers_own_thread_is_refused() -> None:
    """There it would wait for itself."""
    said: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            for wait in (server.stop, server.wait_closed):
                with pytest.raises(RuntimeError) as caught:
                    wait()
                said.append(str(caught.value))
            server.close()
        await App()(scope, receive, send)

    with start_in_thread(app) as server:
        assert get(server) == "hello"
        assert server.wait_closed()
    assert said == [
        f"{called}() in the server's own thread would wait for itself; use close()"
        for called in ("stop", "wait_closed")
    ]


def test_thread_ends_when_a_handler_has_closed_the_server() -> None:
    """The block goes on, and ends normally."""
    with start_in_thread(App()) as server:
        assert get(server, "/close") == "hello"
        assert server.wait_closed()
        assert not server._thread._thread.is_alive()
        assert is_free(server.port)
    server.stop()


def test_crash_of_a_server_in_a_thread_is_logged_when_it_happens(caplog: pytest.LogCaptureFixture) -> None:
    """Once; and raised by all that wait for the end."""
    app = App()
    server = start_in_thread(app)
    crash(server, app)
    (line,) = logged(caplog)
    assert line == f"{server.url}: the app's lifespan died while it was serving: AppError: the app's own"
    for wait in (server.stop, server.stop, server.wait_closed):
        with pytest.raises(ServerCrashedError) as caught:
            wait()
        assert caught.value.__cause__ is app.error
    assert len(logged(caplog)) == 1


def test_crash_is_raised_at_the_end_of_the_block_of_a_server_in_a_thread() -> None:
    """The block is not interrupted."""
    app = App()
    body = []
    with pytest.raises(ServerCrashedError), start_in_thread(app) as server:
        crash(server, app)
        body.append("is over")
    assert body == ["is over"]


def test_failed_shutdown_of_a_server_in_a_thread_is_raised_and_not_logged(
    clients: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    """By `stop()`, by `wait_closed()`, and at the end of the block."""
    with pytest.raises(ShutdownError):
        start_in_thread(App(shutdown="raises")).stop()
    with pytest.raises(ShutdownError), start_in_thread(App(shutdown="raises")):
        pass
    server = start_in_thread(App(shutdown="raises"))

    def close() -> None:
        while not server._thread.is_awaited:
            pass
        server.close()

    clients.submit(close)
    with pytest.raises(ShutdownError):
        server.wait_closed()
    assert logged(caplog) == []


def test_failed_shutdown_that_nobody_waits_for_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    server = start_in_thread(App(shutdown="raises"))
    assert not server.wait_closed(0)  # who has waited in vain does not count
    server.close()
    server._thread._thread.join()
    assert logged(caplog) == [f"{server.url}: the app's lifespan failed to shut down: AppError: the app's own"]


def test_exception_of_the_block_comes_out_of_a_server_in_a_thread(caplog: pytest.LogCaptureFixture) -> None:
    """The very object; the server's own is its note, and is logged."""
    error = KeyError("the body's own")
    with pytest.raises(KeyError) as caught, start_in_thread(App(shutdown="raises")):
        raise error
    assert caught.value is error
    message = "the app's lifespan failed to shut down: AppError: the app's own"
    assert error.__notes__ == [f"aioserve: the server failed as well: ShutdownError: {message}"]
    assert logged(caplog) == [message]


def test_servers_own_error_that_leaves_the_block_gets_no_note() -> None:
    with pytest.raises(ShutdownError) as caught, start_in_thread(App(shutdown="raises")) as server:
        server.stop()
    assert not hasattr(caught.value, "__notes__")


def test_interrupted_stop_of_a_server_in_a_thread_forces(
    clients: ThreadPoolExecutor, interrupt: Callable[[], None]
) -> None:
    """What a signal handler raises comes out when everything is over; the server's own error is its note."""
    app = Held(ends=False, shutdown="raises")
    server = start_in_thread(app, shutdown_timeout=None)
    asking = clients.submit(get, server, "/hold")
    app.has_begun.wait()

    def interrupt_stop() -> None:
        while not server._server._engine.is_stopping:
            pass
        interrupt()

    clients.submit(interrupt_stop)
    with pytest.raises(AppError) as caught:
        server.stop()
    assert "ShutdownError" in caught.value.__notes__[0]
    assert app.events[-3:] == ["cancelled /hold", "shutdown", "lifespan over"]
    assert asking.result() == "Internal Server Error"


def test_loop_that_the_app_has_stopped_is_a_crash(caplog: pytest.LogCaptureFixture) -> None:
    """It is logged when it happens, and the server closes all the same."""

    class Stopping(App):
        async def request(self, scope: Scope, receive: Receive, send: Send) -> None:
            asyncio.get_running_loop().stop()
            await super().request(scope, receive, send)

    app = Stopping()
    server = start_in_thread(app)
    try:
        get(server)
    except httpx.HTTPError:
        pass
    server._thread._thread.join()
    message = "the event loop ended before the server: RuntimeError: Event loop stopped before Future completed."
    assert f"{server.url}: {message}" in logged(caplog)
    with pytest.raises(ServerCrashedError) as caught:
        server.stop()
    assert str(caught.value) == message
    assert is_free(server.port)
    assert app.events[-1] == "lifespan over"


def test_stop_does_not_wait_for_what_ignores_its_cancellation(
    clients: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread lives as long as that does; a warning says so."""
    monkeypatch.setattr("aioserve._limits.THREAD_EXIT", 0.05)
    app = Held(ends=False)
    server = start_in_thread(app)
    asking = clients.submit(get, server, "/cling")
    app.has_begun.wait()
    server.stop(0)
    assert is_free(server.port)
    assert logged(caplog)[-1].endswith("has not ended: a task or a function of the app is still running there")
    server._server._loop.call_soon_threadsafe(app.release.set)
    server._thread._thread.join()
    with pytest.raises(httpx.HTTPError):
        asking.result()


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_forked_child_waits_for_nothing_and_closes_nothing() -> None:
    """It has no part in a server of its parent."""

    def end() -> list[object]:
        server.close()
        server.stop()
        with server:
            pass
        return [server.wait_closed()]

    with start_in_thread(App()) as server:
        assert in_child(end) == [True]
        assert get(server) == "hello"
