"""
Stop signals: who asked for them, and what was there before. The one file that knows `signal.signal`.

There is one handler per signal, and programs save and put back each other's in any order. So ours is an object of its
own each time that it is put on top of another's: it remembers what it has replaced, and once nobody who put it there
needs it any more, that comes back; or, where somebody has put his own on top meanwhile, ours steps aside, and does what
it had replaced, should it ever be called again. A signal goes to everyone who asked for it, whichever of our handlers
is on top.

A handler can interrupt any line of Python in the main thread. So it only takes notes and wakes the loop, which acts.
(`loop.add_signal_handler()` would do so, too; but it cannot say what was there before, and puts nothing back.)
"""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import WeakSet

if TYPE_CHECKING:
    from types import FrameType

Previous: TypeAlias = Callable[[int, Any], Any] | int | signal.Handlers
Act: TypeAlias = Callable[[], object]


class Interrupted(BaseException):
    """What a signal raises in the middle of an import, which no loop can interrupt."""


class Signals:
    """
    The stop signals that one server asked for, from now until `release()`.

    With no signals it is nothing, and nothing is touched.

    Raises:
        RuntimeError: A signal cannot be taken: not from this thread, or not from who handles it now. None is then.
    """

    def __init__(self, wanted: Sequence[int] = ()) -> None:
        self.first: str | None = None
        """The name of the first one that came."""
        self.count: int = 0
        """How many have come."""

        self._loop = asyncio.get_running_loop()
        self._pid = os.getpid()
        self._act: Act | None = None
        self._interrupting = False
        self._handlers: list[_Handler] = []
        for signum in wanted:
            _check_free(signum, self._loop)
        try:
            for signum in wanted:
                self._handlers.append(_install(signum, self))
        except BaseException:
            self.release()
            raise

    def then(self, act: Act | None) -> None:
        """Say what the loop is to do at each signal from now on."""
        self._act = act

    def __enter__(self) -> None:
        """
        Raise `Interrupted` in the block at once, when a signal comes or has come; for what holds up the loop.

        Python itself does so at Ctrl+C.
        """
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
        """Want nothing more, and put back what was there before, as far as it is ours to put back."""
        self._act = None
        if not self._handlers:
            return
        handlers, self._handlers = self._handlers, []
        for handler in handlers:
            handler.asked_by.discard(self)
        if threading.current_thread() is threading.main_thread():  # else it is garbage, collected anywhere
            for handler in handlers:
                _put_back(handler.signum)

    @property
    def is_deaf(self) -> bool:
        """Whether it cannot be told any more: its loop is closed, or this is a fork of the process that asked."""
        return self._loop.is_closed() or self._pid != os.getpid()

    def take_note(self, signum: int) -> bool:
        """Take note of a signal, in its handler; return whether to raise `Interrupted` there."""
        self.count += 1
        if self.first is None:
            self.first = name_of(signum)
        self._loop.call_soon_threadsafe(self._tell)  # which also wakes it up
        return self._interrupting  # each time: code that is imported may have swallowed the last one

    def _tell(self) -> None:
        if self._act is not None:
            self._act()


class _Handler:
    """What Python calls at a signal; and what it has replaced."""

    def __init__(self, signum: int, previous: Previous) -> None:
        self.signum = signum
        self.previous = previous
        self.asked_by: WeakSet[Signals] = WeakSet()

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        hearing = [each for handler in _HANDLERS if handler.signum == signum for each in handler.hearing()]
        if not hearing:
            _do_as(self.previous, signum, frame)
        notes = [each.take_note(signum) for each in hearing]
        if any(notes):
            raise Interrupted

    def hearing(self) -> list[Signals]:
        return [each for each in self.asked_by if not each.is_deaf]

    def __repr__(self) -> str:
        return f"<aioserve's handler for {name_of(self.signum)}>"


# All that may still be somewhere: as long as somebody asks for a signal, or has saved the handler to put it back.
_HANDLERS: WeakSet[_Handler] = WeakSet()


def name_of(signum: int) -> str:
    try:
        return signal.Signals(signum).name
    except ValueError:
        return f"signal {signum}"  # a real-time one


def _check_free(signum: int, loop: asyncio.AbstractEventLoop) -> None:
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError(
            f"stop_on_signals: Python handles {name_of(signum)} in the main thread only, and this is another; "
            "call close() from there, which is safe"
        )
    handler = signal.getsignal(signum)
    if handler is None:
        raise RuntimeError(
            f"stop_on_signals: {name_of(signum)} is handled by something that is not Python's and that could not be "
            "put back; call close() from there"
        )
    # asyncio's loop leaves a function of its own there, and uvloop's a method of itself.
    if getattr(handler, "__module__", None) == "asyncio.unix_events" or getattr(handler, "__self__", None) is loop:
        raise RuntimeError(
            f"stop_on_signals: your event loop handles {name_of(signum)} already (add_signal_handler()); "
            "call close() in your own handler"
        )


def _install(signum: int, wanted_by: Signals) -> _Handler:
    current = signal.getsignal(signum)
    if isinstance(current, _Handler):
        handler = current
    else:
        assert current is not None
        handler = _Handler(signum, current)
        signal.signal(signum, handler)
        _HANDLERS.add(handler)
    handler.asked_by.add(wanted_by)
    return handler


def _put_back(signum: int) -> None:
    """Take the handler on top away, if it is ours and nobody needs it."""
    current = signal.getsignal(signum)
    if isinstance(current, _Handler) and not current.hearing():
        signal.signal(signum, _still_good(current.previous))


def _still_good(previous: Previous) -> Previous:
    """
    What is to be put back: what was there, or what whoever was there would have put back by now.

    `asyncio.Runner.run()` handles SIGINT, and takes that back in its end; but not if it finds ours on top.
    """
    if isinstance(previous, functools.partial):
        by_a_runner = isinstance(getattr(previous.func, "__self__", None), asyncio.Runner)
        for task in previous.keywords.values():
            if by_a_runner and isinstance(task, asyncio.Task) and task.done():
                return signal.default_int_handler
    return previous


def _do_as(handler: Previous, signum: int, frame: FrameType | None) -> None:
    if callable(handler):
        handler(signum, frame)
    elif handler == signal.SIG_DFL:
        ours = signal.signal(signum, signal.SIG_DFL)
        signal.raise_signal(signum)  # the end, for most of them
        signal.signal(signum, ours)
