"""
Rule 1 of the exit contract: when the start fails, the error is raised, the body never runs, and nothing is left.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import pytest

from aioserve import Server, StartupError, StartupTimeoutError, serving
from tests.helpers.apps import App, AppError
from tests.helpers.privileges import unprivileged
from tests.helpers.ways import WAYS, Way

pytestmark = pytest.mark.usefixtures("short_grace")


async def never(server: Server) -> None:
    """A body that must not run."""
    raise AssertionError("the body ran")


@contextmanager
def busy_port() -> Iterator[int]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        yield sock.getsockname()[1]


# Kinds of failures: the app and the options, the error, its text, and (where the app raised) the cause.
FAILURES: dict[str, tuple[Any, dict[str, Any], type[Exception], str, type[BaseException] | None]] = {
    "unresolvable host": (App, {"host": "no-such-host.invalid"}, socket.gaierror, "no-such-host.invalid", None),
    "impossible host": (App, {"host": "x" * 70 + ".invalid"}, socket.gaierror, "cannot resolve host 'xxx", None),
    "not our address": (App, {"host": "192.0.2.1"}, OSError, "192.0.2.1", None),
    "one of two hosts": (App, {"host": ["127.0.0.1", "192.0.2.1"]}, OSError, "192.0.2.1", None),
    "missing certificate": (App, {"ssl_certfile": "/no/such.pem"}, FileNotFoundError, "/no/such.pem", None),
    "no such module": ("no_such_module:app", {}, StartupError, "no_such_module", None),
    "no such attribute": ("tests.helpers.apps:no_such_app", {}, StartupError, "no_such_app", None),
    "module raises": (
        "tests.helpers.broken_module:app",
        {},
        StartupError,
        "tests.helpers.broken_module:app.*at import",
        AppError,
    ),
    "module exits": (
        "tests.helpers.exiting_module:app",
        {},
        StartupError,
        "exiting_module:app: SystemExit: 7",
        SystemExit,
    ),
    "factory raises": ("tests.helpers.apps:broken_factory", {"factory": True}, StartupError, "factory's own", AppError),
    "factory is async": (
        "tests.helpers.apps:async_factory",
        {"factory": True},
        StartupError,
        "coroutine function",
        None,
    ),
    "not callable": ("tests.helpers.apps:not_callable", {}, StartupError, "42", None),
    "raises before receive": (lambda: App("raises early"), {"lifespan": "on"}, StartupError, "app's own", AppError),
    "raises": (lambda: App("raises"), {}, StartupError, "app's own", AppError),
    "startup.failed": (lambda: App("fails"), {}, StartupError, "app's own", AppError),
    "startup.failed, no message": (
        lambda: App("fails without a word"),
        {},
        StartupError,
        "failed to start, without a reason",
        None,
    ),
    "startup.failed, then hangs": (lambda: App("fails and hangs"), {}, StartupError, "as told", None),
    "startup.failed, no exception": (lambda: App("fails quietly"), {}, StartupError, "as told", None),
    "startup hangs": (lambda: App("hangs"), {"startup_timeout": 0.01}, StartupTimeoutError, "0.01", TimeoutError),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(("app", "options", "error", "text", "cause"), FAILURES.values(), ids=FAILURES)
async def test_failed_start_raises_and_leaves_nothing(
    app: Any,
    options: dict[str, Any],
    error: type[Exception],
    text: str,
    cause: type[BaseException] | None,
    way: Way,
) -> None:
    """Each kind of failure has its own error, which says what was wrong; the body never runs."""
    made = app if isinstance(app, str) else app()

    with pytest.raises(error, match=text) as caught:
        await way(made, never, **options)

    assert type(caught.value) is error or error is OSError
    if cause is None:
        assert not isinstance(caught.value.__cause__, (AppError, asyncio.CancelledError))
    else:
        assert isinstance(caught.value.__cause__, cause)
    if isinstance(made, App) and cause is AppError:
        assert caught.value.__cause__ is made.error


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
async def test_busy_port_is_an_os_error_that_names_the_port(way: Way) -> None:
    """It is the system's own error, unchanged, and the app has not been started."""
    app = App()

    with busy_port() as port, pytest.raises(OSError, match=f"127.0.0.1:{port}") as caught:
        await way(app, never, port=port)

    assert caught.value.errno == errno.EADDRINUSE
    assert app.events == []


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
async def test_port_without_permission_is_a_permission_error(way: Way) -> None:
    """A port below 1024 without the privilege."""
    with unprivileged(), pytest.raises(PermissionError, match=r"127\.0\.0\.1:1: .*privilege"):
        await way(App(), never, port=1)


async def cancelled_natively(run: Callable[[], Any], starting: asyncio.Event) -> None:
    task = asyncio.create_task(run())
    await starting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelling() == 1


async def cancelled_by_a_scope(run: Callable[[], Any], starting: asyncio.Event) -> None:
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as task_group:
            task_group.start_soon(run)
            await starting.wait()
            scope.cancel()
    assert scope.cancelled_caught


async def cancelled_by_a_timeout(run: Callable[[], Any], starting: asyncio.Event) -> None:
    async def expire(timeout: asyncio.Timeout) -> None:
        await starting.wait()
        timeout.reschedule(0)

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(None) as timeout:
            expiring = asyncio.create_task(expire(timeout))
            await run()
    await expiring


CANCELLATIONS = {"natively": cancelled_natively, "scope": cancelled_by_a_scope, "timeout": cancelled_by_a_timeout}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("cancelled", CANCELLATIONS.values(), ids=CANCELLATIONS)
async def test_cancelled_start_leaves_nothing(cancelled: Any, way: Way) -> None:
    """The app's startup is cancelled as well, and awaited."""

    class Starting(App):
        async def lifespan(self, *args: Any) -> None:
            starting.set()
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0)
                self.events.append("cleaned up")

    starting, app = asyncio.Event(), Starting()

    await cancelled(lambda: way(app, never), starting)

    assert app.events == ["cleaned up", "lifespan over"]


async def test_startup_that_swallows_its_cancellation_does_not_block_the_start() -> None:
    """It has a bounded time; if it goes on then, its task is left to the app."""
    release = asyncio.Event()
    app = App()
    app.release = release

    async def cling(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await app.cling()

    with pytest.raises(StartupTimeoutError):
        async with serving(cling, startup_timeout=0.01):
            raise AssertionError

    release.set()
    await until_alone()


async def until_alone() -> None:
    """Wait for the end of what a test has left behind on purpose."""
    others = {task for task in asyncio.all_tasks() if "lifespan" in task.get_name()}
    await asyncio.wait(others)


async def test_app_can_close_its_server_during_its_startup() -> None:
    """As with uvicorn, the startup completes, then the server stops; the block ends normally."""
    ran = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        scope["state"]["aioserve"].close()
        await send({"type": "lifespan.startup.complete"})
        await receive()

    async with serving(app) as server:
        await server.wait_closed()
        ran.append(True)

    assert ran


async def test_app_that_forces_its_server_to_stop_during_its_startup_has_failed() -> None:
    """There is no server then, and the body cannot run."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        scope["state"]["aioserve"].close(timeout=0)
        await asyncio.Event().wait()

    with pytest.raises(StartupError, match="told to stop"):
        async with serving(app):
            raise AssertionError
