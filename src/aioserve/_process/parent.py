"""
`serving_process()`: the exit contract of `_serving.py`, with the app in a child process.

The child runs our own command line. The parent binds, so it raises what `serving()` raises, and passes the listening
sockets to the child. The loop watches a pipe for the child's events, and a descriptor for its end. SIGTERM asks the
child to stop, a byte on the lifeline forces it (two signals in a row may arrive as one), and SIGKILL ends it.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from typing import IO, TYPE_CHECKING, Any, Unpack

from aioserve import _errors, _limits
from aioserve._errors import public
from aioserve._functions import with_options
from aioserve._log import logger
from aioserve._net import forks
from aioserve._net.listeners import Listener
from aioserve._net.loops import choose_acceptor
from aioserve._options import Options
from aioserve._process import messages
from aioserve._process.spawn import check_interpreter, has_exit_code, open_pidfd, spawn
from aioserve._server import ServerHandle
from aioserve._server_task import ServerTask
from aioserve._serving import ServingContext, bind, serving, wait_started
from aioserve._settings import Settings, parse
from aioserve._signals import Signals, signal_name

# They are for the child: a `uvicorn.Config` made with them would configure the logging of this process.
_LOGGING_OPTIONS = ("access_log", "log_config", "log_level", "use_colors")


@public
class ServerProcess(ServerHandle):
    """
    A running server in a child process: where it listens, and how to end it.

    You get one from `serving_process()`. Use it in the event loop in which it was started; only `close()` can be called
    from anywhere.
    """

    if TYPE_CHECKING:  # as in `Server`
        _engine: ChildProcess

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._engine.process.pid

    @property
    def returncode(self) -> int | None:
        """The child's exit code, or a signal's number, negated; `None` while it runs, or if SIGCHLD is ignored."""
        return self._engine.process.returncode if self._engine.has_exit_code else None

    def _status(self) -> str:
        if self._engine.closed.is_set():
            return "closed"
        return "its loop was closed" if self._loop.is_closed() else "running"

    def __repr__(self) -> str:
        return f"<aioserve.ServerProcess {self.pid} {self.url} {self._status()}>"


@with_options(serving)
def serving_process(app: str, **options: Unpack[Options]) -> AbstractAsyncContextManager[ServerProcess]:
    """
    Serve an ASGI app in a child process for the length of a block.

        async with serving_process("package.module:app", port=8000) as server:
            print(server.url, server.pid)
            await run_everything_else()

    The contract is that of `serving()`, for an app that needs its own interpreter. Nothing is pickled: the child
    imports the app, with this program's `sys.path` and working directory. It shares our standard output and error, and
    has no standard input; Ctrl+C does not reach it. If it dies while the body runs, the body is cancelled, and
    `ServerCrashedError` is raised. If this program dies, in whatever way, the child stops.

    Args:
        app: An import string ``"package.module:attribute"``.
        options: As in `serving()`. Those that are objects of this process (`ssl_context_factory`, a class for `http` or
            `ws`) are refused. `startup_timeout` counts from the start of the child, imports included. The child logs
            warnings and errors to its standard error, unless `log_level` or `log_config`, which are only for the child,
            say otherwise. `stop_on_signals` is only for this process.

    Returns:
        A context manager, whose block gets the `ServerProcess`.

    Raises:
        OSError, StartupError, ServerCrashedError, ShutdownError, TypeError, ValueError, RuntimeError: As in
            `serving()`. If the app raised, a note has its traceback as text. `ShutdownError` also says that the child
            had to be killed, and `RuntimeError` that this program has no Python interpreter (it is frozen, or embeds
            Python), that its event loop has no `add_reader()`, or that it runs on Windows.
    """
    passed: dict[str, Any] = {}

    def parse_options() -> Settings:
        check_interpreter()
        passed.update(messages.options_for_child(app, options))
        return parse(app, {name: value for name, value in options.items() if name not in _LOGGING_OPTIONS})

    async def start(settings: Settings, signals: Signals) -> ServerProcess:
        if (await choose_acceptor()).is_portable:
            raise RuntimeError(
                "serving_process() cannot watch a child process: the event loop has no add_reader(); "
                "serve the app in this process"
            )
        child = ChildProcess(app, passed, settings, await bind(settings, signals))
        child.start()
        server = ServerProcess(child)
        await wait_started(server, signals)
        return server

    return ServingContext("serving_process", app, parse_options, start)


class ChildProcess(ServerTask):
    """The child process that runs a server."""

    process: subprocess.Popen[bytes]
    _events: int
    _lifeline: IO[bytes]
    _pidfd: int | None = None
    has_exit_code: bool = False

    def __init__(self, app: str, options: dict[str, Any], settings: Settings, listeners: Sequence[Listener]) -> None:
        super().__init__(listeners, has_tls=bool(settings.config.ssl_certfile))
        self._app = app
        self._options = options
        self._settings = settings
        self._asked_at: float | None = None
        self._forced = False
        self._startup_expired = False
        self._killed = False
        self._said_last = False  # its last event has come
        self._buffer = b""
        # By what they do: when, and the timer. (uvloop's may not know when.)
        self._timers: dict[Callable[[], None], tuple[float, asyncio.TimerHandle]] = {}

    def start(self) -> None:
        """Start the process, and watch it."""
        handover = messages.Handover(
            options=self._options,
            listeners=[(each.socket.fileno(), each.lent, each.file_path, each.mode) for each in self.listeners],
            path=[os.path.abspath(each) for each in sys.path if isinstance(each, str)],  # Python ignores any other
            parent=os.getpid(),
            stop_timeout=self._longest_stop(),
            alive_interval=self._settings.watchdog[0] if self._settings.watchdog else None,
        )
        try:
            self.process, self._events, self._lifeline = spawn(self._app, handover)
        except BaseException:
            for listener in self.listeners:
                listener.close()
            raise
        for listener in self.listeners:
            listener.socket.close()  # the child has its own; ours would keep the port busy after its death

        self._loop.add_reader(self._events, self._on_readable)
        self._pidfd = open_pidfd(self.process.pid)
        if self._pidfd is not None:
            self._loop.add_reader(self._pidfd, self._on_exit)
        if self._settings.startup_timeout is not None:
            self._call_later(self._settings.startup_timeout, self._on_startup_timeout)

    # The child's events and its end.

    def _on_readable(self) -> None:
        if self._read():
            self._loop.remove_reader(self._events)
            if self._pidfd is None:
                self._on_exit()

    def _read(self) -> bool:
        """Handle the events that have come, and return whether the pipe has ended."""
        try:
            while chunk := os.read(self._events, 65536):
                self._buffer += chunk
            ended = True
        except BlockingIOError:
            ended = False
        *lines, self._buffer = self._buffer.split(b"\n")
        for line in lines:
            self._handle(json.loads(line))
        return ended

    def _handle(self, event: messages.Event) -> None:
        self._cancel_timer(self._on_startup_timeout)
        if event["event"] == "ready":
            self.started = True
            for listener in self.listeners:
                listener.adopt_file()
            if self._asked_at is None:
                self._settings.notify_systemd("READY=1")
            self._set_ready()
        if event["event"] in ("ready", "alive"):
            if self.started and self._settings.watchdog is not None:
                self._settings.watchdog[1]()  # both loops have to run for this
            return

        self._said_last = True
        if event["error"] is not None:
            self.error = messages.decode_error(event["error"])
        if event.get("report") is not None:
            self.report = messages.decode_report(event["report"])
        # The app may have threads and exit handlers that take time.
        if (budget := self._settings.shutdown_timeout) is not None:
            self._call_later(max(_limits.CHILD_EXIT, budget), self._kill)

    def _on_exit(self) -> None:
        if self._pidfd is not None:
            self._read()
        self._kill_group()  # its own children
        self.has_exit_code = self.process.returncode is not None or has_exit_code(self.process.pid)
        self.process.wait()
        if self._pidfd is not None:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
        self._loop.remove_reader(self._events)
        os.close(self._events)
        self._lifeline.close()
        for listener in self.listeners:
            listener.remove_file()
        for action in list(self._timers):
            self._cancel_timer(action)

        self._set_error()
        crashed = self.started and self._asked_at is None and isinstance(self.error, _errors.ServerCrashedError)
        self.closed.set()
        self._set_ready()
        if crashed and self.on_crash is not None and not self.on_crash():
            logger.error("%s: %s", self.urls[0], self.error)

    def _set_error(self) -> None:
        code = self.process.returncode
        status = f"killed by {signal_name(-code)}" if code < 0 else f"exit code {code}"
        if not self.has_exit_code:
            status = "its exit code is unknown, since SIGCHLD is ignored"
        ended = f"the child process {self.process.pid} ended ({status})"
        if not self._said_last:
            self.error = self._error_of_death(ended)
        elif self._killed and self.error is None:
            self.error = _errors.ShutdownError(f"{ended}: the server had stopped, but its process did not end")
        elif self.error is None and not self.started:
            self.error = _errors.StartupInterruptedError("the server was told to stop before it had started")
        if self._startup_expired and isinstance(self.error, _errors.StartupInterruptedError):
            message = f"the app did not start within startup_timeout={self._settings.startup_timeout:g} seconds"
            self.error = _errors.StartupTimeoutError(f"{message}; its process was told to stop")
            self.error.__cause__ = TimeoutError(message)

    def _error_of_death(self, ended: str) -> _errors.ServingError:
        if self._asked_at is None:
            if self.started:
                return _errors.ServerCrashedError(f"{ended} while it was serving")
            return _errors.StartupError(f"{ended} before the app had started")
        if not self.started:
            return _errors.StartupInterruptedError(f"{ended}: it was told to stop before it had started")
        if self._killed:
            took = self._loop.time() - self._asked_at
            return _errors.ShutdownError(f"{ended}: it did not stop within {took:.3g} seconds")
        return _errors.ServerCrashedError(f"{ended} while it was stopping")

    # Stopping the child.

    def close(self, deadline: float | None = None, *, begin: bool = False) -> None:
        with suppress(RuntimeError):  # its loop is closed, and so is the server
            self._loop.call_soon_threadsafe(self._close, deadline)

    def _close(self, deadline: float | None) -> None:
        if self.closed.is_set():
            return
        now = self._loop.time()
        if self._asked_at is None:
            self._asked_at = now
            self._settings.notify_systemd("STOPPING=1")
            self.process.send_signal(signal.SIGTERM)
            if (budget := self._settings.shutdown_timeout) is not None:
                longest = _limits.longest_stop(self._settings.drain_delay, budget)
                self._call_later(longest + _limits.CHILD_EXIT, self._kill)
        if deadline is not None and not self._forced:
            if deadline <= now:
                self._force()
            else:
                self._call_later(deadline - now, self._force)

    def _force(self) -> None:
        self._forced = True
        with suppress(BrokenPipeError):  # it has ended
            self._lifeline.write(b"!")
        self._call_later(_limits.longest_stop(0, 0) + _limits.CHILD_EXIT, self._kill)

    def _longest_stop(self) -> float:
        """Return how many seconds a stop can take at most; with a bound also where the user has set none."""
        budget = self._settings.shutdown_timeout
        return _limits.longest_stop(self._settings.drain_delay, _limits.ORPHAN_SHUTDOWN if budget is None else budget)

    def _abandon(self) -> str:
        self._asked_at = self._asked_at or self._loop.time()
        self.process.terminate()
        try:
            self.process.wait(self._longest_stop() + _limits.CHILD_EXIT)
        except subprocess.TimeoutExpired:
            self._kill()
        with suppress(RuntimeError):  # who waits for it is in the loop
            self._on_exit()
        return f"process {self.process.pid} was told to stop, and has ended"

    def __del__(self) -> None:
        """Leave no descriptor where its loop was closed; the child stops, since its lifeline ends as well."""
        is_left = hasattr(self, "process") and not (self.closed.is_set() or self._is_abandoned)
        if is_left and self._loop.is_closed() and self._forks == forks.count:
            for descriptor in [self._events, *([] if self._pidfd is None else [self._pidfd])]:
                os.close(descriptor)
            self._lifeline.close()
            what = f"process {self.process.pid} is told to stop, and not awaited; leave the block while the loop runs"
            logger.warning("%s: its event loop was closed before the server: %s", self.urls[0], what)

    def _on_startup_timeout(self) -> None:
        self._startup_expired = True
        self._close(self._loop.time())

    def _kill(self) -> None:
        self._killed = True
        self._kill_group()
        self.process.kill()  # it may have left its group

    def _kill_group(self) -> None:
        if sys.platform != "win32":
            with suppress(ProcessLookupError, PermissionError):  # it has ended, or is about to (macOS)
                os.killpg(self.process.pid, signal.SIGKILL)

    def _call_later(self, seconds: float, action: Callable[[], None]) -> None:
        """Do something so many seconds from now, unless it is to be done earlier anyway."""
        if self._loop.is_closed():
            return
        when = self._loop.time() + seconds
        if action not in self._timers or self._timers[action][0] > when:
            self._cancel_timer(action)
            self._timers[action] = when, self._loop.call_at(when, action)

    def _cancel_timer(self, action: Callable[[], None]) -> None:
        if entry := self._timers.pop(action, None):
            entry[1].cancel()
