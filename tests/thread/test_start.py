"""
`start_in_thread()`: returns when the server has started, and raises what prevented that; what its `ThreadServer` says.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import pickle
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from aioserve import StartupError, StartupTimeoutError, Stats, _thread, start_in_thread
from tests.helpers.apps import App, AppError, Receive, Scope, Send, without_lifespan
from tests.helpers.processes import is_free

pytestmark = pytest.mark.usefixtures("short_grace")


def get(url: str, path: str = "/") -> str:
    return httpx.get(url + path, trust_env=False).text


def threads() -> list[str]:
    """Return the names of our threads."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("aioserve")]


@pytest.mark.parametrize("http", ["h11", "httptools"])
def test_server_runs_in_a_thread_until_the_block_ends(http: Any) -> None:
    """Then the thread has ended, and the port is free."""
    app = App()
    with start_in_thread(app, http=http) as server:
        assert get(server.url) == "hello"
        assert threads() == [f"aioserve {server.url}"]
    assert threads() == []
    assert is_free(server.port)
    assert app.events == ["startup", "GET /", "answered /", "shutdown", "lifespan over"]


def test_server_in_a_thread_takes_the_options_of_start(tmp_path: Path) -> None:
    """An import string and a Config are apps, too."""
    with start_in_thread("tests.helpers.apps:factory", factory=True, uds=str(tmp_path / "app.sock")) as server:
        assert server.url.startswith("http+unix://")
        assert not hasattr(server, "host")
        assert not hasattr(server, "port")
    with start_in_thread(uvicorn.Config(without_lifespan, port=0, log_config=None)) as server:
        assert get(server.url) == "hello"


def test_server_in_a_thread_speaks_tls(tls: tuple[dict[str, Any], ssl.SSLContext]) -> None:
    options, trusting = tls
    with start_in_thread(App(), **options) as server:
        assert httpx.get(server.url, verify=trusting, trust_env=False).text == "hello"


def test_server_in_a_thread_says_where_it_is_and_how_it_fares() -> None:
    """As a `Server` does."""
    with start_in_thread(App(), host=["127.0.0.1", "::1"]) as server:
        assert get(server.url) == "hello"
        assert server.url == f"http://127.0.0.1:{server.port}"
        assert server.urls == [server.url, f"http://[::1]:{server.port}"]
        assert server.host == "127.0.0.1"
        assert server.state["greeting"] == "hello"
        assert isinstance(server.stats, Stats)
        until = time.monotonic() + 10
        while server.stats.served != 1:  # the client has its answer before that thread has counted it
            assert time.monotonic() < until
        assert server.is_serving()
        assert server.report is None
        assert repr(server) == f"<aioserve.ThreadServer {server.url} serving>"
        assert server._repr_html_().startswith(f'aioserve.ThreadServer <a href="{server.url}"')
        with pytest.raises(TypeError, match=r"^an aioserve\.ThreadServer cannot be pickled; pass its url instead$"):
            pickle.dumps(server)
    assert server.report is not None
    assert not server.report.was_forced
    assert not server.is_serving()
    assert repr(server) == f"<aioserve.ThreadServer {server.url} closed>"


def test_failed_start_in_a_thread_raises_what_start_raises_and_leaves_nothing() -> None:
    """The app's own exception is the cause."""
    app = App(startup="raises")
    with pytest.raises(StartupError) as caught:
        start_in_thread(app)
    assert caught.value.__cause__ is app.error
    with pytest.raises(StartupTimeoutError):
        start_in_thread(App(startup="hangs"), startup_timeout=0.01)
    with pytest.raises(StartupError, match=r"there is no module nowhere in sys\.path"):
        start_in_thread("nowhere:app")
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="in use"):
        start_in_thread(App(), port=taken.getsockname()[1])
    with pytest.raises(TypeError, match="prot"):
        start_in_thread(App(), prot=8000)  # type: ignore[call-arg]
    assert threads() == []


def test_stop_on_signals_is_refused_in_a_thread() -> None:
    """One sentence says why, and what to do."""
    app = App()
    with pytest.raises(RuntimeError) as caught:
        start_in_thread(app, stop_on_signals=True)
    assert str(caught.value) == (
        "stop_on_signals: Python handles SIGINT only in the main thread, and this server is to run in another one; "
        "handle it in the main thread and call close(), which is thread-safe"
    )
    assert app.events == []


def test_loop_that_cannot_be_made_fails_the_start_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the system's error, and no coroutine is left that nobody awaits."""

    def new_event_loop() -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("asyncio.events.new_event_loop", new_event_loop)
    with pytest.raises(OSError, match="Too many open files"):
        start_in_thread(App())


def test_app_in_a_thread_sees_the_context_of_the_caller() -> None:
    """As with `start()`: in its lifespan and in its handlers."""
    variable = contextvars.ContextVar("variable", default="default")
    seen = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append((scope["type"], variable.get()))
        await without_lifespan(scope, receive, send)

    token = variable.set("the caller's")
    with start_in_thread(app) as server:
        variable.reset(token)
        get(server.url)
    # Before uvicorn had the option reset_contextvars, it gave each request an empty context.
    inherited = "reset_contextvars" in inspect.signature(uvicorn.Config).parameters
    assert seen == [("lifespan", "the caller's"), ("http", "the caller's" if inherited else "default")]


async def test_synchronous_client_in_a_running_loop_reaches_a_server_in_a_thread() -> None:
    """As in a cell of a notebook: the server has another loop than the one that the client blocks."""
    with start_in_thread(App()) as server:
        with urllib.request.urlopen(server.url, timeout=10) as response:  # noqa: ASYNC210, S310
            assert response.read() == b"hello"
        assert server._server._loop is not asyncio.get_running_loop()


@pytest.mark.parametrize("startup", ["hangs", "completes"])
def test_interrupted_start_in_a_thread_leaves_nothing(startup: str, interrupt: Callable[[], None]) -> None:
    """What a signal handler raises comes out, when the app has been shut down."""

    class Interrupting(App):
        async def lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
            interrupt()
            await super().lifespan(scope, receive, send)

    app = Interrupting(startup)
    with pytest.raises(AppError, match="SIGUSR1"):
        start_in_thread(app)
    assert app.events[-1:] == ["lifespan over"]
    assert threads() == []


def test_start_in_a_thread_that_is_interrupted_before_its_loop_exists_begins_nothing(
    monkeypatch: pytest.MonkeyPatch, interrupt: Callable[[], None]
) -> None:
    """The loop is made, and nothing runs in it."""
    make = asyncio.events.new_event_loop

    def new_event_loop() -> asyncio.AbstractEventLoop:
        interrupt()
        (thread,) = _thread._running
        while not thread._is_cancelled:
            pass
        return make()

    monkeypatch.setattr("asyncio.events.new_event_loop", new_event_loop)
    app = App()
    with pytest.raises(AppError, match="SIGUSR1"):
        start_in_thread(app)
    assert app.events == []
    assert threads() == []
