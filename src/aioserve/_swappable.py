"""
An app that can be replaced while it is being served.

`Swappable` is an ASGI app itself, for any server on asyncio, and runs the lifespans of the apps that it stands for.
Each of these has a *life*, in a task of its own; two lives overlap while one app is being replaced by another:

    start            the new app's lifespan starts; the old app answers
    switch           between two turns of the loop; from here on, new requests are the new app's
    finish           the old app's WebSockets get 1012; its requests in flight run on, within `shutdown_timeout`
    persuade, force  its `receive()` says `http.disconnect`; what goes on all the same is cancelled, and awaited
    end              its lifespan shuts down, after its last request

A request stays in the task that the server has made for it. What has to be interrupted there (the old app's call, or
its `receive()`) is so by an `asyncio.timeout()` without a time, until it has to end at once: a cancellation that nobody
sees outside of it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import anyio

from aioserve._errors import ShutdownError, StartupError, StartupInterruptedError
from aioserve._lifespan import Lifespan, describe
from aioserve._options import check_timeout
from aioserve._shutdown import FAREWELL_TURNS
from aioserve._waiting import Waiting

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aioserve._options import Message, Receive, Scope, Send

logger = logging.getLogger("aioserve")

SERVICE_RESTART = 1012
SORRY = b"The app that was to answer this has been replaced. Please ask again.\n"


class Swappable:
    """
    An ASGI app that stands for another one, which can be swapped while the server runs.

        swappable = Swappable(app)
        async with serving(swappable, port=8000):
            ...
            await swappable.swap(another_app)

    The server keeps its socket and its connections, and no request is lost. It can be `serving()`, or any other server
    that runs on asyncio.

    Each app has its own lifespan, with the semantics of ``lifespan="auto"``, and its own lifespan state, which its
    requests find in ``scope["state"]`` beside what the server has put there. If the lifespan of the current app dies
    while it serves, the server is told: this one's lifespan raises the app's exception.

    Where the server does not run a lifespan (``lifespan="off"``, or a framework that mounts this), the app is called as
    it is, and cannot be swapped.

    Args:
        app: The first app: an ASGI callable (ASGI 3).
    """

    def __init__(self, app: Callable[..., Any]) -> None:
        self._app = _check_app(app)
        self._loop: asyncio.AbstractEventLoop | None = None  # the server's, while swaps are possible
        self._lives: set[_Life] = set()
        self._current: _Life | None = None

    @property
    def app(self) -> Callable[..., Any]:
        """The app that answers new requests."""
        return self._app

    async def swap(
        self, app: Callable[..., Any], *, startup_timeout: float | None = 60.0, shutdown_timeout: float | None = 10.0
    ) -> None:
        """
        Replace the app, and return when the old one has ended.

        The new app's lifespan starts; if that fails, nothing changes. Then new requests are the new app's. The old
        one's WebSockets are closed with 1012; its requests in flight may finish. Those that do not in time are told
        ``http.disconnect``, and then cancelled: the client gets a 503, if the response had not begun. At last the old
        app's lifespan ends.

        Several swaps at once are done one after the other, in the order of their calls.

        If this is cancelled before the switch, the new app is shut down again, and the old one goes on. After the
        switch, the new app stays; the cancellation waits for the end of the old one, and a second one forces it.

        Args:
            app: The new app: an ASGI callable.
            startup_timeout: How long its startup may take, in seconds; `None` is no limit.
            shutdown_timeout: How long the old app's requests in flight may take to finish, in seconds, and then its
                shutdown (at least one second); `None` is no limit.

        Raises:
            StartupError: The new app could not be started; `__cause__` is its own exception. The old one goes on.
            StartupTimeoutError: Its startup took too long. The old one goes on.
            StartupInterruptedError: The server has begun to end the lifespan, and the new app with it.
            ShutdownError: The old app's lifespan failed, or did not end in time. The new one goes on.
            RuntimeError: The server has not started yet, has stopped, or runs no lifespan; or a request or the lifespan
                of these apps calls this, and would wait for itself; or it is called from another event loop. (A request
                whose handler runs in a task of its own, as under Starlette's BaseHTTPMiddleware, is not known as one.)
            TypeError: The app is not callable, or a timeout not a number.
            ValueError: A timeout is negative.
        """
        _check_app(app)
        startup_timeout = check_timeout("startup_timeout", startup_timeout)
        shutdown_timeout = check_timeout("shutdown_timeout", shutdown_timeout)
        self._check_caller()
        async with self._lock:
            self._check_caller()  # while it waited its turn, the server may have stopped
            try:
                new = await self._begin(app, startup_timeout)
            except StartupInterruptedError:
                if not self._until_death.expired():
                    raise
                await asyncio.wait({self._serving})  # so that the server, which knows what to do, comes first
                raise StartupInterruptedError("the current app's lifespan died, and so the server ends") from None
            if self._loop is None:
                await _outlast({new.task})
                raise StartupInterruptedError("the server stopped before the new app could be switched to")

            assert self._current is not None
            old, self._current, self._app = self._current, new, app
            old.retire(shutdown_timeout)
            try:
                await asyncio.wait({old.task})
            except asyncio.CancelledError:
                await _outlast({old.task}, old.force)
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
        """Be the one lifespan that the server sees."""
        await receive()
        if self._lives:  # not before: an app that raises there seems to do without a lifespan
            raise RuntimeError("a Swappable is for one server at a time")
        serving = asyncio.current_task()
        assert serving is not None
        self._serving = serving
        self._asgi_version: str = scope["asgi"]["version"]
        self._server_state: dict[str, Any] = scope.get("state", {})
        self._lock = asyncio.Lock()
        try:
            self._current = await self._begin(self._app, None)
        except StartupError as exc:
            await send({"type": "lifespan.startup.failed", "message": str(exc)})
            error: BaseException | None = exc
        else:
            error = await self._serve_until_told(receive, send)
        if error is not None and error.__cause__ is not None:
            raise error.__cause__  # the app's own, as if the server had called the app itself

    async def _serve_until_told(self, receive: Receive, send: Send) -> BaseException | None:
        died = False
        try:
            async with asyncio.timeout(None) as self._until_death:
                self._loop = asyncio.get_running_loop()
                await send({"type": "lifespan.startup.complete"})
                await receive()
        except TimeoutError:
            if not self._until_death.expired():
                raise
            died = True
        finally:
            # Swaps are over; and the server, which sees to its requests itself, has none left.
            self._loop = None
            current, self._current = self._current, None
            assert current is not None
            for life in self._lives:
                life.end()
            late = await _outlast({life.task for life in self._lives}, self._give_up)
            if late is not None:
                raise late
        if current.error is None:
            await send({"type": "lifespan.shutdown.complete"})
        elif not died:
            await send({"type": "lifespan.shutdown.failed", "message": str(current.error)})
        return current.error

    async def _begin(self, app: Callable[..., Any], timeout: float | None) -> _Life:
        """Return an app's life when it has started; if it has failed, or we are cancelled, nothing is left of it."""
        life = _Life(app, dict(self._server_state), self._asgi_version, timeout, self._died)
        self._lives.add(life)
        life.begin()
        life.task.add_done_callback(lambda _: self._lives.discard(life))
        try:
            await asyncio.wait({life.started, life.task}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            life.end()
            life.force()
            await _outlast({life.task})
            raise
        if not life.started.done():
            raise life.error or StartupInterruptedError("its own task was cancelled before it had begun")
        if life.lifespan.died:
            await _outlast({life.task})
            error = life.lifespan.error
            raise StartupError(f"the app's lifespan died as soon as it had started: {describe(error)}") from error
        return life

    def _died(self, life: _Life) -> None:
        if life is self._current and self._loop is not None:
            self._loop = None
            self._until_death.reschedule(0)

    def _give_up(self) -> None:
        for life in self._lives:
            life.give_up()

    def _check_caller(self) -> None:
        if self._loop is None:
            raise RuntimeError(
                "swap() is for the time between the server's startup and its shutdown, and needs the server to run the "
                'lifespan: not with lifespan="off", nor where this is mounted in another app'
            )
        if asyncio.get_running_loop() is not self._loop:
            raise RuntimeError("swap() is for the event loop that the server runs in")
        if any(life.is_ours(asyncio.current_task()) for life in self._lives):
            raise RuntimeError(
                "swap() in a request or the lifespan of a swappable app would wait for itself; "
                "let a task of its own call it"
            )


class _Life:
    """The life of an app, from the start of its lifespan to its end, and the requests that it answers meanwhile."""

    def __init__(
        self,
        app: Callable[..., Any],
        state: dict[str, Any],
        asgi_version: str,
        startup_timeout: float | None,
        on_death: Callable[[_Life], None],
    ) -> None:
        self.error: StartupError | ShutdownError | None = None
        self._app = app
        self._waiting = Waiting()
        self.lifespan = Lifespan(app, mode="auto", asgi_version=asgi_version, state=state, waiting=self._waiting)
        self._startup_timeout = startup_timeout
        self._shutdown_timeout: float | None = None
        self._on_death = on_death
        self._calls: set[_Call] = set()
        self._retired = False
        self._ended = False

        self.started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.task: asyncio.Task[None]
        """It raises nothing, and its end is the end of everything; cancelling it only hurries that."""

    def begin(self) -> None:
        """Start the app's lifespan."""
        self.task = asyncio.get_running_loop().create_task(self._live(), name="aioserve swappable")

    async def _live(self) -> None:
        try:
            await self.lifespan.startup(self._startup_timeout)
        except StartupError as exc:
            self.error = exc
            return
        self.started.set_result(None)

        # A loop that ends cancels this as well as its server; which will tell us when its requests are over.
        await self._waiting.wait_for(lambda: self._retired or self._ended or self.lifespan.died, even_if_forced=True)
        if self._retired:
            await self._finish()
        elif not self._ended:
            self._on_death(self)
        try:
            await self.lifespan.shutdown(self._shutdown_timeout)
        except ShutdownError as exc:
            self.error = exc

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Have the app answer a request, or a WebSocket."""
        state = {**self.lifespan.state, **scope.get("state", {})}
        call = _Call({**scope, "state": state}, receive, send)
        self._calls.add(call)
        try:
            await call.run(self._app)
        finally:
            self._calls.discard(call)
            self._waiting.notify()

    def retire(self, timeout: float | None) -> None:
        """There will be no more requests: finish, within that time, and then end."""
        self._retired = True
        self._shutdown_timeout = timeout
        for call in self._calls:
            call.restart()
        self._waiting.notify()

    def end(self) -> None:
        """End, whatever requests there are; what has not yet started is given up."""
        self._ended = True
        if not self.started.done():
            self.force()
        self._waiting.notify()

    def force(self) -> None:
        """End soon: nothing is waited for any more but what has been cancelled, and that not for long."""
        self._waiting.force()

    def give_up(self) -> None:
        """Pass a cancellation on to the app's lifespan."""
        if self.lifespan.task is not None:
            self.lifespan.task.cancel()

    def is_ours(self, task: asyncio.Task[Any] | None) -> bool:
        """Whether it is the lifespan's task, or a request's or WebSocket's."""
        return task is self.lifespan.task or any(call.task is task for call in self._calls)

    async def _finish(self) -> None:
        def over() -> bool:
            return not self._calls or self._ended

        if await self._waiting.wait_for(over, self._shutdown_timeout):
            return
        late = list(self._calls)
        for call in late:
            call.disconnect()
        await self._waiting.turns(FAREWELL_TURNS)
        for call in self._calls:
            call.cut()
        await self._waiting.wait_for(over, Lifespan.grace, even_if_forced=True)
        shown = [f"{call}, which is stuck" if call in self._calls else str(call) for call in late[:5]]
        logger.warning(
            "an app was swapped out by force; requests that were still running: %d (%s)",
            len(late),
            "; ".join([*shown, "..."] if len(late) > len(shown) else shown),
        )


class _ClosedError(OSError):
    """A WebSocket has been closed by us; in ASGI, to send behind that is an `OSError`."""


class _Call:
    """A call of an app, for one request or WebSocket, in the server's own task."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.task = asyncio.current_task()
        self._scope = scope
        self._receive = receive
        self._send = send
        self._receiving: set[asyncio.Timeout] = set()
        self._answered = False  # a response has begun, or a WebSocket was accepted or refused
        self._disconnected = False  # receive() says that the client has gone
        self._is_open = False  # a WebSocket that was accepted, and not closed by us
        self._retired = False
        self._closing: asyncio.Task[None] | None = None
        self._until_cut: asyncio.Timeout | None = None

    async def run(self, app: Callable[..., Any]) -> None:
        until_cut = asyncio.timeout(None)
        try:
            async with until_cut:
                self._until_cut = until_cut
                error: Exception | None = None
                try:
                    await app(self._scope, self.receive, self.send)
                except Exception as exc:  # noqa: BLE001 (it is raised, once the close is on its way)
                    error = exc
                try:
                    if self._closing is not None:
                        await self._closing
                finally:
                    self._until_cut = None
                # An app that sends to a client which has gone is forgiven, as servers do.
                if error is not None and not isinstance(error, _ClosedError):
                    raise error
        except TimeoutError:
            if not until_cut.expired():
                raise
        finally:
            if self._closing is not None:
                self._closing.cancel()
        if (self._disconnected or until_cut.expired()) and not self._answered:
            await self._apologize()

    async def receive(self) -> Message:
        if not self._disconnected:
            try:
                async with asyncio.timeout(None) as until_disconnected:
                    self._receiving.add(until_disconnected)
                    try:
                        return await self._receive()  # type: ignore[no-any-return]
                    finally:
                        self._receiving.discard(until_disconnected)
            except TimeoutError:
                if not until_disconnected.expired():
                    raise
        if self._scope["type"] == "http":
            return {"type": "http.disconnect"}
        return {"type": "websocket.disconnect", "code": SERVICE_RESTART, "reason": ""}

    async def send(self, message: Message) -> None:
        if self._closing is not None:
            if message["type"] == "websocket.close":
                return
            raise _ClosedError("the WebSocket was closed with 1012: its app has been replaced")
        self._answered = True
        await self._send(message)
        if message["type"] == "websocket.accept":
            self._is_open = True
            if self._retired:
                self.restart()

    def restart(self) -> None:
        """Close a WebSocket with 1012, now or once it is open."""
        self._retired = True
        if self._is_open:
            self._is_open = False
            self._closing = asyncio.get_running_loop().create_task(self._close(), name="aioserve websocket")
            self.disconnect()

    def disconnect(self) -> None:
        """Let `receive()` say that the client has gone; `send()` works as before."""
        self._disconnected = True
        for each in self._receiving:
            each.reschedule(0)
        self._receiving.clear()

    def cut(self) -> None:
        """Cancel the app's call."""
        if self._until_cut is not None:
            self._until_cut.reschedule(0)

    async def _close(self) -> None:
        try:
            await self._send({"type": "websocket.close", "code": SERVICE_RESTART})
        except Exception as exc:  # noqa: BLE001 (each server has its own for a client that has gone)
            logger.debug("a WebSocket could not be closed: %r", exc)

    async def _apologize(self) -> None:
        kind = "http.response" if self._scope["type"] == "http" else "websocket.http.response"
        if kind != "http.response" and kind not in (self._scope.get("extensions") or {}):
            await self._send({"type": "websocket.close", "code": SERVICE_RESTART})
            return
        headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(SORRY)), (b"retry-after", b"0")]
        await self._send({"type": f"{kind}.start", "status": 503, "headers": headers})
        await self._send({"type": f"{kind}.body", "body": SORRY})

    def __str__(self) -> str:
        return f"{self._scope.get('method', 'WEBSOCKET')} {self._scope['path']}"


async def _outlast(
    tasks: Iterable[asyncio.Task[None]], hurry: Callable[[], object] = lambda: None
) -> asyncio.CancelledError | None:
    """Wait for the end of tasks whatever happens; return the cancellation that has hurried them, for the caller."""
    late: asyncio.CancelledError | None = None
    with anyio.CancelScope(shield=True):
        while pending := {task for task in tasks if not task.done()}:
            try:
                await asyncio.wait(pending)
            except asyncio.CancelledError as exc:
                late = late or exc
                hurry()
    return late


def _check_app(app: object) -> Callable[..., Any]:
    if not callable(app):
        raise TypeError(f"app must be an ASGI callable, not {app!r}")
    return app
