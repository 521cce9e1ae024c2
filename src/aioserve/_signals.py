"""
Stop signals: handles them and restores what was there before. The only file that uses `signal.signal()`.

A signal has one handler, and programs save and restore each other's handlers in any order. So each time that a server
replaces another handler, it installs a new `_Handler`, which remembers the one it replaced. When no server needs it any
more, the replaced handler is restored. If somebody else has replaced ours in between, it stays, and calls the handler
that it replaced. A signal goes to all servers that asked for it, whichever of our handlers is installed.

A handler can interrupt any line of Python in the main thread, so it only records the signal and wakes the loop, which
acts. (`loop.add_signal_handler()` would do that, too, but does not know what was there before, and restores nothing.)
"""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, TypeAlias
from weakref import WeakSet

Previous: TypeAlias = Callable[[int, Any], Any] | int | signal.Handlers


class Interrupted(BaseException):
    """Raised by a signal in the middle of an import, which the loop cannot interrupt."""


class Signals:
    """The stop signals of one server, from `install()` to `release()`; with no signals, neither changes anything."""

    def __init__(self, wanted: Sequence[int] = ()) -> None:
        self.first: str | None = None  # the name of the first signal that came
        self.count: int = 0  # how many signals have come
        self._wanted = wanted
        self._loop: asyncio.AbstractEventLoop
        self._pid: int
        self._action: Callable[[], object] | None = None
        self._interrupting = False
        self._handlers: list[_Handler] = []

    def install(self) -> None:
        """Handle the signals from now on, in the running loop: all of them, or none and raise a `RuntimeError`."""
        if not self._wanted:
            return
        self._loop, self._pid = asyncio.get_running_loop(), os.getpid()
        try:
            for signum in self._wanted:
                _check_available(signum, self._loop)
                handler = signal.getsignal(signum)
                if not isinstance(handler, _Handler):
                    assert handler is not None  # as _check_available() has found
                    handler = _Handler(signum, handler)
                    signal.signal(signum, handler)
                    _HANDLERS.add(handler)
                handler.users.add(self)
                self._handlers.append(handler)
        except BaseException:
            self.release()
            raise

    def on_signal(self, action: Callable[[], object] | None) -> None:
        """Set what the loop does at each signal from now on."""
        self._action = action

    def __enter__(self) -> None:
        """Make signals raise `Interrupted` in the block, for code that blocks the loop; at once if one has come."""
        try:
            self._interrupting = True  # from here on, a signal may raise it as well
            if self.count:
                raise Interrupted
        except Interrupted:
            self._interrupting = False
            raise

    def __exit__(self, *_: object) -> None:
        self._interrupting = False

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

    @property
    def is_detached(self) -> bool:
        """Whether no signal can reach it any more: its loop is closed, or this is a fork of its process."""
        return self._loop.is_closed() or self._pid != os.getpid()

    def record(self, signum: int) -> bool:
        """Record a signal, in its handler; return whether to raise `Interrupted` there."""
        self.count += 1
        if self.first is None:
            self.first = signal_name(signum)
        self._loop.call_soon_threadsafe(self._act)  # which also wakes the loop
        return self._interrupting  # also at later signals, since an import may have swallowed the first one

    def _act(self) -> None:
        if self._action is not None:
            self._action()


class _Handler:
    """The handler that Python calls at a signal, and the one that it has replaced."""

    def __init__(self, signum: int, previous: Previous) -> None:
        self.signum = signum
        self.previous = previous
        self.users: WeakSet[Signals] = WeakSet()

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        users = [each for handler in _HANDLERS if handler.signum == signum for each in handler.attached()]
        interrupting = [each.record(signum) for each in users]
        if any(interrupting):
            raise Interrupted
        if users:
            return
        if callable(self.previous):
            self.previous(signum, frame)
        elif self.previous == signal.SIG_DFL:
            ours = signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)  # which ends the process, with most signals
            signal.signal(signum, ours)

    def attached(self) -> list[Signals]:
        return [each for each in self.users if not each.is_detached]

    def __repr__(self) -> str:
        return f"<aioserve's handler for {signal_name(self.signum)}>"


# Our handlers, as long as a server uses one, or a program keeps one to restore it.
_HANDLERS: WeakSet[_Handler] = WeakSet()


def signal_name(signum: int) -> str:
    try:
        return signal.Signals(signum).name
    except ValueError:
        return f"signal {signum}"  # a real-time signal


def _check_available(signum: int, loop: asyncio.AbstractEventLoop) -> None:
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError(
            f"stop_on_signals: Python handles {signal_name(signum)} only in the main thread, and this is another "
            "thread; handle it in the main thread and call close(), which is thread-safe"
        )
    handler = signal.getsignal(signum)
    if handler is None:
        raise RuntimeError(
            f"stop_on_signals: {signal_name(signum)} has a handler that Python did not install and cannot restore; "
            "call close() in that handler"
        )
    # asyncio's loop installs a function of its own, and uvloop's a method of itself.
    if getattr(handler, "__module__", None) == "asyncio.unix_events" or getattr(handler, "__self__", None) is loop:
        raise RuntimeError(
            f"stop_on_signals: your event loop already handles {signal_name(signum)} (add_signal_handler()); "
            "call close() in your own handler"
        )


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
