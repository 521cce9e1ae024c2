"""
An app that can be replaced while it is being served.

`Swappable` is an ASGI app itself, for any server on asyncio, and runs the lifespans of the apps that take its place.
Each app runs in a task of its own. While one app is being replaced, two of them run:

    start            the new app's lifespan starts; the old app answers
    switch           between two turns of the loop; from here on, new requests go to the new app
    finish           the old app's WebSockets get 1012, or 503 where they were not accepted yet; its requests in flight
                     run on, within `shutdown_timeout`
    disconnect       its `receive()` says `http.disconnect`
    force            what is still running is cancelled, and awaited
    end              its lifespan shuts down, after its last request
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from aioserve._errors import StartupError, StartupInterruptedError, describe_error, public
from aioserve._limits import check_timeout
from aioserve._log import logger
from aioserve._running_app import RunningApp
from aioserve._waiting import outlast

if TYPE_CHECKING:
    from aioserve._types import ASGIApp, Receive, Scope, Send


@public
class Swappable:
    """
    An ASGI app that stands for another one, which can be swapped while the server runs.

        swappable = Swappable(app)
        async with serving(swappable, port=8000):
            ...
            await swappable.swap(another_app)

    The server keeps its socket and its connections, and no request is lost. The server can be aioserve's, or any other
    one on asyncio.

    Each app has its own lifespan, which works as with ``lifespan="auto"``, and its own lifespan state. Its requests
    find that in ``scope["state"]``, beside what the server has put there. If the lifespan of the current app dies while
    it serves, the lifespan of the `Swappable` raises the app's exception, and so the server ends.

    Where the server does not run a lifespan (``lifespan="off"``, or a framework that mounts the `Swappable`), the app
    is called as it is, and cannot be swapped.

    Args:
        app: The first app: an ASGI callable (ASGI 3).
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = _check_app(app)
        self._loop: asyncio.AbstractEventLoop | None = None  # the server's, while swaps are possible
        self._running: set[RunningApp] = set()
        self._current: RunningApp | None = None

    @property
    def app(self) -> ASGIApp:
        """The app that answers new requests."""
        return self._app

    async def swap(
        self, app: ASGIApp, *, startup_timeout: float | None = 60.0, shutdown_timeout: float | None = 10.0
    ) -> None:
        """
        Replace the app, and return when the old one has ended.

        The new app's lifespan starts; if that fails, nothing changes. Then new requests go to the new app. The old
        app's WebSockets are closed with 1012, or refused with 503 where it has not accepted them yet; its requests in
        flight may finish. Those that do not finish in time are told ``http.disconnect``, and then cancelled: the client
        gets a 503 if the response had not begun. In the end the old app's lifespan shuts down.

        Several swaps at once are done one after the other, in the order of their calls.

        If this is cancelled before the switch, the new app is shut down again, and the old one stays. After the switch
        the new app stays; the cancellation waits for the end of the old one, and a second one forces that.

        Args:
            app: The new app: an ASGI callable.
            startup_timeout: How long its startup may take, in seconds; `None` is no limit.
            shutdown_timeout: How long the old app's requests in flight may take to finish, in seconds, and then its
                shutdown (at least one second); `None` is no limit.

        Raises:
            StartupError: The new app could not be started; `__cause__` is its own exception. The old one stays.
            StartupTimeoutError: Its startup took too long. The old one stays.
            StartupInterruptedError: The server stopped before the new app had started.
            ShutdownError: The old app's lifespan failed, or did not end in time. The new one stays.
            RuntimeError: The server has not started yet, has stopped, or runs no lifespan; or it was called by a
                request or the lifespan of these apps, and would wait for itself; or from another event loop. (A handler
                that runs in a task of its own, as under Starlette's BaseHTTPMiddleware, is not recognized.)
            TypeError: The app is not callable, or a timeout is not a number.
            ValueError: A timeout is negative.
        """
        _check_app(app)
        startup_timeout = check_timeout("startup_timeout", startup_timeout)
        shutdown_timeout = check_timeout("shutdown_timeout", shutdown_timeout)
        self._check_caller()
        async with self._lock:
            self._check_caller()  # the server may have stopped during the wait
            try:
                new = await self._start(app, startup_timeout)
            except StartupInterruptedError:
                if not self._until_death.expired():
                    raise
                await asyncio.wait({self._lifespan_task})  # so that the server hears of it first
                raise StartupInterruptedError("the current app's lifespan died, and so the server ends") from None
            if self._loop is None:
                await _outlast_tasks({new.task})
                raise StartupInterruptedError("the server stopped before the new app could be switched to")

            assert self._current is not None
            old, self._current, self._app = self._current, new, app
            old.retire(shutdown_timeout)
            try:
                await asyncio.wait({old.task})
            except asyncio.CancelledError:
                await _outlast_tasks({old.task}, old.force)
                if old.error is not None:
                    logger.error("%s", old.error, exc_info=old.error)
                raise
            if old.error is not None:
                raise old.error

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._serve_lifespan(scope, receive, send)
        elif self._current is not None:
            await self._current.answer(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _serve_lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the one lifespan that the server sees."""
        await receive()
        if self._running:  # not before receive(): an app that raises there counts as one without a lifespan
            raise RuntimeError("a Swappable is for one server at a time")
        task = asyncio.current_task()
        assert task is not None
        self._lifespan_task = task
        self._asgi_version: str = scope["asgi"]["version"]
        self._server_state: dict[str, Any] = scope.get("state", {})
        self._lock = asyncio.Lock()
        try:
            self._current = await self._start(self._app, None)
        except StartupError as exc:
            await send({"type": "lifespan.startup.failed", "message": str(exc)})
            error: BaseException | None = exc
        else:
            error = await self._serve_until_shutdown(receive, send)
        if error is not None and error.__cause__ is not None:
            raise error.__cause__  # the app's own, as if the server had called the app itself

    async def _serve_until_shutdown(self, receive: Receive, send: Send) -> BaseException | None:
        try:
            async with asyncio.timeout(None) as self._until_death:
                self._loop = asyncio.get_running_loop()
                await send({"type": "lifespan.startup.complete"})
                await receive()
        except TimeoutError:
            if not self._until_death.expired():
                raise
        finally:
            # No swap can begin any more; and the server has finished its requests by itself.
            self._loop = None
            current, self._current = self._current, None
            assert current is not None
            if not self._lifespan_task.get_loop().is_closed():  # else all of this is garbage
                for running in self._running:
                    running.end()
                late = await _outlast_tasks({running.task for running in self._running}, self._cancel_lifespans)
                if late is not None:
                    raise late
        if current.error is None:
            await send({"type": "lifespan.shutdown.complete"})
        elif current.lifespan.crashed and "aioserve" in self._server_state:
            await send({"type": "aioserve.lifespan.died"})
        elif not self._until_death.expired():
            await send({"type": "lifespan.shutdown.failed", "message": str(current.error)})
        return current.error

    async def _start(self, app: ASGIApp, timeout: float | None) -> RunningApp:
        """Start an app; if it fails, or this is cancelled, nothing is left of it."""
        running = RunningApp(app, dict(self._server_state), self._asgi_version, timeout, self._app_died)
        self._running.add(running)
        running.start()
        running.task.add_done_callback(lambda _: self._running.discard(running))
        try:
            await asyncio.wait({running.started, running.task}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            running.end()
            running.force()
            await _outlast_tasks({running.task})
            raise
        if not running.started.done():
            raise running.error or StartupInterruptedError("the app's own task was cancelled before it had begun")
        if running.lifespan.died:
            await _outlast_tasks({running.task})
            error = running.lifespan.error
            raise StartupError(f"the app's lifespan died as soon as it had started: {describe_error(error)}") from error
        return running

    def _app_died(self, running: RunningApp) -> None:
        if running is self._current and self._loop is not None:
            self._loop = None
            self._until_death.reschedule(0)

    def _cancel_lifespans(self) -> None:
        for running in self._running:
            if running.lifespan.task is not None:
                running.lifespan.task.cancel()

    def _check_caller(self) -> None:
        if self._loop is None:
            raise RuntimeError(
                "swap() works between the server's startup and its shutdown, and only where the server runs the "
                'lifespan: not with lifespan="off", and not where the Swappable is mounted in another app'
            )
        if asyncio.get_running_loop() is not self._loop:
            raise RuntimeError("call swap() in the event loop that the server runs in")
        if any(running.owns(asyncio.current_task()) for running in self._running):
            raise RuntimeError(
                "swap() in a request or the lifespan of a swappable app would wait for itself; "
                "call it in a separate task"
            )


async def _outlast_tasks(
    tasks: Iterable[asyncio.Task[None]], on_cancel: Callable[[], object] = lambda: None
) -> asyncio.CancelledError | None:
    """Wait for the end of tasks, whatever happens; see `outlast()`."""
    tasks = set(tasks)
    return await outlast(lambda: all(task.done() for task in tasks), lambda: asyncio.wait(tasks), on_cancel)


def _check_app(app: object) -> ASGIApp:
    if not callable(app):
        raise TypeError(f"app must be an ASGI callable, not {app!r}")
    return app
