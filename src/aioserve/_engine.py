"""
The server's task: start, serve until asked to stop, stop, clean up.

Its states, one after the other:

    starting     the app's lifespan starts; then the sockets listen
    serving      `started` is set, and `ready` is done
    stopping     a stop was asked for (see `_shutdown.py`), or the app's lifespan died
    closed       `closed` is set; `error` says what went wrong, `report` how the stop went

A start that fails goes from starting to closed. In every case `ready` is done and `closed` is set at the end.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable, Sequence
from typing import Any

from aioserve import _limits
from aioserve._connections import Connections, abandon
from aioserve._errors import ServerCrashedError, ShutdownError, StartupError, StartupInterruptedError, describe_error
from aioserve._lifespan import Lifespan
from aioserve._log import logger, uvicorn_logger
from aioserve._net.acceptor import Acceptor
from aioserve._net.listeners import Listener
from aioserve._report import Report
from aioserve._server_task import ServerTask
from aioserve._settings import Settings
from aioserve._shutdown import Shutdown
from aioserve._uvicorn.protocols import scope_of
from aioserve._waiting import Condition, SlowStop, start_task


class Engine(ServerTask):
    """
    What runs a server in this loop, with a loaded Config, on listeners that it closes at the end.

    Its task never raises: what went wrong is in `error`. It survives being cancelled, which only makes it quicker.
    """

    on_closed: Callable[[], None] | None = None
    """Called at the end, before `closed` is set."""
    is_crashed: bool = False
    _watchdog: asyncio.TimerHandle | None = None
    error: BaseException | None = None
    report: Report | None = None

    def __init__(self, settings: Settings, listeners: Sequence[Listener], acceptor: type[Acceptor]) -> None:
        config = settings.config
        super().__init__(listeners, has_tls=config.ssl is not None)
        self._thread = threading.get_ident()
        self.settings = settings
        self._condition = Condition()
        self.lifespan: Lifespan = Lifespan(
            config.loaded_app,
            mode=config.lifespan,
            asgi_version=config.asgi_version,
            state={},
            condition=self._condition,
        )
        self.connections: Connections = Connections(
            listeners,
            settings,
            self.lifespan,
            condition=self._condition,
            on_limit=self._limit_reached,
            acceptor=acceptor,
        )
        self.shutdown: Shutdown = Shutdown(settings, self.connections, self.lifespan, self._condition, self.urls[0])

    def start(self) -> None:
        start_task(self._serve(), name=f"aioserve {self.urls[0]}", if_delayed=self._ended)

    async def _serve(self) -> None:
        try:
            await self._serve_until_asked()
            self.report, error = await self.shutdown.run(drain=self.started and not self.is_crashed)
            if error is not None and self.error is None and self.lifespan.crashed:  # when a stop was asked for already
                self._note_crash("the app's lifespan died before it was told to shut down", self.lifespan.error)
            if self.shutdown.failure is not None:
                self._note_crash("the server failed to stop accepting", self.shutdown.failure)
            if self.error is None:
                self.error = error
            elif error is not None and error.__cause__ is not self.error.__cause__:  # else it says the same
                logger.error("the server had failed; its stop failed as well: %s", error, exc_info=error)
        except GeneratorExit:
            # Its loop was closed, and now it is garbage.
            self.abandon()
            raise
        except BaseException as exc:  # noqa: BLE001 (nothing may leave the task)
            try:
                self._crash("the server's own task failed while it was stopping", exc)
                await self._drop_everything()
            finally:
                self._clean_up()
        else:
            self._clean_up()

    async def _serve_until_asked(self) -> None:
        try:
            await self.lifespan.startup(self.settings.startup_timeout)
            await self.connections.acceptor.start(self.lifespan.context or contextvars.copy_context())
        except (StartupError, OSError) as exc:
            self.error = exc
            return
        except GeneratorExit:
            raise
        except asyncio.CancelledError:
            self._condition.force()
            self.error = StartupInterruptedError("the server was told to stop before it had started")
            return
        except BaseException as exc:  # noqa: BLE001 (nothing may leave the task, and the lifespan must be ended)
            self._crash("the server's own task failed while it was starting", exc)
            return
        self.started = True
        for listener, url in zip(self.listeners, self.urls, strict=True):
            where = f"unix socket {listener.path}" if isinstance(listener.path, str) else url
            uvicorn_logger.info("Uvicorn running on %s%s", where, self.settings.started_hint)
        if not self.is_stopping:
            self.settings.notify_systemd("READY=1")
        if self.settings.watchdog is not None:
            self._answer_watchdog(*self.settings.watchdog)
        self._set_ready()

        await self._condition.wait_for(lambda: self.shutdown.is_set or self.lifespan.died)
        if self.lifespan.crashed and not self.is_stopping and not self.is_forced:
            self._crash("the app's lifespan died while it was serving", self.lifespan.error)
        self.shutdown.ask()

    def _answer_watchdog(self, interval: float, answer: Callable[[], None]) -> None:
        self._watchdog = self._loop.call_later(interval, self._answer_watchdog, interval, answer)
        answer()

    def _ended(self, _: object) -> None:
        """Close also where the task was cancelled before its first step, so that it never ran."""
        if not self.closed.is_set():
            self.error = StartupError("the server's own task was cancelled before it had begun")
            self._clean_up()

    def _note_crash(self, what: str, cause: BaseException | None) -> None:
        self.error = ServerCrashedError(f"{what}: {describe_error(cause)}")
        self.error.__cause__ = cause
        self.is_crashed = True

    def _crash(self, what: str, cause: BaseException | None) -> None:
        self._note_crash(what, cause)
        self.shutdown.ask()
        if self.on_crash is None or not self.on_crash():
            logger.error("%s: %s", self.urls[0], self.error, exc_info=cause)

    async def _drop_everything(self) -> None:
        """Leave nothing, also where the stop has failed, which is a bug of aioserve's."""
        connections = self.connections

        def cancel_handlers() -> None:
            for handler in connections.handlers():
                connections.cancel(handler)

        for drop in (
            connections.acceptor.close,
            connections.close_unneeded,
            cancel_handlers,
            connections.abort_connections,
        ):
            try:
                drop()
            except Exception as exc:  # noqa: BLE001
                logger.error("the clean-up failed as well: %s", describe_error(exc), exc_info=exc)
        await self._condition.wait_for(connections.is_finished, _limits.CANCELLED_HANDLERS, even_if_forced=True)
        try:
            await self.lifespan.shutdown(0, SlowStop(self._condition, self.urls[0]))
        except ShutdownError as exc:
            logger.error("%s", exc, exc_info=exc)

    def _clean_up(self) -> None:
        self.connections.close()
        self.shutdown.cancel_deadline()
        if self._watchdog is not None:
            self._watchdog.cancel()
        self.shutdown.set()
        self._call_on_closed()
        self._set_ready()
        self.closed.set()
        if self.started:
            uvicorn_logger.info("Closed %s", ", ".join(self.urls))
        # The state holds the `Server`, which holds this. Without it, neither waits for the garbage collector.
        self.lifespan.state = {name: value for name, value in self.lifespan.state.items() if name != "aioserve"}

    def _abandon(self) -> str:
        abandon(self.connections)
        self._call_on_closed()
        if not self._loop.is_closed():
            self._ask(self._loop.time())  # if it runs again, the stop goes on
        return "its sockets are closed, but requests in flight are lost, and the app's lifespan was not shut down"

    def _call_on_closed(self) -> None:
        if self.on_closed is not None:
            self.on_closed()

    # For those who hold the server.

    @property
    def is_stopping(self) -> bool:
        """Whether a stop was asked for, or everything is over."""
        return self.shutdown.is_set

    @property
    def is_forced(self) -> bool:
        return self._condition.forced

    def close(self, deadline: float | None = None, *, begin: bool = False) -> None:
        if self._loop.is_closed():
            return  # and so is the server
        if threading.get_ident() == self._thread:
            self._ask(deadline, begin=begin)
            if asyncio.current_task(self._loop) is not None:
                return
            # Perhaps a signal handler, which has interrupted the loop in its sleep: then the loop must be woken up.
        try:
            self._loop.call_soon_threadsafe(self._ask, deadline)
        except RuntimeError:
            pass  # its loop was closed just now

    def _ask(self, deadline: float | None, *, begin: bool = False) -> None:
        if not self.closed.is_set():
            self.shutdown.ask(deadline, begin=begin and self.started)

    def _limit_reached(self, limit: int) -> None:
        if not self.is_stopping:
            uvicorn_logger.info("Maximum request limit of %d exceeded. Closing the server.", limit)
            self.close()

    def owns(self, task: asyncio.Task[Any] | None) -> bool:
        if task is None:
            return False
        if task is self.lifespan.task or task in self.connections.state.tasks:
            return True
        if self._loop.get_task_factory() is None:
            return False
        # An eager task runs before uvicorn has it in its set.
        server = scope_of(task).get("state", {}).get("aioserve")
        return getattr(server, "_engine", None) is self
