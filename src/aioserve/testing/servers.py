"""Servers for tests: a test fails if its server had to use force to stop."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from types import TracebackType
from typing import Unpack

import uvicorn

from aioserve._errors import ServingError, add_note
from aioserve._options import App, Options
from aioserve._server import Server
from aioserve._serving import start
from aioserve._thread import ServerThread, ThreadServer
from aioserve.testing import app_errors

SHUTDOWN_TIMEOUT = 1.0
_BEFORE_APP = ("aioserve.", "uvicorn.")


@asynccontextmanager
async def server(app: App, **options: Unpack[Options]) -> AsyncIterator[Server]:
    """
    Serve an ASGI app for a block of a test.

    Args:
        app: As in `aioserve.serving()`.
        options: As in `aioserve.serving()`; but `disconnect_after` defaults to 0, and `shutdown_timeout` to 1 second.

    Yields:
        Server: The running server.

    Raises:
        AssertionError: At the end, handlers had to be cancelled, or connections dropped; the message says which.
        ServerCrashedError: The app's lifespan died in the block; this is raised at its end.
        OSError, StartupError, ShutdownError, TypeError, ValueError, RuntimeError: As in `aioserve.serving()`.
    """
    __tracebackhide__ = True
    async with await start_checked(app, options) as running:
        yield running


@contextmanager
def live_server(app: App, **options: Unpack[Options]) -> Iterator[Server]:
    """
    Serve an ASGI app in a thread for a block of a synchronous test.

        with testing.live_server(app) as live:
            response = requests.get(live.url)

    Args:
        app: As in `aioserve.serving()`.
        options: As in `server()`.

    Yields:
        Server: The running server; of its methods, only `close()` can be called from other threads.

    Raises:
        AssertionError, ServingError, OSError, TypeError, ValueError: As in `server()`.
    """
    __tracebackhide__ = True
    with start_checked_in_thread(app, options) as live:
        yield live._server


class CheckedServer:
    """Closes a server, and raises an error if that took force."""

    def __init__(self, server: Server) -> None:
        self.server = server

    async def __aenter__(self) -> Server:
        return self.server

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        __tracebackhide__ = True
        if self.server._awaited:
            return
        raised = exc
        try:
            await self.server.__aexit__(exc_type, exc, tb)
        except BaseException as failure:
            add_note(failure, f"aioserve: this happened to {self.server.url}")
            raised = failure
            if isinstance(failure, ServingError):
                hide_our_frames(failure)
            raise
        finally:
            if forced := self._forced():
                if raised is None:
                    raise AssertionError(
                        f"{forced}. Stop what the test started, find out why the handler does not end, or set a "
                        "longer shutdown_timeout"
                    )
                add_note(raised, f"aioserve: {forced}")

    def _forced(self) -> str | None:
        report = self.server.report
        if report is None or not (report.aborted or report.cancelled):
            return None  # a lifespan that is stuck has raised an error already
        summary = report.summary_of_test(self.server.url)
        if any(handler.stuck for handler in report.cancelled) and sys.__stderr__ is not None:
            # pytest shows what it captures only when the test has ended; this one may not, since its loop waits.
            print(f"\naioserve: {summary}", file=sys.__stderr__, flush=True)
        return summary


async def start_checked(app: App, options: Options) -> CheckedServer:
    """Start a server with the defaults for tests."""
    __tracebackhide__ = True
    defaults: Options = {"disconnect_after": 0}
    if not (isinstance(app, uvicorn.Config) and app.timeout_graceful_shutdown is not None):
        defaults["shutdown_timeout"] = SHUTDOWN_TIMEOUT
    completed: Options = {**defaults, **options}
    try:
        running = await start(app, **completed)
    except (ServingError, OSError, TypeError, ValueError, RuntimeError) as exc:
        hide_our_frames(exc)
        raise
    app_errors.record(running)
    return CheckedServer(running)


def start_checked_in_thread(app: App, options: Options) -> ThreadServer:
    """Start the same in a thread; its end raises what a `CheckedServer` raises."""
    __tracebackhide__ = True
    return ThreadServer(ServerThread(partial(start_checked, app, options)).begin())


def hide_our_frames(error: BaseException) -> None:
    """
    Let an error show what it says, and where in the app its cause was raised.

    Its own traceback begins where it is raised again.
    """
    cause = error.__cause__
    if cause is not None:
        frames = cause.__traceback__
        while frames is not None and frames.tb_frame.f_globals.get("__name__", "").startswith(_BEFORE_APP):
            frames = frames.tb_next
        cause.__traceback__ = frames or cause.__traceback__
    error.__traceback__ = None
