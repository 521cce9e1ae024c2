"""
An app of a `Swappable`, from the start of its lifespan to its end; and its calls, one for each request.

A call stays in the task that the server has made for its request. Where something has to be interrupted there (the
call itself, or its `receive()`), an `asyncio.timeout()` without a time does it, whose time is set to now: a
cancellation that nobody sees outside of it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from aioserve._errors import ShutdownError, StartupError
from aioserve._finish import finish
from aioserve._lifespan import Lifespan
from aioserve._report import UnfinishedHandler, unfinished_handler
from aioserve._types import ASGIApp, Message, Receive, Scope, Send
from aioserve._waiting import Condition, let_die_quietly

logger = logging.getLogger("aioserve")

SERVICE_RESTART = 1012
_REPLACED = b"The app that should have answered this was replaced. Please try again.\n"


class RunningApp:
    """An app from the start of its lifespan to its end, and the requests that it answers."""

    def __init__(
        self,
        app: ASGIApp,
        state: dict[str, Any],
        asgi_version: str,
        startup_timeout: float | None,
        on_death: Callable[[RunningApp], None],
    ) -> None:
        self.error: StartupError | ShutdownError | None = None
        self._app = app
        self._condition = Condition()
        self.lifespan = Lifespan(app, mode="auto", asgi_version=asgi_version, state=state, condition=self._condition)
        self._startup_timeout = startup_timeout
        self._shutdown_timeout: float | None = None
        self._on_death = on_death
        self._calls: set[_Call] = set()
        self._retired = False
        self._ended = False

        self.started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.task: asyncio.Task[None]
        """It never raises. Cancelling it only makes it quicker."""

    def start(self) -> None:
        self.task = asyncio.get_running_loop().create_task(self._run(), name="aioserve swappable")
        let_die_quietly(self.task)

    async def _run(self) -> None:
        try:
            await self.lifespan.startup(self._startup_timeout)
        except StartupError as exc:
            self.error = exc
            return
        self.started.set_result(None)

        # At the end of a loop this task is cancelled as well as its server. The server calls end() after its requests.
        await self._condition.wait_for(lambda: self._retired or self._ended or self.lifespan.died, even_if_forced=True)
        if self._retired:
            await finish(self, self._condition, name="the replaced app", budget=self._shutdown_timeout)
        elif not self._ended:
            self._on_death(self)
        try:
            await self.lifespan.shutdown(self._shutdown_timeout)
        except ShutdownError as exc:
            self.error = exc

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = {**self.lifespan.state, **scope.get("state", {})}
        call = _Call({**scope, "state": state}, receive, send)
        self._calls.add(call)
        try:
            await call.run(self._app)
        finally:
            self._calls.discard(call)
            call.is_done = True
            self._condition.notify()

    def retire(self, timeout: float | None) -> None:
        """Finish within a time, and then end: there will be no more requests."""
        self._retired = True
        self._shutdown_timeout = timeout
        for call in self._calls:
            call.close_websocket()
        self._condition.notify()

    def end(self) -> None:
        """End, whatever requests there are; a start that is not complete is given up."""
        self._ended = True
        if not self.started.done():
            self.force()
        self._condition.notify()

    def force(self) -> None:
        """End soon: from here on only what was cancelled is waited for, for a limited time."""
        self._condition.force()

    def owns(self, task: asyncio.Task[Any] | None) -> bool:
        return task is self.lifespan.task or any(call.task is task for call in self._calls)

    # The requests that have to be finished; see `finish()`.

    def is_finished(self) -> bool:
        return not self._calls or self._ended

    def has_handlers(self) -> bool:
        return not self.is_finished()

    def unfinished(self) -> list[tuple[_Call, UnfinishedHandler]]:
        return [(call, unfinished_handler(call.scope, call.task)) for call in self._calls]

    def disconnect_handlers(self) -> None:
        for call in self._calls:
            call.disconnect()

    def cancel_handlers(self) -> None:
        for call in self._calls:
            call.cancel()

    def abort_connections(self) -> int:
        return 0  # they are the server's


class _ClosedError(OSError):
    """The WebSocket was closed by a swap: in ASGI, a `send()` after a disconnect raises an `OSError`."""


class _Call:
    """A call of an app, for one request or WebSocket, in the server's own task."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.task = task
        self.scope = scope
        self.is_done = False
        self._receive = receive
        self._send = send
        self._receiving: set[asyncio.Timeout] = set()
        self._answered = False  # a response has begun, or a WebSocket was accepted or refused
        self._disconnected = False  # receive() says that the client has gone
        self._is_open = False  # a WebSocket that was accepted, and not closed by a swap
        self._retired = False
        self._closing: asyncio.Task[None] | None = None
        self._until_cancelled: asyncio.Timeout | None = None

    def done(self) -> bool:
        return self.is_done

    async def run(self, app: ASGIApp) -> None:
        until_cancelled = asyncio.timeout(None)
        try:
            async with until_cancelled:
                self._until_cancelled = until_cancelled
                error: Exception | None = None
                try:
                    await app(self.scope, self.receive, self.send)
                except Exception as exc:  # noqa: BLE001 (it is raised when the close was sent)
                    error = exc
                try:
                    if self._closing is not None:
                        await self._closing
                finally:
                    self._until_cancelled = None
                # An app may send to a client that has gone, as with any server.
                if error is not None and not isinstance(error, _ClosedError):
                    raise error
        except TimeoutError:
            if not until_cancelled.expired():
                raise
        finally:
            if self._closing is not None:
                self._closing.cancel()
        if (self._disconnected or until_cancelled.expired()) and not self._answered:
            await self._send_503()

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
        if self.scope["type"] == "http":
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
                self.close_websocket()

    def close_websocket(self) -> None:
        """Close a WebSocket with 1012, now or when it is open."""
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

    def cancel(self) -> None:
        """Cancel the app's call, but not the server's task."""
        if self._until_cancelled is not None:
            self._until_cancelled.reschedule(0)

    async def _close(self) -> None:
        try:
            await self._send({"type": "websocket.close", "code": SERVICE_RESTART})
        except Exception as exc:  # noqa: BLE001 (each server raises its own for a client that has gone)
            logger.debug("a WebSocket could not be closed: %r", exc)

    async def _send_503(self) -> None:
        kind = "http.response" if self.scope["type"] == "http" else "websocket.http.response"
        if kind != "http.response" and kind not in (self.scope.get("extensions") or {}):
            await self._send({"type": "websocket.close", "code": SERVICE_RESTART})
            return
        length = b"%d" % len(_REPLACED)
        headers = [(b"content-type", b"text/plain"), (b"content-length", length), (b"retry-after", b"0")]
        await self._send({"type": f"{kind}.start", "status": 503, "headers": headers})
        await self._send({"type": f"{kind}.body", "body": _REPLACED})
