"""
Runs the app's lifespan and keeps its exception.

uvicorn has a class for this; it keeps no reference to its task and drops the exception, so that a failed startup can
say neither what failed nor, with ``lifespan="auto"``, that anything did. (ASGI, "Lifespan Protocol", version 2.0.)
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Literal

from aioserve._errors import ShutdownError, StartupError, StartupInterruptedError, StartupTimeoutError
from aioserve._waiting import Waiting, begin

if TYPE_CHECKING:
    from aioserve._options import Message, Scope

logger = logging.getLogger("aioserve")


class Lifespan:
    """
    One run of an app's lifespan, in a task of its own.

    With mode "auto" an app may do without: it does if it raises before it has called `receive()`, or if it took the
    scope for a request, and raised when its answer was refused. An app that began its lifespan and raised has failed.
    With "on" every exception is a failure; with "off" the app is not asked.
    """

    # How long a lifespan that has been cancelled, or that is to end by force, may take to end: seconds.
    grace: float = 1.0

    should_exit: bool = False
    """As in uvicorn's class: whether the program should exit for it. It never should for ours."""

    def __init__(
        self,
        app: Any,
        *,
        mode: Literal["auto", "on", "off"],
        asgi_version: str,
        state: dict[str, Any],
        waiting: Waiting,
    ) -> None:
        self.state = state
        self.error: BaseException | None = None
        """What the app's lifespan raised."""
        self.task: asyncio.Task[None] | None = None

        self._app = app
        self._mode = mode
        self._asgi_version = asgi_version
        self._waiting = waiting

        self._received = False  # it has taken lifespan.startup
        self._refused = False  # it has sent something that is no lifespan message
        self._started = False  # it has sent startup.complete
        self._failure: str | None = None  # the message of its startup.failed or shutdown.failed
        self._shutdown = asyncio.Event()
        self._listens = False  # it has begun to wait for lifespan.shutdown
        self._told = False  # it has taken lifespan.shutdown
        self._spent = False  # it asks for more, and there is no more
        self._abandoned = False  # we have cancelled it
        self.stuck: bool = False
        """Whether it was cancelled, and went on all the same."""
        self.over: bool = mode == "off"

    @property
    def died(self) -> bool:
        """Whether it raised in the middle of serving. One that returns quietly has merely nothing to do at the end."""
        return self.over and self._started and self.error is not None

    async def startup(self, timeout: float | None) -> None:
        """
        Wait until the app has started.

        Raises:
            StartupError: It failed; its own exception is the `__cause__`.
            StartupTimeoutError: It took longer than `timeout` seconds; it has been cancelled.
            StartupInterruptedError: The server was forced meanwhile, and so it was cancelled.
        """
        if self.over:
            return

        self.task = begin(self._run(), name="aioserve lifespan")
        self.task.add_done_callback(self._make_sure)
        if not await self._waiting.wait_for(self._has_answered, timeout):
            await self._abandon()
            if self._waiting.forced:
                raise StartupInterruptedError("the server was told to stop before the app's lifespan had started")
            message = f"the app's lifespan did not start within startup_timeout={timeout:g} seconds; it was cancelled"
            raise StartupTimeoutError(message) from TimeoutError(message)

        if self._failure is not None:
            # It says that it failed; the exception that it means comes a moment later.
            if not await self._waiting.wait_for(self._is_over, self.grace):
                await self._abandon()
            error = self._app_error()
            raise StartupError(_describe("failed to start", error, self._failure)) from error

        if self.error is not None and not self._started:
            if self._mode == "auto" and (self._refused or not self._received):
                logger.info("the app does without a lifespan: %r", self.error)
                return
            raise StartupError(_describe("failed to start", self.error)) from self.error

    def tell(self) -> None:
        """Tell the app to shut down, if it waits for that already; `shutdown()` tells it in any case."""
        if self._listens:
            self._shutdown.set()

    async def shutdown(self, timeout: float | None = None) -> None:
        """
        Let the app shut down, in `timeout` seconds (at least the `grace`, and no more than that when forced).

        Raises:
            ShutdownError: It failed, or took longer and has been cancelled.
        """
        if not self._started:
            return
        if not self.over:
            self._shutdown.set()
            time = asyncio.get_running_loop().time
            bound = None if timeout is None else max(timeout, self.grace)
            began = time()
            ended = await self._waiting.wait_for(self._has_ended, bound)
            if self._waiting.forced and not ended:
                left = self.grace if bound is None else max(0.0, min(self.grace, began + bound - time()))
                ended = await self._waiting.wait_for(self._has_ended, left, even_if_forced=True)
            took = time() - began
            if not self.over:
                await self._abandon()
            if not ended:
                how = "cancelled, and goes on all the same" if self.stuck else "cancelled"
                allowed = f"{took:.3g} s (the shutdown_timeout, or 1 if that is less)"
                message = f"the app's lifespan did not shut down within {allowed}; it was {how}"
                raise ShutdownError(message) from (self._app_error() or TimeoutError(message))

        error = self._app_error()
        if self._failure is not None or error is not None:
            raise ShutdownError(_describe("failed to shut down", error, self._failure)) from error

    async def _abandon(self) -> None:
        """Cancel it and wait for its end, but not for ever."""
        if self.task is None or self.over:
            return
        self._abandoned = True
        self._shutdown.set()  # should it refuse to be cancelled, it can still be told
        self.task.cancel()
        self.stuck = not await self._waiting.wait_for(self._is_over, self.grace, even_if_forced=True)
        if self.stuck:
            logger.warning("the app's lifespan is stuck: %s was cancelled and goes on all the same", self.task)

    async def _run(self) -> None:
        self.task = asyncio.current_task()  # which runs before its maker has it
        asgi = {"version": self._asgi_version, "spec_version": "2.0"}
        scope: Scope = {"type": "lifespan", "asgi": asgi, "state": self.state}
        try:
            await self._app(scope, self._receive, self._send)
        except BaseException as exc:  # noqa: BLE001
            # SystemExit and KeyboardInterrupt too: out of a task they would stop the loop, and with it the program.
            self.error = exc
        finally:
            self.over = True
            self._shutdown.set()  # for a task of the app's that is still in receive()
            self._waiting.notify()

    def _make_sure(self, _: object) -> None:
        """Notice the end also of a task that was cancelled before its first step, so that `_run()` never ran."""
        if not self.over:
            self.over = self._received = True
            self.error = asyncio.CancelledError()
            self._waiting.notify()

    async def _receive(self) -> Message:
        if not self._received:
            self._received = True
            return {"type": "lifespan.startup"}

        if self._told:
            self._spent = True
            self._waiting.notify()
            await asyncio.Event().wait()

        self._listens = True
        try:
            await self._shutdown.wait()
        except asyncio.CancelledError:
            # Whose is it? `asyncio.run` cancels every task at its end; then the server is being forced, and an orderly
            # end is on its way. Any other is the app's own affair. One turn later we know.
            await asyncio.sleep(0)
            if self.over or self._abandoned or not self._waiting.forced:
                raise
            await self._shutdown.wait()
        self._told = True
        return {"type": "lifespan.shutdown"}

    async def _send(self, message: Message) -> None:
        match message["type"]:
            case "lifespan.startup.complete":
                self._started = True
            case "lifespan.startup.failed" | "lifespan.shutdown.failed":
                self._failure = str(message.get("message") or "")
            case "lifespan.shutdown.complete":
                pass  # what counts is that it ends: there may be clean-up behind this
            case other:
                self._refused = True
                raise RuntimeError(f"a lifespan cannot send {other!r}; the scope's type is 'lifespan', not 'http'")
        self._waiting.notify()

    def _has_answered(self) -> bool:
        return self._started or self._failure is not None or self.over

    def _has_ended(self) -> bool:
        return self._spent or self.over

    def _is_over(self) -> bool:
        return self.over

    def _app_error(self) -> BaseException | None:
        ours = self._abandoned and isinstance(self.error, asyncio.CancelledError)
        return None if ours else self.error


def describe(error: BaseException | None) -> str:
    """Say what it is; of a group with one exception, such as a task group raises, what that one is."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"


def _describe(what: str, error: BaseException | None, message: str | None = None) -> str:
    if error is not None:
        return f"the app's lifespan {what}: {describe(error)}"
    return f"the app's lifespan {what}: {message}" if message else f"the app's lifespan {what}, and did not say why"
