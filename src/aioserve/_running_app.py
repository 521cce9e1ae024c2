"""
An app of a `Swappable`, from the start of its lifespan to its end; and its calls, one for each request.

Calls run in the server's own task. To interrupt one, or its `receive()`, an `asyncio.timeout(None)` is rescheduled to
now, so that the server sees no cancellation.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from aioserve import _limits
from aioserve._errors import ShutdownError, StartupError, describe_error
from aioserve._finish import finish, is_event_stream
from aioserve._lifespan import Lifespan
from aioserve._log import logger
from aioserve._report import UnfinishedHandler, unfinished_handler
from aioserve._waiting import Condition, SlowStop, after_turns, let_die_quietly

if TYPE_CHECKING:
    from aioserve._types import ASGIApp, Message, Receive, Scope, Send

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
        self._variables: list[tuple[ContextVar[Any], Any]] = []  # that the app's startup has set

        self.started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.task: asyncio.Task[None]
        """It never raises. Cancelling it only makes it quicker."""

    def start(self) -> None:
        self.task = asyncio.get_running_loop().create_task(self._run(), name="aioserve swappable")
        let_die_quietly(self.task)

    async def _run(self) -> None:
        before = contextvars.copy_context()
        try:
            await self.lifespan.startup(self._startup_timeout)
        except StartupError as exc:
            self.error = exc
            return
        context = self.lifespan.context or before
        self._variables = [(each, value) for each, value in context.items() if before.get(each) is not value]
        self.started.set_result(None)

        # When the loop ends, this task and the server's are both cancelled; the server calls end() after its requests.
        await self._condition.wait_for(lambda: self._retired or self._ended or self.lifespan.died, even_if_forced=True)
        name = "the replaced app"
        slow_stop = SlowStop(self._condition, name)
        if self._retired:
            await finish(self, self._condition, slow_stop, name=name, budget=self._shutdown_timeout)
        elif not self._ended:
            self._on_death(self)
        try:
            await self.lifespan.shutdown(self._shutdown_timeout, slow_stop)
        except ShutdownError as exc:
            self.error = exc

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        for variable, value in self._variables:
            variable.set(value)  # in the context of this request
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
            call.retire()
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

    def handlers(self) -> Collection[_Call]:
        return () if self.is_finished() else self._calls

    def unfinished(self) -> Iterator[tuple[_Call, UnfinishedHandler]]:
        for call in tuple(self._calls):
            yield call, unfinished_handler(call.scope, call.task)

    def disconnect_handlers(self) -> None:
        for call in self._calls:
            call.disconnect()

    def cancel(self, handler: _Call) -> None:
        handler.cancel()

    def abort_connections(self) -> int:
        return 0  # they are the server's


class _ClosedError(OSError):
    """The WebSocket was closed by a swap: in ASGI, a `send()` after a disconnect raises an `OSError`."""


def _is_closed(error: Exception) -> bool:
    return isinstance(error, _ClosedError) or (
        isinstance(error, ExceptionGroup) and error.split(_ClosedError)[1] is None
    )


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
        self._is_open = False  # a WebSocket was accepted, or a response has begun and is not complete
        self._retired = False
        self._closing: asyncio.Task[None] | None = None
        self._until_cancelled: asyncio.Timeout | None = None

    def done(self) -> bool:
        return self.is_done

    def cancelling(self) -> int:
        return self.task.cancelling()

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
                    elif error is None and self._disconnected and self._is_open and is_event_stream(self.scope):
                        await self._send_last(self._send({"type": "http.response.body", "body": b""}))
                finally:
                    self._until_cancelled = None
                # An app may send to a client that has gone, as with any server.
                if error is not None and not _is_closed(error):
                    raise error
        except TimeoutError:
            if not until_cancelled.expired():
                raise
        finally:
            if self._closing is not None:
                self._closing.cancel()
        if (self._disconnected or until_cancelled.expired()) and not self._answered:
            await self._refuse()

    async def receive(self) -> Message:
        if not self._disconnected:
            try:
                async with asyncio.timeout(None) as until_disconnected:
                    self._receiving.add(until_disconnected)
                    try:
                        message: Message = await self._receive()
                    finally:
                        self._receiving.discard(until_disconnected)
                # The server's own disconnect may come first, where tasks start eagerly; it has another code.
                if not self._disconnected or message["type"] != "websocket.disconnect":
                    return message
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
        if message["type"] == "http.response.body":
            self._is_open = message.get("more_body", False)
        elif message["type"] in ("websocket.accept", "http.response.start"):
            self._is_open = True
        if self._retired:
            self.retire()

    def retire(self) -> None:
        """
        Close a WebSocket with 1012, and tell an event stream of a disconnect: now, or when it is open.

        A WebSocket that is not accepted within a few turns of the loop is refused with 503.
        """
        if not self._retired and self.scope["type"] == "websocket":
            after_turns(self.task.get_loop(), _limits.SETTLING_TURNS, self._refuse_websocket)
        self._retired = True
        if self._is_open and is_event_stream(self.scope):
            self.disconnect()
        elif self._is_open and self.scope["type"] == "websocket" and self._closing is None:
            self._close(self._send({"type": "websocket.close", "code": SERVICE_RESTART}))

    def _refuse_websocket(self) -> None:
        if not self._answered and not self.is_done:
            self._answered = True
            self._close(self._refuse())

    def _close(self, sending: Awaitable[None]) -> None:
        sending_last = self._send_last(sending)
        self._closing = self.task.get_loop().create_task(sending_last, name="aioserve websocket")
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

    async def _send_last(self, sending: Awaitable[None]) -> None:
        try:
            await sending
        except Exception as exc:  # noqa: BLE001 (each server has its own for a client that is gone, or too short a body)
            logger.debug("a stream or a WebSocket could not be ended: %s", describe_error(exc))

    async def _refuse(self) -> None:
        """Send a response with 503, or 403 for a WebSocket where the server knows no other."""
        headers = [(b"content-type", b"text/plain"), (b"retry-after", b"0")]
        if self.scope["type"] == "http":
            headers.append((b"content-length", b"%d" % len(_REPLACED)))
            await self._send({"type": "http.response.start", "status": 503, "headers": headers})
            await self._send({"type": "http.response.body", "body": _REPLACED})
        elif "websocket.http.response" in (self.scope.get("extensions") or {}):
            # Without a length: uvicorn's websockets-sansio gave two until 0.53.
            await self._send({"type": "websocket.http.response.start", "status": 503, "headers": headers})
            await self._send({"type": "websocket.http.response.body", "body": _REPLACED})
            for _ in range(_limits.SETTLING_TURNS):  # until the connection is lost, that takes it for incomplete
                await asyncio.sleep(0)
        else:
            await self._send({"type": "websocket.close", "code": SERVICE_RESTART})
