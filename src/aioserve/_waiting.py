"""
How a server's own task begins, and how it waits: for facts, never on a clock, and never to be thrown off by a
cancellation.
"""

from __future__ import annotations

import asyncio
import sys
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any, TypeVar

T = TypeVar("T")

TURNS_BEFORE_A_TIMER = 3


def begin(coroutine: Coroutine[Any, Any, T], *, name: str | None = None) -> asyncio.Task[T]:
    """
    Make a task, and do its first step at once, which saves a turn of the loop.

    The first step has to wait on Python 3.11, and where the program makes its tasks in a way of its own.
    """
    loop = asyncio.get_running_loop()
    if sys.version_info >= (3, 12) and loop.get_task_factory() is None:
        return asyncio.Task(coroutine, loop=loop, name=name, eager_start=True)
    return loop.create_task(coroutine, name=name)


@types.coroutine
def _turn() -> Generator[None, None, None]:
    yield


class Waiting:
    """
    Lets the one task of a server sleep until something is so, and look again after every change.

    Whoever changes something calls `notify()`, as with an `asyncio.Condition`, but without a lock: all of it happens in
    one loop. Only one task may wait at a time.

    Cancelling that task does not end its wait: a server whose task is cancelled still has handlers to await and a
    lifespan to end. It *forces* instead, once for all: from then on only what is bounded by its own timeout is waited
    for. (At its end `asyncio.run` cancels every task, ours included.)
    """

    def __init__(self) -> None:
        self.forced: bool = False
        self._changed = False
        self._sleeper: asyncio.Future[None] | None = None

    def notify(self) -> None:
        self._changed = True
        if self._sleeper is not None and not self._sleeper.done():
            self._sleeper.set_result(None)

    def force(self) -> None:
        self.forced = True
        self.notify()

    async def wait_for(
        self, predicate: Callable[[], bool], timeout: float | None = None, *, even_if_forced: bool = False
    ) -> bool:
        """
        Wait until the predicate holds, `timeout` seconds are over, or force is used; return the predicate.

        Args:
            predicate: What is waited for; looked at once for each loop turn in which something changed.
            timeout: In seconds; `None` for no limit.
            even_if_forced: Go on waiting when forced. Give a timeout with it.
        """
        expired = False

        def over() -> bool:
            return predicate() or expired or (self.forced and not even_if_forced)

        def expire() -> None:
            nonlocal expired
            expired = True
            self.notify()

        timer = None
        if timeout is not None:
            # Most things are over within a few loop turns, and then need no timer.
            for _ in range(TURNS_BEFORE_A_TIMER):
                if over():
                    return predicate()
                await self.turns(1)
            timer = asyncio.get_running_loop().call_later(timeout, expire)

        try:
            while True:
                # Before looking: a signal handler may change something at any point from here on.
                self._changed = False
                if over():
                    break
                self._sleeper = asyncio.get_running_loop().create_future()
                if not self._changed:
                    await self._sleep(self._sleeper)
        finally:
            if timer is not None:
                timer.cancel()
        return predicate()

    async def turns(self, count: int) -> None:
        """Let the loop turn: for what it has already put on its list for the next turns."""
        for _ in range(count):
            await self._sleep(_turn())

    async def _sleep(self, waiter: Awaitable[object]) -> None:
        try:
            await waiter
        except asyncio.CancelledError:
            self.force()
