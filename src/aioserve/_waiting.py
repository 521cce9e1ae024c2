"""How a server's task starts and waits: for events, with optional timeouts; a cancellation does not end a wait."""

from __future__ import annotations

import asyncio
import math
import sys
import threading
import time
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any, Self, TypeVar

import anyio

from aioserve import _limits
from aioserve._log import logger

T = TypeVar("T")


def start_task(
    coroutine: Coroutine[Any, Any, T], *, name: str | None = None, if_delayed: Callable[[Any], object] | None = None
) -> asyncio.Task[T]:
    """
    Make a task and run its first step at once, which saves a turn of the loop.

    On Python 3.11 the first step comes in the next turn; where the loop has a task factory, that decides. Such a task
    can be cancelled before its first step: `if_delayed` is called at its end. If the loop is closed before the task is
    done, asyncio logs nothing: we log it once for a server.
    """
    loop = asyncio.get_running_loop()
    if sys.version_info >= (3, 12) and loop.get_task_factory() is None:
        # Python 3.14 has it in create_task() as well, which is slower, and passes it on to task factories.
        task: Any = asyncio.Task(coroutine, loop=loop, name=name, eager_start=True)
        task._log_destroy_pending = False
    else:
        let_die_quietly(task := loop.create_task(coroutine, name=name))
        if if_delayed is not None:
            task.add_done_callback(if_delayed)
    made: asyncio.Task[T] = task
    return made


def wait_for_thread(event: threading.Event, timeout: float | None = None) -> bool:
    """
    Wait for an event that another thread sets; return whether it was set.

    On Windows, Ctrl+C interrupts no wait for a lock before CPython 3.14 (CPython #125541), so it looks now and then.
    """
    if sys.platform != "win32":
        return event.wait(timeout)
    until = math.inf if timeout is None else time.monotonic() + timeout
    while not event.wait(max(0, min(_limits.LOOK_FOR_CTRL_C, until - time.monotonic()))):
        if time.monotonic() >= until:
            return False
    return True


def let_die_quietly(task: asyncio.Task[Any]) -> None:
    """Keep asyncio from logging that a task was pending when its loop was closed."""
    try:
        task._log_destroy_pending = False  # type: ignore[attr-defined]  # as `run_until_complete()` does
    except AttributeError:
        pass  # a task factory has made something else


async def outlast(
    is_over: Callable[[], bool], wait: Callable[[], Awaitable[object]], on_cancel: Callable[[], object]
) -> asyncio.CancelledError | None:
    """
    Wait until something is over, whatever happens; return the first native cancellation, for the caller to raise.

    An anyio scope delivers its cancellation again on every loop turn, hence the shield. A native cancellation passes
    through a shield, but only once.
    """
    first: asyncio.CancelledError | None = None
    with anyio.CancelScope(shield=True):
        while not is_over():
            try:
                await wait()
            except asyncio.CancelledError as exc:
                first = first or exc
                on_cancel()
    return first


async def complete(task: asyncio.Task[T]) -> T:
    """Return the result of a task, which is not cancelled with its caller; a cancellation is raised afterwards."""
    cancellation = await outlast(task.done, lambda: asyncio.wait({task}), lambda: None)
    if cancellation is not None:
        raise cancellation from task.exception()
    return task.result()


@types.coroutine
def _turn() -> Generator[None, None, None]:
    yield


class OnceSoon:
    """Calls a function in the next turn of the loop: once for each argument, however often it is asked to."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._due: set[object] = set()

    def call(self, act: Callable[[Any], object], argument: object) -> None:
        if argument not in self._due:
            self._due.add(argument)
            self._loop.call_soon(self._call, act, argument)

    def _call(self, act: Callable[[Any], object], argument: object) -> None:
        self._due.discard(argument)
        act(argument)


def after_turns(loop: asyncio.AbstractEventLoop, count: int, callback: Callable[[], object]) -> None:
    """Call a function after a number of turns of the loop."""
    if count:
        loop.call_soon(after_turns, loop, count - 1, callback)
    else:
        callback()


class Condition:
    """
    Lets the one task of a server wait until a predicate holds.

    Whoever changes something calls `notify()`, as with an `asyncio.Condition`, but without a lock: everything happens
    in one loop. Only one task may wait at a time.

    Cancelling that task does not end its wait: a server whose task is cancelled still has handlers to await and a
    lifespan to end. Instead it *forces*, from then on: only waits that are bounded by their own timeout go on. (At its
    end `asyncio.run()` cancels every task, this one included.)
    """

    def __init__(self) -> None:
        # asyncio may not know it later: qasync lets tasks take steps when Qt has ended the loop.
        self.loop: asyncio.AbstractEventLoop = asyncio.get_running_loop()
        self.forced: bool = False
        self._changed = False
        self._sleeper: asyncio.Future[None] | None = None

    def notify(self) -> None:
        """Let the waiting task look at its predicate again."""
        self._changed = True
        if self._sleeper is not None and not self._sleeper.done():
            try:
                self._sleeper.set_result(None)
            except RuntimeError:
                pass  # its loop is closed

    def force(self) -> None:
        """End every wait that is not bounded by its own timeout, now and later."""
        self.forced = True
        self.notify()

    async def wait_for(
        self, predicate: Callable[[], bool], timeout: float | None = None, *, even_if_forced: bool = False
    ) -> bool:
        """
        Wait until the predicate holds, the timeout is over, or `force()` is called; return the predicate.

        It is evaluated again after each `notify()`. With `even_if_forced`, only the timeout ends the wait.
        """
        expired = False

        def expire() -> None:
            nonlocal expired
            expired = True
            self.notify()

        timer = None
        turns_left = 0 if timeout is None else _limits.TURNS_BEFORE_TIMER
        try:
            while True:
                # Cleared before the look: a signal handler may change something at any point from here on.
                self._changed = False
                if predicate():
                    return True
                if expired or (self.forced and not even_if_forced):
                    return False
                if turns_left:  # most waits are over within a few loop turns, and need no timer
                    turns_left -= 1
                    await self._sleep(_turn())
                    continue
                if timeout is not None and timer is None:
                    timer = self.loop.call_later(timeout, expire)
                self._sleeper = self.loop.create_future()
                if not self._changed:
                    await self._sleep(self._sleeper)
        finally:
            if timer is not None:
                timer.cancel()

    async def turns(self, count: int) -> None:
        """Let the loop turn, for what it has already scheduled for its next turns."""
        for _ in range(count):
            await self._sleep(_turn())

    async def _sleep(self, waiter: Awaitable[object]) -> None:
        try:
            await waiter
        except asyncio.CancelledError:
            self.force()


class SlowStop:
    """The waits of one stop: if they take longer than a second, a warning says once what it waits for."""

    _has_warned: bool = False
    _since: float | None = None  # when the first wait began, in the loop's time

    def __init__(self, condition: Condition, name: str, advice: str = "") -> None:
        self._condition = condition
        self._name = name
        self._advice = advice

    async def wait_for(
        self,
        predicate: Callable[[], bool],
        timeout: float | None,
        what: Callable[[], str],
        time_left: Callable[[], float | None] | None = None,
    ) -> bool:
        """
        Wait as the condition does; the warning calls `what`.

        It says how much time is left: of this timeout, or as `time_left` says where several waits share their time.
        """
        now = self._condition.loop.time()
        self._since = self._since or now
        # Each wait gets a moment, since what it is for may be quick.
        early = max(_limits.SLOW_STOP / 4, self._since + _limits.SLOW_STOP - now)
        if not self._has_warned and (timeout is None or timeout > early):
            if await self._condition.wait_for(predicate, early) or self._condition.forced:
                return predicate()
            timeout = None if timeout is None else timeout - early
            left = timeout if time_left is None else time_left()
            if left is None or left > _limits.SLOW_STOP / 4:
                self._warn(what(), left)
        return await self._condition.wait_for(predicate, timeout)

    def _warn(self, what: str, left: float | None) -> None:
        self._has_warned = True
        at_most = "without a limit" if left is None else f"for at most {left:.{0 if left >= 2 else 1}f} s"
        logger.warning("%s: the stop waits for %s, %s%s", self._name, what, at_most, self._advice)


class InterruptScope:
    """
    A part of the current task that can be cancelled for a reason of aioserve's.

    The cancellation is taken back at the end of the block, so nobody outside sees it.
    """

    def __init__(self) -> None:
        self._interrupts = 0

    def begin(self) -> Self:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._before = task.cancelling()  # cancellations that came earlier are left alone
        return self

    def interrupt(self) -> bool:
        """Cancel the block, from another task or from the loop; return `False` if the task that began it has ended."""
        # The block cannot end before the cancellation arrives, so it cannot reach later code.
        was_cancelled = self._task.cancel()
        self._interrupts += was_cancelled
        return was_cancelled

    async def __aenter__(self) -> Self:
        return self.begin()

    async def __aexit__(self, _: object, exc: BaseException | None, __: object) -> bool:
        if not self._interrupts:
            return False

        for _ in range(self._interrupts):
            left = self._task.uncancel()
        has_others = left > self._before
        if not isinstance(exc, asyncio.CancelledError):
            return False
        # If an anyio scope is cancelled too, both arrive as one CancelledError, which the scope would not recognize as
        # its own. It raises its own here.
        from anyio.lowlevel import checkpoint_if_cancelled  # only where something was interrupted

        await checkpoint_if_cancelled()
        return not has_others  # ours alone is swallowed: what comes next says why
