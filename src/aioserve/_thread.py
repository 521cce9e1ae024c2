"""
A server in a thread, with a loop of its own there, for programs without a loop.

What nobody has stopped when the main thread ends, `_stop_all()` stops. That has to be before `concurrent.futures`
refuses new work, without which `asyncio.to_thread()` and a look-up of a name fail in the requests in flight; `atexit`
would be too late. The thread is a daemon: what ignores its cancellation there must not keep the program from ending.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures.thread  # noqa: F401 (before `_stop_all()` is registered: what came last is called first)
import contextvars
import os
import sys
import threading
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, suppress
from functools import partial
from types import TracebackType
from typing import Any, NoReturn, Self, Unpack

from aioserve import _limits
from aioserve._errors import ServerCrashedError, StartupInterruptedError, describe_error, public
from aioserve._functions import with_options
from aioserve._log import logger
from aioserve._options import App, Options
from aioserve._report import Report, Stats
from aioserve._server import Server, add_failure
from aioserve._serving import serving, start
from aioserve._waiting import wait_for_thread


@with_options(serving)
def start_in_thread(app: App, **options: Unpack[Options]) -> ThreadServer:
    """
    Start serving an ASGI app in a thread, and return when it has started: for programs without an event loop.

        with start_in_thread(app, port=8000) as server:
            print(server.url)
            run_everything_else()

    Without ``with``, end it with `ThreadServer.stop()`. A server that nobody has stopped is stopped gracefully when the
    main thread ends, also by an exception or `sys.exit()`. (A signal that kills the process leaves no time for that.)

    The app and its lifespan run in an event loop of their own, in a daemon thread that ends with the server. They see
    the context variables of the caller. If the app's lifespan dies, that is logged at once, and raised by `stop()` and
    at the end of the block, which is not interrupted. Ctrl+C during the start ends what has been started.

    It can be called where an event loop runs, as in a notebook's cell, and blocks that loop until the server has
    started; after that, a synchronous client there reaches the server, which it would not with `start()`.

    Args:
        app: As in `serving()`.
        options: As in `serving()`.

    Of these, `stop_on_signals` is refused, because Python handles signals only in the main thread: call
    `ThreadServer.close()` in a handler of yours.

    Raises:
        OSError, StartupError, TypeError, ValueError, RuntimeError: As in `start()`.
    """
    _check_not_importing(app)
    return ThreadServer(ServerThread(partial(start, app, **options)).begin())


def _check_not_importing(app: object) -> None:
    """Refuse to wait for a module that cannot be imported in another thread, since it is being imported in this one."""
    name = app.partition(":")[0] if isinstance(app, str) else ""
    if getattr(getattr(sys.modules.get(name), "__spec__", None), "_initializing", False):
        raise RuntimeError(
            f"start_in_thread({app!r}) would wait forever for {name}, which is still being imported; "
            f"call start_in_thread() in a function, or in another module"
        )


@public
class ThreadServer:
    """
    A running server in a thread: where it listens, what it is doing, and how to end it.

    You get one from `start_in_thread()`. It is a context manager, which stops it at the end of the block. If the block
    raises, that exception is raised; the server's own is added to it as a note, and logged. All of it can be used in
    any thread.

    The thread ends when the server has closed, whoever has closed it. A process that is forked from this one has no
    part in it: there, nothing is closed and nothing waits.
    """

    def __init__(self, thread: ServerThread) -> None:
        self._thread = thread
        self._server = thread.server

    @property
    def url(self) -> str:
        """Where a client on this machine reaches it, as `Server.url`."""
        return self._server.url

    @property
    def urls(self) -> list[str]:
        """The same for every address that it listens on."""
        return self._server.urls

    @property
    def ws_url(self) -> str:
        """The same for WebSockets."""
        return self._server.ws_url

    @property
    def host(self) -> str:
        """The first address that it is bound to, as `Server.host`; on Unix sockets only, an `AttributeError`."""
        return self._server.host

    @property
    def port(self) -> int:
        """The port of the first address, as `Server.port`; on Unix sockets only, an `AttributeError`."""
        return self._server.port

    @property
    def state(self) -> dict[str, Any]:
        """The ASGI lifespan state: what the app's lifespan has put there for its handlers."""
        return self._server.state

    @property
    def stats(self) -> Stats:
        """What it is doing and has done."""
        return self._server.stats

    @property
    def report(self) -> Report | None:
        """How it was closed, and what had to be forced; `None` before that."""
        return self._server.report

    def is_serving(self) -> bool:
        """Whether it accepts new connections."""
        return self._server.is_serving()

    def close(self, timeout: float | None = None) -> None:
        """
        Ask for a graceful stop, and return at once, as `Server.close()` does.

        It can be called from anywhere, any number of times: from a request's handler, from a signal handler.

        Args:
            timeout: How long the requests in flight get, in seconds from this call, the drain included. It can only
                shorten what the server was started with; 0 forces, which cancels the handlers at once.

        Raises:
            TypeError: The timeout is not a number.
            ValueError: The timeout is negative.
        """
        if not self._thread.is_forked:
            self._server.close(timeout)

    def stop(self, timeout: float | None = None) -> None:
        """
        Close, and wait until everything is over: the last response sent, the lifespan ended, the port free.

        Ctrl+C during the wait forces; it is raised when everything is over. Each later call raises the same again.

        Args:
            timeout: As in `close()`.

        Raises:
            ServerCrashedError: The app's lifespan died while it was serving.
            ShutdownError: The app's lifespan failed at its shutdown.
            RuntimeError: It was called in the server's own thread, by a request or a task of the app, and would wait
                for itself.
            TypeError, ValueError: As in `close()`.
        """
        __tracebackhide__ = True  # pytest's: where it fails a test, that test is to be seen
        self._thread.check_caller("stop()")
        seconds = _limits.check_timeout("timeout", timeout)
        try:
            self._thread.is_awaited = True
            self.close(seconds)
            self._thread.wait()
        except BaseException as exc:  # Ctrl+C, or what the handler of another signal has raised
            self.close(0)
            self._thread.wait()
            if self._thread.error is not None:
                add_failure(exc, self._thread.error)
            raise
        self._raise()

    def wait_closed(self, timeout: float | None = None) -> bool:
        """
        Wait until everything is over, whoever closes the server, and return whether it is.

        Ctrl+C ends the wait, and does nothing to the server.

        Args:
            timeout: How long to wait, in seconds; `None` is no limit.

        Raises:
            ServerCrashedError, ShutdownError, RuntimeError: As in `stop()`.
            TypeError, ValueError: The timeout is not a number, or negative.
        """
        self._thread.check_caller("wait_closed()")
        seconds = _limits.check_timeout("timeout", timeout)
        self._thread.is_awaited = True
        try:
            is_over = self._thread.wait(seconds)
        finally:
            self._thread.is_awaited = self._thread.over.is_set()
        if is_over:
            self._raise()
        return is_over

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        __tracebackhide__ = True
        try:
            self.stop()
        except Exception as error:
            if exc is None or isinstance(exc, GeneratorExit):  # a generator that is closed has no error of its own
                raise
            if error is not exc:
                add_failure(exc, error)

    def _raise(self) -> None:
        __tracebackhide__ = True
        if self._thread.error is not None:
            raise self._thread.error.with_traceback(None)  # or it would grow with each call

    def __reduce__(self) -> NoReturn:
        raise TypeError("an aioserve.ThreadServer cannot be pickled; pass its url instead")

    def _repr_html_(self) -> str:
        """Return what a notebook shows, as of a `Server`."""
        return self._server._repr_html_().replace("Server", "ThreadServer", 1)

    def __repr__(self) -> str:
        return repr(self._server).replace("Server", "ThreadServer", 1)


class ServerThread:
    """The thread of a server, and the loop there; `begin()` starts them."""

    server: Server
    error: BaseException | None = None
    """What went wrong, once it is over."""
    is_awaited: bool = False
    """Whether somebody waits for the end, and will raise the error."""
    _is_started: bool = False
    _is_cancelled: bool = False
    _is_logged: bool = False
    _task: asyncio.Task[None] | None = None

    def __init__(self, start: Callable[[], Awaitable[AbstractAsyncContextManager[Server]]]) -> None:
        self._start = start
        self._pid = os.getpid()
        self._ready = threading.Event()  # it has started, or has failed to
        self.over: threading.Event = threading.Event()
        run = contextvars.copy_context().run
        self._thread = threading.Thread(target=run, args=(self._run,), name="aioserve", daemon=True)

    @property
    def is_forked(self) -> bool:
        """Whether this process is a fork of the one with the thread."""
        return self._pid != os.getpid()

    def begin(self) -> Self:
        """Start the thread, and wait until the server has started, or raise what prevented it."""
        _register()
        try:
            self._thread.start()
            wait_for_thread(self._ready)
        except BaseException:  # Ctrl+C, or what the handler of another signal has raised
            self.ask(0)
            if self._thread.is_alive():
                self.wait()
            raise
        if not self._is_started:
            self.wait()
            raise self.error or StartupInterruptedError("the program ended before the server had started")
        return self

    def ask(self, timeout: float | None) -> None:
        """Close the server, or cancel its start."""
        if self._is_started:
            self.server.close(timeout)
            return
        self._is_cancelled = True
        if self._task is not None:
            with suppress(RuntimeError):  # its loop was closed just now
                self._task.get_loop().call_soon_threadsafe(self._task.cancel)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the server has closed and the thread has ended; return whether the server has closed."""
        if self.is_forked:
            return True
        if not wait_for_thread(self.over, timeout):
            return False
        self._thread.join(_limits.THREAD_EXIT)
        if self._thread.is_alive():
            logger.warning("%s has not ended: a task or a function of the app is still running there", self._thread)
        return True

    @property
    def url(self) -> str:
        return self.server.url if self._is_started else "a server in a thread"

    def longest_stop(self) -> float | None:
        """How many seconds a stop can take, if the app does not block the loop; `None` without a limit."""
        settings = self.server._engine.settings if self._is_started else None
        if settings is None or settings.shutdown_timeout is None:
            return None if settings is not None else _limits.THREAD_EXIT
        return _limits.longest_stop(settings.drain_delay, settings.shutdown_timeout) + _limits.THREAD_EXIT

    def check_caller(self, called: str) -> None:
        if threading.current_thread() is self._thread and not self.is_forked:
            raise RuntimeError(f"{called} in the server's own thread would wait for itself; use close()")

    # In the thread.

    def _run(self) -> None:
        _running.add(self)
        try:
            with asyncio.Runner() as runner:
                runner.run(self._serve())
        except BaseException as exc:  # noqa: BLE001 (it is raised in another thread)
            if self.over.is_set():  # Python 3.12.1 cannot end its loop's executor when the program ends
                logger.debug("%s: the event loop did not end in order", self._thread.name, exc_info=exc)
                return
            self.error = exc
            if self._is_started:
                self.error = ServerCrashedError(f"the event loop ended before the server: {describe_error(exc)}")
                self.error.__cause__ = exc
            self._log()
        finally:
            _running.discard(self)
            self._set_over()

    async def _serve(self) -> None:
        self._task = asyncio.current_task()
        try:
            if self._is_cancelled:
                return
            async with await self._start() as server:
                self.server = server
                self._thread.name = f"aioserve {server.url}"
                server._engine.on_crash = self._note_log
                self._is_started = True
                self._ready.set()
                await server._engine.closed.wait()
        except asyncio.CancelledError:
            if not self._is_cancelled:
                raise  # the loop is about to end
        except BaseException as exc:  # noqa: BLE001 (it is raised in another thread)
            self.error = exc
            self._log()
        self._set_over()  # the loop may never end: it waits for what ignores its cancellation

    def _set_over(self) -> None:
        self.over.set()
        self._ready.set()

    def _note_log(self) -> bool:
        self._is_logged = True
        return False  # nobody raises a crash when it happens, so the engine logs it

    def _log(self) -> None:
        """Log an error that nobody waits for."""
        if self._is_started and not self.is_awaited and not self._is_logged:
            logger.error("%s: %s", self.server.url, self.error, exc_info=self.error)


_running: set[ServerThread] = set()
_is_registered = False


def _register() -> None:
    global _is_registered
    if not _is_registered:
        # What `concurrent.futures` uses is private; should a later Python not have it, `atexit` is better than nothing.
        try:
            getattr(threading, "_register_atexit", atexit.register)(_stop_all)
        except RuntimeError:  # the main thread has ended, and this is another one
            atexit.register(_stop_all)
        _is_registered = True


def _stop_all() -> None:
    """Stop what nobody has stopped, when the main thread has ended; Ctrl+C forces, and a second one gives up."""
    threads = [each for each in _running.copy() if not each.is_forked]
    for timeout in (None, 0):
        with suppress(BaseException):  # there is nobody to raise it to
            for thread in threads:
                thread.ask(timeout)
            for thread in threads:
                if not thread.wait(thread.longest_stop() if timeout is None else _limits.ENDING_THREADS):
                    logger.warning("%s: its event loop is blocked; the program ends without its stop", thread.url)
            return
