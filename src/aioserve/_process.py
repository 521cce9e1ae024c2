"""
`serving_process()`: the exit contract of `_serving.py`, with the app in a child process.

The child is our own command line. The parent binds, so that what it raises is what `serving()` raises, and hands the
listening sockets down. It hears of the child by a pipe, on which come lines of JSON, and by the child's end, for which
the kernel has a descriptor; both are watched by the loop. SIGTERM asks the child to stop; a byte on the lifeline forces
(two signals that come at once can become one on their way, or none that wakes anybody). SIGKILL has the last word.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from typing import IO, TYPE_CHECKING, Any

from aioserve import _errors
from aioserve._errors import (
    ServerCrashedError,
    ServingError,
    ShutdownError,
    StartupError,
    StartupInterruptedError,
    StartupTimeoutError,
)
from aioserve._lifespan import Lifespan
from aioserve._options import WHERE, check, parse
from aioserve._server import Closable
from aioserve._serving import Body, check_backend, listen, wait_started
from aioserve._shutdown import HeldUp, Report, longest
from aioserve._signals import Signals, name_of
from aioserve._systemd import notify

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from typing import Unpack

    from aioserve._options import Options, Settings
    from aioserve._sockets import Listener

# How long the child may take to exit when all is over, and to notice that it is to stop by force: seconds.
EXIT = 1.0

# What is used up when the child begins, or is for the parent only.
_THE_PARENTS = frozenset({*WHERE, "stop_on_signals", "startup_timeout"})


# Making a `uvicorn.Config` with these sets logging up, which is not to be done here.
_FOR_LOGS = ("log_config", "log_level", "use_colors")

# How long the child has when its parent is gone and `shutdown_timeout` is no limit: seconds.
_ORPHAN = 10.0


class ServerProcess(Closable):
    """
    A running server in a child process: where it listens, and how to end it.

    You get one from `serving_process()`. All of it is for the event loop in which it was started, but `close()`, which
    can be called from anywhere.
    """

    _engine: _Child

    def __init__(self, child: _Child) -> None:
        self._engine = child
        self._loop = asyncio.get_running_loop()
        self._host, self._port = child.address

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._engine.process.pid

    @property
    def returncode(self) -> int | None:
        """How the child has ended: its exit code, or a signal's number, negated; `None` while it runs."""
        return self._engine.process.returncode

    @property
    def report(self) -> Report | None:
        """How it was closed, and what had to be forced; `None` before that, and if the child did not live to tell."""
        return self._engine.report

    def _how(self) -> str:
        return "closed" if self._engine.closed.is_set() else "running"

    def __repr__(self) -> str:
        return f"<aioserve.ServerProcess {self.pid} {self.url} {self._how()}>"


@asynccontextmanager
async def serving_process(app: str, **options: Unpack[Options]) -> AsyncIterator[ServerProcess]:
    """
    Serve an ASGI app in a child process, for the length of a block.

        async with serving_process("package.module:app", port=8000) as server:
            print(server.url, server.pid)
            await run_everything_else()

    The contract is that of `serving()`, for an app that needs isolation: an interpreter of its own. Nothing is pickled:
    the child imports the app, with this program's `sys.path` and working directory. It has our standard output and
    error, and nothing to read; Ctrl+C does not reach it. If it dies while the body runs, the body is cancelled, and
    `ServerCrashedError` says how. If this program dies, in whatever way, the child stops.

    Args:
        app: An import string ``"package.module:attribute"``.
        options: As in `serving()`; those that are objects of this process (`ssl_context_factory`, a class for `http` or
            `ws`) are refused. `startup_timeout` counts from the start of the child, imports included. Of the child's
            logs, warnings and errors go to its standard error, unless `log_level` or `log_config` says otherwise; both
            are for the child only. `stop_on_signals` is for this process.

    Yields:
        ServerProcess: It says where it listens.

    Raises:
        OSError, StartupError, ServerCrashedError, ShutdownError, TypeError, ValueError, RuntimeError: As in
            `serving()`. What the app raised is a note of the error, with its traceback, as text. That the child had to
            be killed is a `ShutdownError`.
    """
    check_backend()
    passed = _to_pass(app, options)
    settings = parse(app, {name: value for name, value in options.items() if name not in _FOR_LOGS})
    signals = Signals(settings.stop_on_signals)
    try:
        listeners = await listen(settings, signals)
        server = ServerProcess(_Child(app, passed, settings, listeners))
        await wait_started(server, signals)
        async with server, Body(server, signals):
            yield server
    finally:
        signals.release()


class _Child:
    """
    The child process, as `Closable` wants it.
    """

    def __init__(self, app: str, options: Mapping[str, Any], settings: Settings, listeners: Sequence[Listener]) -> None:
        self._loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[None] = self._loop.create_future()
        self.started: bool = False
        self.closed: asyncio.Event = asyncio.Event()
        self.error: BaseException | None = None
        self.on_crash: Callable[[], None] | None = None
        self.report: Report | None = None

        scheme = "https" if settings.config.ssl_certfile else "http"
        self.urls: list[str] = [listener.url(scheme) for listener in listeners]
        self.address: tuple[str | None, int | None] = listeners[0].host, listeners[0].port
        self._settings = settings
        self._listeners = listeners
        self._asked_at: float | None = None
        self._forced = False
        self._overdue = False
        self._killed = False
        self._stopped = False  # it has said so
        self._unread = b""
        self._timers: dict[Callable[[], None], asyncio.TimerHandle] = {}

        orphan = settings.shutdown_timeout if settings.shutdown_timeout is not None else _ORPHAN
        try:
            told = {
                "options": options,
                "listeners": [[listener.socket.fileno(), listener.lent] for listener in listeners],
                "path": [os.path.abspath(each) for each in sys.path],
                "parent": os.getpid(),
                "bound": longest(settings.drain_delay, orphan, Lifespan.grace),
            }
            self.process: subprocess.Popen[bytes]
            self.process, self._events, self._lifeline = _spawn(app, told)
        except BaseException:
            for listener in listeners:
                listener.close()
            raise
        for listener in listeners:
            listener.socket.close()  # the child has its own; ours would keep the port busy when it has died

        self._loop.add_reader(self._events, self._readable)
        try:
            self._end: int | None = os.pidfd_open(self.process.pid)
        except (AttributeError, OSError):
            self._end = None  # not on this system: the end of the events is the end of the child
        else:
            self._loop.add_reader(self._end, self._ended)
        if settings.startup_timeout is not None:
            self._set_timer(settings.startup_timeout, self._give_up)

    # What it says.

    def _readable(self) -> None:
        over = self._read()
        if over:
            self._loop.remove_reader(self._events)
            if self._end is None:
                self._ended()

    def _read(self) -> bool:
        """Hear what has come, and return whether that was all."""
        over = True
        try:
            while chunk := os.read(self._events, 65536):
                self._unread += chunk
        except BlockingIOError:
            over = False
        *lines, self._unread = self._unread.split(b"\n")
        for line in lines:
            self._hear(json.loads(line))
        return over

    def _hear(self, event: dict[str, Any]) -> None:
        if event["event"] == "ready":
            self._clear_timer(self._give_up)
            self.started = True
            self._tell_systemd("READY=1")
            self._tell_starter()
            return

        self._stopped = True
        error, report = event["error"], event.get("report")
        if error is not None:
            self.error = _error_of(error)
        if report is not None:
            self.report = _report_of(report)
        self._clear_timer(self._give_up)
        # It has threads and hooks of the app's to wait for, at its exit.
        self._set_timer(max(EXIT, self._settings.shutdown_timeout or 0), self._kill)

    def _ended(self) -> None:
        if self._end is not None:
            self._read()  # its last words
        self._kill_group()  # what it has left
        self.process.wait()
        if self._end is not None:
            self._loop.remove_reader(self._end)
            os.close(self._end)
        self._loop.remove_reader(self._events)
        os.close(self._events)
        self._lifeline.close()
        for listener in self._listeners:
            listener.withdraw()
        for then in list(self._timers):
            self._clear_timer(then)

        if not self._stopped:
            self.error = self._how_it_died()
        elif self._killed and self.error is None:
            self.error = ShutdownError(f"{self._end_in_words()}: the server had stopped, but its process did not end")
        elif self.error is None and not self.started:
            self.error = StartupInterruptedError("the server was told to stop before it had started")
        if self._overdue and isinstance(self.error, StartupInterruptedError):
            self.error = self._too_late()
        crashed = self.started and self._asked_at is None and isinstance(self.error, ServerCrashedError)
        self.closed.set()
        self._tell_starter()
        if crashed and self.on_crash is not None:
            self.on_crash()

    def _how_it_died(self) -> ServingError:
        said = self._end_in_words()
        if self.started and self._asked_at is not None:
            if self._killed:
                took = self._loop.time() - self._asked_at
                return ShutdownError(f"{said}: it did not stop within {took:.3g} seconds")
            return ServerCrashedError(f"{said} while it was stopping")
        if self.started:
            return ServerCrashedError(f"{said} while it was serving")
        if self._asked_at is not None:
            return StartupInterruptedError(f"{said}: it was told to stop before it had started")
        return StartupError(f"{said} before the app had started")

    def _end_in_words(self) -> str:
        code = self.process.returncode
        how = f"killed by {name_of(-code)}" if code < 0 else f"exit code {code}"
        return f"the child process {self.process.pid} ended ({how})"

    def _too_late(self) -> StartupTimeoutError:
        message = f"the app did not start within startup_timeout={self._settings.startup_timeout:g} seconds"
        error = StartupTimeoutError(f"{message}; its process was told to stop")
        error.__cause__ = TimeoutError(message)
        return error

    def _tell_systemd(self, state: str) -> None:
        if state in self._settings.notify_systemd:
            notify(state)

    def _tell_starter(self) -> None:
        if not self.ready.done():
            self.ready.set_result(None)

    # What it is told.

    def close(self, deadline: float | None = None) -> None:
        """Ask for a graceful stop, from anywhere; a deadline, in the loop's time, can only shorten it."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._close, deadline)

    def _close(self, deadline: float | None) -> None:
        if self.closed.is_set():
            return
        now = self._loop.time()
        if self._asked_at is None:
            self._asked_at = now
            self._tell_systemd("STOPPING=1")
            self.process.send_signal(signal.SIGTERM)
            budget = self._settings.shutdown_timeout
            if budget is not None:
                self._set_timer(longest(self._settings.drain_delay, budget, Lifespan.grace) + EXIT, self._kill)
        if deadline is not None and not self._forced:
            if deadline <= now:
                self._force()
            else:
                self._set_timer(deadline - now, self._force)

    def _force(self) -> None:
        self._forced = True
        with suppress(BrokenPipeError):  # it is gone
            self._lifeline.write(b"!")
        self._set_timer(longest(0, 0, Lifespan.grace) + EXIT, self._kill)

    def _give_up(self) -> None:
        self._overdue = True
        self._close(self._loop.time())

    def _kill(self) -> None:
        self._killed = True
        self._kill_group()
        self.process.kill()  # it may have left its group

    def _kill_group(self) -> None:
        with suppress(ProcessLookupError, PermissionError):  # which has gone, or is going (macOS)
            os.killpg(self.process.pid, signal.SIGKILL)

    def _set_timer(self, seconds: float, then: Callable[[], None]) -> None:
        """Do something so many seconds from now, if it is not to be done earlier anyway."""
        timer = self._timers.get(then)
        if timer is not None and timer.when() <= self._loop.time() + seconds:
            return
        self._clear_timer(then)
        self._timers[then] = self._loop.call_later(seconds, then)

    def _clear_timer(self, then: Callable[[], None]) -> None:
        timer = self._timers.pop(then, None)
        if timer is not None:
            timer.cancel()

    def is_ours(self, task: asyncio.Task[Any] | None) -> bool:
        """Whether it is one of the server's own tasks; they are all in the child."""
        return False


def _spawn(app: str, told: Mapping[str, Any]) -> tuple[subprocess.Popen[bytes], int, IO[bytes]]:
    """Start the child, and return it, where its events come, and what it lives by."""
    with tempfile.TemporaryFile("w+") as settings, ExitStack() as undo, ExitStack() as theirs:
        json.dump(told, settings)
        settings.seek(0)
        events, their_events = os.pipe()
        undo.callback(os.close, events)
        theirs.callback(os.close, their_events)
        their_lifeline, lifeline = os.pipe()
        undo.callback(os.close, lifeline)
        theirs.callback(os.close, their_lifeline)
        os.set_blocking(events, False)

        fds = (settings.fileno(), their_events, their_lifeline)
        process = subprocess.Popen(  # noqa: S603 (ourselves)
            [
                sys.executable,
                *subprocess._args_from_interpreter_flags(),  # type: ignore[attr-defined]  # as multiprocessing does
                "-P",  # what lies in the current directory is not to be taken for what we import
                "-m",
                "aioserve",
                "--for-parent",
                ",".join(map(str, fds)),
                "--",
                app,
            ],
            stdin=subprocess.DEVNULL,
            pass_fds=(*fds, *(fd for fd, _lent in told["listeners"])),
            process_group=0,  # the terminal's Ctrl+C is for the parent
        )
        undo.pop_all()
    return process, events, open(lifeline, "wb", buffering=0)


def _to_pass(app: object, options: Mapping[str, Any]) -> dict[str, Any]:
    """
    Return the options that go to the child, as JSON has them.

    Raises:
        TypeError: The app, or an option, cannot be handed to another process.
    """
    if not isinstance(app, str):
        raise TypeError(
            f'an app for another process must be an import string like "package.module:attribute", not {app!r}; '
            "the child imports it by itself"
        )
    if app.partition(":")[0] == "__main__":
        raise TypeError(f"{app!r} cannot be handed to another process, whose __main__ is another; name the module")
    check(options)
    passed: dict[str, Any] = {"startup_timeout": None}
    for name, value in options.items():
        if name in _THE_PARENTS:
            continue
        passed[name] = os.fspath(value) if isinstance(value, os.PathLike) else value
        try:
            json.dumps(passed[name])
        except (TypeError, ValueError):
            raise TypeError(
                f"{name}={value!r} cannot be handed to another process: it is an object of this one; "
                "name a file, or use an import string, as the option allows"
            ) from None
    return passed


def _error_of(told: Mapping[str, Any]) -> BaseException:
    """Return the child's error as one of ours."""
    error: BaseException
    if told["errno"] is not None:
        kind = ssl.SSLError if told["type"].startswith("SSL") else OSError
        error = kind(told["errno"], told["message"], *([told["filename"]] if told["filename"] else []))
    else:
        kinds = {"TypeError": TypeError, "ValueError": ValueError, **vars(_errors)}
        error = kinds.get(told["type"], ServingError)(told["message"])
    if told["traceback"]:
        error.add_note(f"In the child process:\n{told['traceback'].rstrip()}")
    return error


def _report_of(told: Mapping[str, Any]) -> Report:
    def handlers(name: str) -> tuple[HeldUp, ...]:
        return tuple(
            HeldUp(**{**each, "client": each["client"] and tuple(each["client"]), "where": tuple(each["where"])})
            for each in told[name]
        )

    return Report(**{**told, "persuaded": handlers("persuaded"), "cancelled": handlers("cancelled")})
