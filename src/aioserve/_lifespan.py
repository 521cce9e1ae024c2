"""Runs the app's lifespan (ASGI, "Lifespan Protocol", 2.0) and keeps its exception, which uvicorn's own class drops."""

from __future__ import annotations

import asyncio
import contextvars
from typing import TYPE_CHECKING, Any, Literal

from aioserve import _limits
from aioserve._errors import ShutdownError, StartupError, StartupInterruptedError, StartupTimeoutError, describe_error
from aioserve._log import logger
from aioserve._report import line_of
from aioserve._waiting import Condition, SlowStop, start_task

if TYPE_CHECKING:
    from aioserve._types import ASGIApp, Message, Scope


class Lifespan:
    """
    One run of an app's lifespan, in a task of its own.

    With mode "auto" an app may have no lifespan. That is so if it raises before it has called `receive()`, or if it
    took the scope for a request and raised when its answer was refused. An app that began its lifespan and raised has
    failed. With "on" every exception is a failure; with "off" the app is not called.
    """

    should_exit: bool = False
    """As in uvicorn's class: whether the program should exit. It never should."""
    error: BaseException | None = None
    """What the app's lifespan raised."""
    task: asyncio.Task[None] | None = None
    is_stuck: bool = False
    """Whether it was cancelled and is still running."""
    died: bool = False
    """Whether it raised while the app was serving. One that returned has nothing to do at the shutdown."""
    context: contextvars.Context | None = None
    """The context of the app's startup, which may have set some variables for the handlers; `None` without one."""

    _startup_received: bool = False
    _started: bool = False  # it has sent startup.complete
    _refused: bool = False  # it has sent something that is not a lifespan message
    _failure: str | None = None  # the message of its startup.failed or shutdown.failed
    _awaits_shutdown: bool = False
    _shutdown_received: bool = False
    _was_told: bool = False  # it was told to shut down before it raised
    _awaits_more: bool = False  # it calls receive() again, and no message is left
    _abandoned: bool = False  # we have cancelled it

    def __init__(
        self,
        app: ASGIApp,
        *,
        mode: Literal["auto", "on", "off"],
        asgi_version: str,
        state: dict[str, Any],
        condition: Condition,
    ) -> None:
        self.state = state
        self.is_over: bool = mode == "off"
        self._app = app
        self._mode = mode
        self._asgi_version = asgi_version
        self._condition = condition
        self._shutdown = asyncio.Event()

    @property
    def crashed(self) -> bool:
        """Whether it raised before it was told to shut down: by its message, or by the end of `asyncio.run()`."""
        is_end = self._condition.forced and isinstance(self.error, asyncio.CancelledError)
        return self.died and not self._was_told and not is_end

    async def startup(self, timeout: float | None) -> None:
        """
        Wait until the app has started.

        Raises:
            StartupError: It failed; its own exception is the `__cause__`.
            StartupTimeoutError: It took longer than `timeout` seconds, and was cancelled.
            StartupInterruptedError: The server was forced before, and so it was cancelled.
        """
        if self.is_over:
            return

        self.task = start_task(self._run(), name="aioserve lifespan", if_delayed=self._ended)
        if not await self._condition.wait_for(
            lambda: self._started or self._failure is not None or self.is_over, timeout
        ):
            where = self._where()
            await self._abandon()
            if self._condition.forced:
                raise StartupInterruptedError("the server was told to stop before the app's lifespan had started")
            message = (
                f"the app's lifespan did not start within startup_timeout={timeout:g} seconds{where}; it was cancelled"
            )
            raise StartupTimeoutError(message) from TimeoutError(message)

        if self._failure is not None:
            # Its exception comes a moment after its message.
            if not await self._condition.wait_for(lambda: self.is_over, _limits.LIFESPAN_GRACE):
                await self._abandon()
            error = self._app_error()
            raise StartupError(_failed("start", error, self._failure)) from error

        if self.error is not None and not self._started:
            if self._mode == "auto" and (self._refused or not self._startup_received):
                logger.info("the app has no lifespan: %s", describe_error(self.error))
                return
            raise StartupError(_failed("start", self.error)) from self.error

    def request_shutdown(self) -> None:
        """Send the app its shutdown message now, if it is waiting for it. `shutdown()` sends it in any case."""
        if self._awaits_shutdown:
            self._shutdown.set()

    async def shutdown(self, timeout: float | None, slow_stop: SlowStop) -> None:
        """
        Let the app shut down, within `timeout` seconds: at least `LIFESPAN_GRACE`, and no more than that when forced.

        Raises:
            ShutdownError: It failed, or took longer and was cancelled.
        """
        if not self._started:
            return
        if not self.is_over:
            self._shutdown.set()
            time = self._condition.loop.time
            grace = _limits.LIFESPAN_GRACE
            bound = None if timeout is None else max(timeout, grace)

            def has_ended() -> bool:
                return self._awaits_more or self.is_over

            began = time()
            ended = await slow_stop.wait_for(
                has_ended, bound, lambda: f"the shutdown of the app's lifespan{self._where()}"
            )
            if self._condition.forced and not ended:
                left = grace if bound is None else max(0.0, min(grace, began + bound - time()))
                ended = await self._condition.wait_for(has_ended, left, even_if_forced=True)
            took = time() - began
            where = "" if ended else self._where()
            if not self.is_over:
                await self._abandon()
            if not ended:
                outcome = "cancelled, and is still running" if self.is_stuck else "cancelled"
                limit = "a forced stop" if self._condition.forced else "the shutdown_timeout, but at least 1 s"
                allowed = f"{took:.3g} s ({limit})"
                message = f"the app's lifespan did not shut down within {allowed}{where}; it was {outcome}"
                raise ShutdownError(message) from (self._app_error() or TimeoutError(message))

        error = self._app_error()
        if error is not None and self.crashed:
            raise ShutdownError(
                f"the app's lifespan died before it was told to shut down: {describe_error(error)}"
            ) from error
        if self._failure is not None or error is not None:
            raise ShutdownError(_failed("shut down", error, self._failure)) from error

    async def _abandon(self) -> None:
        if self.task is None or self.is_over:
            return
        self._abandoned = True
        self._shutdown.set()  # one that swallows its cancellation can still receive the message
        self.task.cancel()
        self.is_stuck = not await self._condition.wait_for(
            lambda: self.is_over, _limits.LIFESPAN_GRACE, even_if_forced=True
        )
        if self.is_stuck:
            logger.warning("the app's lifespan is stuck: %s was cancelled and is still running", self.task)

    async def _run(self) -> None:
        self.task = asyncio.current_task()  # an eager task runs before its maker has it
        asgi = {"version": self._asgi_version, "spec_version": "2.0"}
        scope: Scope = {"type": "lifespan", "asgi": asgi, "state": self.state}
        try:
            await self._app(scope, self._receive, self._send)
        except BaseException as exc:  # noqa: BLE001
            # SystemExit and KeyboardInterrupt too: they would leave the task, and stop the loop and the program.
            self.error = exc
            self.died = self._started
            self._was_told = self._shutdown_received or self._abandoned
        self.is_over = True
        if self.task is not None and self.task.get_loop().is_closed():
            return  # it was closed under us, and this is garbage now
        self._shutdown.set()  # for a task of the app's that is still in receive()
        self._condition.notify()

    def _ended(self, _: object) -> None:
        """Notice the end of a task that was cancelled before its first step, so that `_run()` never ran."""
        if not self.is_over:
            self.is_over = self._startup_received = True
            self.error = asyncio.CancelledError()
            self._condition.notify()

    async def _receive(self) -> Message:
        if not self._startup_received:
            self._startup_received = True
            return {"type": "lifespan.startup"}

        if self._shutdown_received:
            self._awaits_more = True
            self._condition.notify()
            await asyncio.Event().wait()

        self._awaits_shutdown = True
        try:
            await self._shutdown.wait()
        except asyncio.CancelledError:
            # Who cancelled? At its end `asyncio.run()` cancels every task: then the server is forced too, and this
            # lifespan gets its shutdown message. Any other cancellation is the app's own. One turn later we know.
            await asyncio.sleep(0)
            if self.is_over or self._abandoned or not self._condition.forced:
                raise
            await self._shutdown.wait()
        self._shutdown_received = True
        return {"type": "lifespan.shutdown"}

    async def _send(self, message: Message) -> None:
        match message["type"]:
            case "lifespan.startup.complete":
                self._started = True
                self.context = contextvars.copy_context()
            case "lifespan.startup.failed" | "lifespan.shutdown.failed":
                self._failure = str(message.get("message") or "")
            case "lifespan.shutdown.complete":
                pass  # its return is what counts: clean-up may follow this message
            case "aioserve.lifespan.died":
                self._shutdown_received = False  # only by the `Swappable`, and not by its app
            case other:
                self._refused = True
                raise RuntimeError(f"a lifespan cannot send {other!r}; the scope's type is 'lifespan', not 'http'")
        self._condition.notify()

    def _where(self) -> str:
        where = "" if self.task is None else line_of(self.task)
        return f", waiting at {where}" if where else ""

    def _app_error(self) -> BaseException | None:
        ours = self._abandoned and isinstance(self.error, asyncio.CancelledError)
        return None if ours else self.error


def _failed(to_do: str, error: BaseException | None, message: str | None = None) -> str:
    reason = describe_error(error) if error is not None else message
    return f"the app's lifespan failed to {to_do}{f': {reason}' if reason else ', without a reason'}"
