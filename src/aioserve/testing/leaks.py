"""Checks that a block leaves nothing behind, by two snapshots of the process and its loop."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import stat
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

from aioserve import _limits

# The threads in which a loop runs synchronous functions: anyio's, and those of its default executor.
POOLS = ("AnyIO worker thread", "asyncio_", "uvloop_")


class assert_nothing_left:  # noqa: N801 (it reads as what it does, like contextlib.suppress)
    """
    Fail if a block leaves anything behind, with a list of it.

        async with assert_nothing_left():
            async with serving(app) as server:
                ...

    It compares these before and after the block:

    - threads, and open descriptors (sockets, files, pipes);
    - signal handlers, the handlers, filters and levels of loggers, warning filters;
    - with ``async with``, in the running loop: tasks, timers, and the loop's exception handler. (uvloop does not show
      its timers.)

    ``with`` is for synchronous code, such as a block around `asyncio.run()`. The loop first gets some turns to close
    things, and threads get a few seconds to end. Garbage is collected, so that Python's warnings about forgotten
    resources appear here. What is missing after the block is not a leak. If the block raises, nothing is checked.

    Args:
        thread_pools: Whether to include the threads that a running loop keeps for synchronous functions, such as a
            FastAPI endpoint without ``async``. With ``with``, they are always included. Default: `False`.

    Raises:
        AssertionError: Something was left behind; the message says what, one line each.
        RuntimeError: ``async with`` was used without a running asyncio event loop.
    """

    def __init__(self, *, thread_pools: bool = False) -> None:
        self._thread_pools = thread_pools
        self._before: Snapshot

    def __enter__(self) -> None:
        self._before = take_snapshot()

    def __exit__(self, exc_type: object, exc: object, tb: object) -> None:
        __tracebackhide__ = True
        if exc is not None:
            return
        until = time.monotonic() + _limits.ENDING_THREADS
        for thread in self._new_threads(pools=True):
            thread.join(max(0.0, until - time.monotonic()))
        gc.collect()
        _fail_if_any(_differences(self._before, take_snapshot()))

    async def __aenter__(self) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise RuntimeError(
                "async with assert_nothing_left() requires a running asyncio event loop; without one, use a plain with"
            ) from None
        self._before = take_snapshot(loop)

    async def __aexit__(self, exc_type: object, exc: object, tb: object) -> None:
        __tracebackhide__ = True
        if exc is not None:
            return
        for _ in range(_limits.LEAK_TURNS):
            await asyncio.sleep(0)
        until = time.monotonic() + _limits.ENDING_THREADS
        while self._new_threads(pools=self._thread_pools) and time.monotonic() < until:  # noqa: ASYNC110 (no loop is told of it)
            await asyncio.sleep(_limits.LOOK_AT_THREADS)
        gc.collect()
        now = take_snapshot(asyncio.get_running_loop())
        _fail_if_any(_differences(self._before, now._replace(threads=self._new_threads(pools=self._thread_pools))))

    def _new_threads(self, *, pools: bool) -> set[threading.Thread]:
        new = set(threading.enumerate()) - self._before.threads
        return {thread for thread in new if pools or not thread.name.startswith(POOLS)}


class Snapshot(NamedTuple):
    """What is compared; the last three are of the loop."""

    threads: set[threading.Thread]
    descriptors: dict[int, str]
    signal_handlers: dict[int, object]
    loggers: dict[str, dict[str, object]]
    warning_filters: list[object]
    tasks: set[asyncio.Task[object]]
    timers: list[tuple[asyncio.TimerHandle, object]]  # each with its callback, which it drops when it is cancelled
    exception_handler: object


def take_snapshot(loop: asyncio.AbstractEventLoop | None = None) -> Snapshot:
    """Return the state of the process, and of the loop if there is one."""
    tasks: set[asyncio.Task[object]] = set()
    timers = []
    if loop is not None:
        # The current task may be another one in the second snapshot, and anyio's plugin runs fixtures in its own tasks.
        tasks = asyncio.all_tasks(loop) - {asyncio.current_task(loop)}
        # On Windows, asyncio has a new one for each connection that a server is about to accept.
        others = ("TestRunner.", "IocpProactor.accept.")
        tasks = {each for each in tasks if not getattr(each.get_coro(), "__qualname__", "").startswith(others)}
        timers = [(timer, timer._callback) for timer in getattr(loop, "_scheduled", ()) if not timer.cancelled()]
    return Snapshot(
        threads=set(threading.enumerate()),
        descriptors=open_descriptors(),
        signal_handlers={int(each): _handler(each) for each in signal.valid_signals()},
        loggers={
            name: _settings(logger)
            for name, logger in {"root": logging.root, **logging.root.manager.loggerDict}.items()
            if isinstance(logger, logging.Logger)
        },
        warning_filters=list(warnings.filters),
        tasks=tasks,
        timers=timers,
        exception_handler=loop and loop.get_exception_handler(),
    )


def open_descriptors() -> dict[int, str]:
    """Return the open descriptors with a description of each, without those that libuv keeps; none on Windows."""
    found: dict[int, str] = {}
    if sys.platform == "win32":
        return found
    for number in sorted(map(int, os.listdir("/dev/fd"))):
        with suppress(OSError):  # the one that was used to list the directory
            if (what := _describe(number)) != os.devnull:
                found[number] = what
    for number in _locks_of_libuv([number for number, what in found.items() if what == "a pipe"]):
        del found[number]
    return found


def _locks_of_libuv(pipes: list[int]) -> list[int]:
    """
    Return the two ends of the pipe that uvloop keeps from its first loop on, if it is among these; of others as well.

    libuv has it as a lock for its signal handlers. While nobody holds the lock, one byte waits in it. Each of these
    packages has a libuv of its own.
    """
    packages = sys.modules.keys() & {"uvloop", "winloop", "zuvloop"}
    if sys.platform == "win32" or not packages:
        return []
    import fcntl
    import termios

    def is_end(number: int, kind: int) -> bool:
        return fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == kind

    locks: list[int] = []
    one = (1).to_bytes(4, sys.byteorder)
    for reading in pipes:
        if is_end(reading, os.O_RDONLY) and fcntl.ioctl(reading, termios.FIONREAD, bytes(4)) == one:
            for writing in pipes:  # both ends are in this process, and were opened one after the other
                if writing > reading and is_end(writing, os.O_WRONLY) and os.path.sameopenfile(reading, writing):
                    locks += [reading, writing]
    return locks[: 2 * len(packages)]


def _describe(descriptor: int) -> str:
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISSOCK(mode):
        # A duplicate, so that closing it leaves the original alone.
        with socket.socket(fileno=os.dup(descriptor)) as sock:
            return f"a socket, {sock.getsockname() or 'without a name'}"
    if stat.S_ISFIFO(mode):
        return "a pipe"
    try:
        return os.readlink(f"/dev/fd/{descriptor}")
    except OSError:  # not on macOS
        return os.devnull if os.path.samestat(os.fstat(descriptor), os.stat(os.devnull)) else "a file"


def _handler(number: int) -> object:
    handler = signal.getsignal(number)
    # asyncio.Runner has a new one for each run, and setup and teardown of a fixture can be two runs.
    if getattr(getattr(handler, "func", None), "__qualname__", "") == "Runner._on_sigint":
        return "asyncio.Runner's"
    return handler


def _settings(logger: logging.Logger) -> dict[str, object]:
    # pytest adds and removes handlers of its own, and null handlers do nothing.
    handlers = [
        handler
        for handler in logger.handlers
        if not type(handler).__module__.startswith("_pytest") and not isinstance(handler, logging.NullHandler)
    ]
    settings = {name: getattr(logger, name) for name in ("level", "propagate", "disabled")}
    return {**settings, "handlers": tuple(handlers), "filters": tuple(logger.filters)}


def _differences(before: Snapshot, now: Snapshot) -> Iterator[str]:
    """Describe what is new or has changed."""
    for task in now.tasks - before.tasks:
        yield f"a task: {task!r}"
    # Compared by their callbacks: a repeating timer is a new one each time.
    waiting = [callback for _, callback in before.timers]
    for timer, callback in now.timers:
        if callback in waiting:
            waiting.remove(callback)
        else:
            yield f"a timer: {timer!r}"
    if now.exception_handler != before.exception_handler:
        yield f"the loop's exception handler: {now.exception_handler!r}; it was {before.exception_handler!r}"
    for thread in now.threads - before.threads:
        yield f"a thread: {thread!r}"
    # Compared by their descriptions, not by their numbers: uvloop makes two new unnamed sockets each time it runs.
    known = Counter(before.descriptors.values())
    for number in sorted(now.descriptors, key=lambda number: number not in before.descriptors):
        what = now.descriptors[number]
        known[what] -= 1
        if known[what] < 0:
            yield f"descriptor {number}: {what}"
    for number, handler in now.signal_handlers.items():
        if (was := before.signal_handlers[number]) != handler:
            yield f"a handler of signal {number}, {signal.strsignal(number)}: {handler!r}; it was {was!r}"
    for name, logger in now.loggers.items():
        known_logger = before.loggers.get(name) or _settings(logging.Logger(name))
        for field, value in logger.items():
            if value != known_logger[field]:
                yield f"{field} of the logger {name!r}: {value!r}; it was {known_logger[field]!r}"
    if now.warning_filters != before.warning_filters:
        new = [each for each in now.warning_filters if each not in before.warning_filters]
        yield f"warning filters: {new or 'some are missing, or in another order'}"


def _fail_if_any(differences: Iterator[str]) -> None:
    __tracebackhide__ = True
    lines = "\n".join(f"- {each}" for each in differences)
    if lines:
        raise AssertionError(f"left behind:\n{lines}")
