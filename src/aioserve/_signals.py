"""
Stop signals: handles them and restores what was there before. The only file that uses `signal.signal()`.

A signal has one handler, and programs save and restore each other's handlers in any order. So each time that a server
replaces another handler, it installs a new `_Handler`, which remembers the one it replaced. When no server needs it any
more, the replaced handler is restored. If somebody else has replaced ours in between, it stays, and calls the handler
that it replaced. A signal goes to all servers that asked for it, whichever of our handlers is installed.

A handler can interrupt any line of Python in the main thread, so it only records the signal and wakes the loop, which
acts. (`loop.add_signal_handler()` would do that, too, but does not know what was there before, and restores nothing.)

An app may replace our handlers while it is imported or starts. Where the process is ours, as that of the command line,
we put ours in front again, and call the app's as well. In a program of somebody else's, a warning says who has it.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import gc
import inspect
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import FrameType
from typing import Any, TypeAlias
from weakref import WeakSet

from aioserve._log import logger

Previous: TypeAlias = Callable[[int, Any], Any] | int | signal.Handlers

SIGHUP: int | None = getattr(signal, "SIGHUP", None)  # not on Windows

STOP_SIGNALS: tuple[signal.Signals, ...] = (signal.SIGINT, signal.SIGTERM)
"""Those that end a program; on Windows, Ctrl+Break does so, and SIGTERM cannot be sent."""
if sys.platform == "win32":
    STOP_SIGNALS += (signal.SIGBREAK,)


class Interrupted(BaseException):
    """Raised by a signal in the middle of an import, which the loop cannot interrupt."""


class Signals:
    """
    The stop signals of one server, from `install()` to `release()`; with no signals, neither changes anything.

    With `owns_process`, they are those of a process that only runs this server, in a loop of its own.
    """

    first: str | None = None  # the name of the first signal that came
    latest: str | None = None
    count: int = 0  # how many have come; without SIGHUP, which a terminal that closes may send twice
    is_interrupting: bool = False  # whether a signal is to raise `Interrupted`
    _is_missed: bool = False  # whether one came when there was no action
    _loop: asyncio.AbstractEventLoop
    _pid: int
    _action: Callable[[], object] | None = None
    _callbacks: dict[int, Callable[[], object]]  # those that the app has given to our own loop

    def __init__(self, wanted: Sequence[int] = (), *, owns_process: bool = False) -> None:
        self.wanted = wanted
        self._owns_process = owns_process
        self._handlers: list[_Handler] = []

    def install(self) -> None:
        """Handle the signals from now on, in the running loop: all of them, or none and raise a `RuntimeError`."""
        if not self.wanted:
            return
        self._loop, self._pid, self._callbacks = asyncio.get_running_loop(), os.getpid(), {}
        try:
            for signum in self.wanted:
                _check_available(signum, self._loop)
                handler = signal.getsignal(signum)
                if not isinstance(handler, _Handler):
                    assert handler is not None  # as _check_available() has found
                    handler = _Handler(signum, handler)
                    signal.signal(signum, handler)
                handler.users.add(self)
                self._handlers.append(handler)
            _Wakeup.set(self._loop)
            if self._owns_process:
                self._own_loop()
        except BaseException:
            self.release()
            raise

    def on_signal(self, action: Callable[[], object] | None) -> None:
        """Set what the loop does at each signal from now on, and soon if one has come when there was nothing to do."""
        self._action = action
        if action is not None and self._is_missed:
            self._is_missed = False
            self._loop.call_soon(self._act)

    def __enter__(self) -> None:
        """Make signals raise `Interrupted` in the block, for code that blocks the loop; at once if one has come."""
        try:
            self.is_interrupting = True  # from here on, a signal may raise it as well
            if self.first is not None:
                raise Interrupted
        except Interrupted:
            self.is_interrupting = False
            raise

    def __exit__(self, *_: object) -> None:
        self.is_interrupting = False

    def look_again(self, where: str) -> None:
        """Look whether the app, which has started, has replaced our handlers: take the signals back, or warn."""
        if self._owns_process:
            self.take_back()
            return
        for signum in self.wanted:
            handler = signal.getsignal(signum)
            if not isinstance(handler, _Handler):
                with suppress(Exception):  # a repr() or a logging handler that raises does not fail the start
                    logger.warning(
                        "stop_on_signals: %s will not stop %s: while the app started, aioserve's handler was replaced "
                        "by %s; %s",
                        signal_name(signum),
                        where,
                        _describe(signum, handler, self._loop),
                        "call server.close() there, and await server.wait_closed() in the block"
                        if callable(handler)
                        else "do not replace it in the app",
                    )

    def take_back(self) -> None:
        """Where the process is ours: put our handlers in front again, and call those of the app as well."""
        if not self._owns_process:
            return
        for index, ours in enumerate(self._handlers):
            current = signal.getsignal(ours.signum)
            if isinstance(current, _Handler):
                signal.signal(ours.signum, current)  # C code may have replaced it, which Python cannot see
            elif ours.signum == SIGHUP:
                pass  # an app that handles it reloads something
            elif not callable(current) or current in (ours.previous, signal.default_int_handler):
                signal.signal(ours.signum, ours)
            else:
                ours.users.discard(self)
                self._handlers[index] = handler = _Handler(ours.signum, ours.previous, also=current)
                handler.users.add(self)
                signal.signal(ours.signum, handler)

    def _own_loop(self) -> None:
        """Let `add_signal_handler()` of the loop, which is ours, leave our handlers in front of the app's callbacks."""
        loop: Any = self._loop
        add, remove = loop.add_signal_handler, loop.remove_signal_handler

        def add_signal_handler(sig: int, callback: Callable[..., object], *args: Any) -> None:
            if sig == SIGHUP or sig not in self.wanted or inspect.iscoroutinefunction(callback):
                add(sig, callback, *args)  # which refuses a coroutine function
            else:
                call = functools.partial(_call, callback, *args)
                context = contextvars.copy_context()
                self._callbacks[sig] = functools.partial(loop.call_soon_threadsafe, call, context=context)

        def remove_signal_handler(sig: int) -> bool:
            if self._callbacks.pop(sig, None) is not None:
                return True
            removed: bool = remove(sig)
            if self._handlers:
                _Wakeup.set(loop)  # asyncio unsets it with its last handler
            return removed

        loop.add_signal_handler = add_signal_handler
        loop.remove_signal_handler = remove_signal_handler

    def release(self) -> None:
        """Stop handling the signals, and restore the previous handlers, unless others have replaced ours."""
        self._action = None
        handlers, self._handlers = self._handlers, []
        for handler in handlers:
            handler.users.discard(self)
        # Not when it is garbage that another thread collects: signal.signal() would raise.
        if handlers and threading.current_thread() is threading.main_thread():
            for signum in [each.signum for each in handlers]:
                current = signal.getsignal(signum)
                if isinstance(current, _Handler) and not current.attached():
                    signal.signal(signum, _still_valid(current.previous))
            if not any(each.attached() for each in _HANDLERS):
                _Wakeup.unset()

    def record(self, signum: int) -> None:
        """Record a signal, in its handler."""
        self.count += signum != SIGHUP
        self.latest = signal_name(signum)
        if self.first is None:
            self.first = self.latest
        if signum in self._callbacks:
            self._callbacks[signum]()
        self._loop.call_soon_threadsafe(self._act)  # which also wakes the loop

    def report(self, signum: int, error: BaseException) -> None:
        """Let the loop log what the app's handler has raised."""
        context = {"message": f"the app's handler for {signal_name(signum)} raised an exception", "exception": error}
        self._loop.call_soon_threadsafe(self._loop.call_exception_handler, context)

    def _act(self) -> None:
        self._is_missed = self._action is None
        if self._action is not None:
            self._action()


class _Handler:
    """The handler that Python calls at a signal, the one that it has replaced, and one of the app's to call as well."""

    def __init__(self, signum: int, previous: Previous, *, also: Callable[[int, Any], Any] | None = None) -> None:
        self.signum = signum
        self.previous = previous
        self.also = also
        self.users: WeakSet[Signals] = WeakSet()
        _HANDLERS.add(self)

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        users = {each: each.count for handler in _HANDLERS if handler.signum == signum for each in handler.attached()}
        if not users:
            self._pass_on(signum, frame)
            return
        if self.also is not None:
            try:
                _call(self.also, signum, frame)
            except Interrupted:
                pass  # raised by one of our handlers, which it has called; and again below
            except BaseException as exc:  # noqa: BLE001 (it would interrupt any line of Python)
                next(iter(users)).report(signum, exc)
        for each, count in users.items():
            if each.count == count:  # else the app's handler has called ours
                each.record(signum)
        # Also at later signals, since an import may have swallowed the first one.
        if any(each.is_interrupting for each in users):
            raise Interrupted

    def _pass_on(self, signum: int, frame: FrameType | None) -> None:
        """Do what would be done without us."""
        previous = self.also or self.previous
        if callable(previous):
            previous(signum, frame)
        elif previous == signal.SIG_DFL:
            ours = signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)  # which ends the process, with most signals
            signal.signal(signum, ours)

    def attached(self) -> list[Signals]:
        """Return those of its users that a signal can reach: not where the loop is closed, or in a fork."""
        return [each for each in self.users if not each._loop.is_closed() and each._pid == os.getpid()]

    def __repr__(self) -> str:
        return f"<aioserve's handler for {signal_name(self.signum)}>"


# Our handlers, as long as a server uses one, or a program keeps one to restore it.
_HANDLERS: WeakSet[_Handler] = WeakSet()


class _Wakeup:
    """
    The descriptor to which Python writes a byte at each signal, so that the loop wakes up and the handler is called.

    Otherwise a signal that comes right before the loop falls asleep, or that another thread gets, is noticed when
    something else wakes the loop. uvloop sets one while it runs, and asyncio's loop with its first signal handler.
    """

    _fd: int = -1  # a duplicate: it is not mistaken for what the loop sets, and outlives the loop

    @classmethod
    def set(cls, loop: asyncio.AbstractEventLoop) -> None:
        """Set that of asyncio's loop, unless there is one; the loop ignores the signals that it does not handle."""
        self_pipe = getattr(loop, "_csock", None)
        if self_pipe is None or cls._give_back(signal.set_wakeup_fd(-1)):
            return
        cls._close()
        cls._fd = self_pipe.dup().detach()
        signal.set_wakeup_fd(cls._fd, warn_on_full_buffer=False)

    @classmethod
    def unset(cls) -> None:
        if cls._fd != -1:
            cls._give_back(signal.set_wakeup_fd(-1))
            cls._close()

    @classmethod
    def _give_back(cls, fd: int) -> bool:
        """Set the descriptor of somebody else again, and return whether there is one."""
        if fd in (-1, cls._fd):
            return False
        try:
            signal.set_wakeup_fd(fd, warn_on_full_buffer=False)
        except (OSError, ValueError):
            return False  # its owner has closed it
        return True

    @classmethod
    def _close(cls) -> None:
        if cls._fd != -1:
            socket.close(cls._fd)
            cls._fd = -1


def signal_name(signum: int) -> str:
    try:
        return signal.Signals(signum).name
    except ValueError:
        return f"signal {signum}"  # a real-time signal


def _check_available(signum: int, loop: asyncio.AbstractEventLoop) -> None:
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError(
            f"stop_on_signals: Python handles {signal_name(signum)} only in the main thread, and this server "
            "is to run in another one; handle it in the main thread and call close(), which is thread-safe"
        )
    handler = signal.getsignal(signum)
    if handler is None:
        raise RuntimeError(
            f"stop_on_signals: {signal_name(signum)} has a handler that Python did not install and cannot restore; "
            "call close() in that handler"
        )
    if _is_from_loop(handler, loop):
        raise RuntimeError(
            f"stop_on_signals: your event loop already handles {signal_name(signum)} (add_signal_handler()); "
            "call close() in your own handler"
        )


def _is_from_loop(handler: object, loop: asyncio.AbstractEventLoop) -> bool:
    # asyncio's loop installs a function of its own, and uvloop's a method of itself.
    return getattr(handler, "__module__", None) == "asyncio.unix_events" or getattr(handler, "__self__", None) is loop


def _describe(signum: int, handler: object, loop: asyncio.AbstractEventLoop) -> str:
    """Return the `repr()` of a handler; of one that was given to `add_signal_handler()`, with its name."""
    if not _is_from_loop(handler, loop):
        return repr(handler)
    # Both loops have a dictionary of them, and uvloop does not show it.
    for each in (getattr(loop, "_signal_handlers", None), *gc.get_referents(loop)):
        if isinstance(each, dict) and type(each.get(signum)).__name__ == "Handle":
            return f"add_signal_handler() with {each[signum]!r}"
    return "add_signal_handler()"


def _call(handler: Callable[..., object], *args: object) -> None:
    """Call a handler of the app's; if it asks to exit, the stop that follows is what it asks for."""
    with suppress(SystemExit, KeyboardInterrupt):
        handler(*args)


def _still_valid(previous: Previous) -> Previous:
    """
    Return the handler to restore: the previous one, or the one that its owner would have restored by now.

    `asyncio.Runner.run()` handles SIGINT, and restores the default handler when it ends, unless ours is installed then.
    """
    if isinstance(previous, functools.partial) and isinstance(getattr(previous.func, "__self__", None), asyncio.Runner):
        for task in previous.keywords.values():
            if isinstance(task, asyncio.Task) and task.done():
                return signal.default_int_handler
    return previous
