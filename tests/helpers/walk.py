"""
The cancellation walk: one run of start, a request and stop, interrupted at each turn of the loop.

A walk interrupts a run in turn 0, then a new run in turn 1, and so on, until a run is over before its turn comes. After
each of these points it checks what came out of the run, which cancellations the task counts, and whether anything is
left. With `--every 5`, only each fifth turn is tried.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeAlias

import anyio
from anyio.abc import TaskStatus
from anyio.lowlevel import checkpoint_if_cancelled

from aioserve import (
    Server,
    ServerCrashedError,
    ServingError,
    ShutdownError,
    StartupError,
    Swappable,
    serve,
    serving,
    start,
)
from tests.helpers.apps import App, Receive, Scope, Send
from tests.helpers.clients import connect
from tests.helpers.turns import after, turns

# One of so many turns is tried; the option `--every` sets it.
every = 1

# How many turns it takes at most until the clients' transports have closed after a run.
SETTLING_TURNS = 20

# How many turns a request takes: more than a stop of an idle server.
BUSY_TURNS = 12

# How many turns the app's startup takes, and its shutdown. (Without any, they could not be interrupted.)
LIFESPAN_TURNS = 3


class SiblingError(Exception):
    """Raised by a sibling in a task group."""


class Fragile(App):
    """An app that takes some turns for a request, and whose lifespan can be made to raise or to hang at any point."""

    def __init__(self) -> None:
        super().__init__()
        self.busy = 0
        self.began = False
        self.started = False
        self.told = False
        """Whether it has received that it is to shut down."""
        self.raised: type[ServingError] | None = None
        """What the server's error is to be, once its lifespan has raised."""
        self._task: asyncio.Task[object] | None = None
        self._fate: Callable[[], Awaitable[None]] | None = None

    def raise_now(self) -> None:
        self._meet(self._raise)

    def hang_now(self) -> None:
        self._meet(self._hang)

    def _meet(self, fate: Callable[[], Awaitable[None]]) -> None:
        self._fate = fate
        if self._task is not None:
            self._task.cancel()

    async def lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._task = asyncio.current_task()
        assert self._task is not None
        try:
            if self._fate is None:
                await super().lifespan(scope, partial(self._receive, receive), partial(self._send, send))
                return
        except asyncio.CancelledError:
            if self._fate is None:
                raise
            self._task.uncancel()
        await self._fate()

    async def _receive(self, receive: Receive) -> dict[str, Any]:
        await turns(LIFESPAN_TURNS)
        message = await receive()
        self.began = True
        self.told = message["type"] == "lifespan.shutdown"
        return message

    async def _send(self, send: Send, message: dict[str, Any]) -> None:
        await turns(LIFESPAN_TURNS)
        await send(message)
        self.started = True

    async def request(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.busy += 1
        try:
            for _ in range(BUSY_TURNS):
                await asyncio.sleep(0)
            await super().request(scope, receive, send)
        except asyncio.CancelledError:
            self.events.append("cancelled")
            raise
        finally:
            self.busy -= 1

    async def _raise(self) -> None:
        if self.told:
            self.raised = ShutdownError
        elif self.started:
            self.raised = ServerCrashedError
        elif self.began:  # otherwise it counts as an app without a lifespan
            self.raised = StartupError
        raise self.error

    async def _hang(self) -> None:
        await asyncio.Event().wait()


class Run:
    """One run by one way to start: the app starts, a request is answered, the server stops."""

    def __init__(self, way: str, *, swappable: bool = False, **options: Any) -> None:
        self.app = Fragile()
        self.served: Any = Swappable(self.app) if swappable else self.app
        self.options = options
        self.server: Server | None = None
        self.over = False
        self.left_behind = False  # a part of the app was still running when the block was over
        self._way = WAYS[way]
        self._visitor: asyncio.Task[None] | None = None

    async def block(self) -> None:
        """Run; this is what is cancelled, as a task or in a scope."""
        try:
            await self._way(self)
            # If the scope was cancelled in the last turn, that has to be noticed before the run counts as complete.
            await checkpoint_if_cancelled()
        finally:
            self.over = True
            events = self.app.events
            self.left_behind = self.app.busy > 0 or ("startup" in events and "lifespan over" not in events)

    async def visited(self) -> None:
        """Wait for the client of `serve()`, which has no body."""
        if self._visitor is not None:
            await asyncio.wait({self._visitor})
            self._visitor.result()

    async def visit(self, server: Server) -> None:
        """Send a request, which need not be answered: the server may be closing."""
        self.server = server
        try:
            async with connect(server) as connection:
                connection.ask("/")
                await connection.answer()
        except (OSError, asyncio.IncompleteReadError):
            pass

    def visit_and_close(self, server: Server) -> None:
        async def visit_and_close() -> None:
            await self.visit(server)
            server.close()

        self._visitor = asyncio.create_task(visit_and_close(), name="visitor")


async def by_serving(run: Run) -> None:
    async with serving(run.served, **run.options) as server:
        await run.visit(server)


async def by_start(run: Run) -> None:
    server = await start(run.served, **run.options)
    try:
        await run.visit(server)
    finally:
        await server.aclose()


async def by_start_block(run: Run) -> None:
    async with await start(run.served, **run.options) as server:
        await run.visit(server)


async def by_serve(run: Run) -> None:
    class Started(TaskStatus[Server]):
        def started(self, value: Server | None = None) -> None:
            assert value is not None
            run.visit_and_close(value)

    await serve(run.served, task_status=Started(), **run.options)


async def by_task_group(run: Run) -> None:
    async with anyio.create_task_group() as task_group:
        server = await task_group.start(partial(serve, run.served, **run.options))
        await run.visit(server)
        task_group.cancel_scope.cancel()


WAYS: dict[str, Callable[[Run], Awaitable[None]]] = {
    "serving": by_serving,
    "start": by_start,
    "start as a block": by_start_block,
    "serve": by_serve,
    "serve in a task group": by_task_group,
}

Interruption: TypeAlias = Callable[[Run, int], Awaitable[bool]]
"""Interrupts a run in a turn, waits for its end, checks it; returns whether that turn came before its end."""


async def walk(make: Callable[[], Run], interrupt: Interruption, *, step: int | None = None) -> int:
    """
    Interrupt one run after the other, each some turns later, until one is over before; return the number of points.

    The step is that of the option `--every`, unless it is given.
    """
    await make().block()  # uvloop opens some descriptors of its own when it first needs them
    for points, turn in enumerate(itertools.count(step=step or every)):
        before = what_lives()
        run = make()
        interrupted = await interrupt(run, turn)
        assert not run.left_behind
        await run.visited()
        await settle(before)
        if not interrupted:
            return points
    raise AssertionError


def what_lives() -> tuple[object, ...]:
    """Return what a run must not leave behind, as far as it can be seen without a garbage collection."""
    loop = asyncio.get_running_loop()
    # uvloop does not show its timers.
    timers = [handle for handle in getattr(loop, "_scheduled", ()) if not handle.cancelled()]
    return asyncio.all_tasks(), timers, len(os.listdir("/dev/fd"))


async def settle(before: tuple[object, ...]) -> None:
    for _ in range(SETTLING_TURNS):
        if what_lives() == before:
            return
        await asyncio.sleep(0)
    assert what_lives() == before


def acceptable(error: BaseException | None, accept: Callable[[BaseException], bool]) -> bool:
    """Return whether there is no error, or one that is accepted; a group counts as the exceptions in it."""
    if isinstance(error, BaseExceptionGroup):
        return all(acceptable(each, accept) for each in error.exceptions)
    return error is None or accept(error)


def nothing(error: BaseException) -> bool:
    """Accept no error at all."""
    return False


def unless_over(run: Run, act: Callable[[], object]) -> Callable[[], None]:
    def act_unless_over() -> None:
        if not run.over:
            act()

    return act_unless_over


async def natively(
    run: Run, *turns: int, accept: Callable[[BaseException], bool] = nothing, judge: bool = True
) -> bool:
    """
    Cancel the task, once for each of the turns.

    If `cancel()` returned True, the cancellation has to come out and to be counted once. Otherwise the run has to
    complete, or to fail with an error that is accepted. Without `judge`, either is correct.
    """
    task = asyncio.create_task(run.block())
    cancelled: list[bool] = []
    for turn in turns:
        after(turn, unless_over(run, lambda: cancelled.append(task.cancel())))
    await asyncio.wait({task})

    assert task.cancelled() or acceptable(task.exception(), accept)
    if judge:
        assert task.cancelling() == sum(cancelled)
        assert task.cancelled() == any(cancelled)
    assert "cancelled" not in run.app.events or len(cancelled) > 1  # the second one forces the stop
    return bool(cancelled)


async def by_scope(
    run: Run,
    turn: int,
    *,
    native: int | None = None,
    accept: Callable[[BaseException], bool] = nothing,
    judge: bool = True,
) -> bool:
    """
    Cancel an anyio scope around the run, and perhaps the task as well.

    The scope has to catch its own cancellation and no native one.
    """
    completed = False

    async def scoped() -> None:
        nonlocal completed
        with scope:
            await run.block()
            completed = True

    scope = anyio.CancelScope()
    task = asyncio.create_task(scoped())
    cancelled: list[bool] = []
    after(turn, unless_over(run, scope.cancel))
    if native is not None:
        after(native, unless_over(run, lambda: cancelled.append(task.cancel())))
    await asyncio.wait({task})

    error = None if task.cancelled() else task.exception()
    assert acceptable(error, accept)
    if judge:
        assert task.cancelling() == sum(cancelled)
        assert task.cancelled() == any(cancelled)
        if not cancelled and error is None:
            assert completed != scope.cancel_called
            assert scope.cancelled_caught == scope.cancel_called
    assert "cancelled" not in run.app.events or (cancelled and scope.cancel_called)
    return scope.cancel_called or bool(cancelled)


async def by_timeout(run: Run, turn: int) -> bool:
    """Let an `asyncio.timeout()` around the run expire: a `TimeoutError` comes out, and no cancellation is counted."""

    async def limited() -> None:
        async with asyncio.timeout(None) as timeout:
            timeouts.append(timeout)
            await run.block()

    def expire() -> None:
        if timeouts:
            timeouts[0].reschedule(0)
        else:
            after(1, expire)  # the task has not begun

    timeouts: list[asyncio.Timeout] = []
    task = asyncio.create_task(limited())
    after(turn, unless_over(run, expire))
    await asyncio.wait({task})

    assert not task.cancelled()
    assert task.cancelling() == 0
    expired = timeouts[0].expired()
    assert isinstance(task.exception(), TimeoutError) if expired else task.exception() is None
    assert "cancelled" not in run.app.events
    return expired


async def by_sibling(run: Run, turn: int) -> bool:
    """Let a sibling in an `asyncio.TaskGroup` fail: only its error comes out."""

    async def fail() -> None:
        for _ in range(turn):
            await asyncio.sleep(0)
        if not run.over:
            raise SiblingError

    async def grouped() -> None:
        async with asyncio.TaskGroup() as group:
            blocks.append(group.create_task(run.block()))
            group.create_task(fail())

    blocks: list[asyncio.Task[None]] = []
    task = asyncio.create_task(grouped())
    await asyncio.wait({task})

    assert not task.cancelled()
    (block,) = blocks
    error = task.exception()
    if error is None:
        return False
    assert isinstance(error, ExceptionGroup)
    assert [type(each) for each in error.exceptions] == [SiblingError]
    assert block.cancelled() == (block.cancelling() == 1)
    assert "cancelled" not in run.app.events
    return True


async def undisturbed(
    run: Run, turn: int, act: Callable[[], object], accept: Callable[[BaseException], bool] = nothing
) -> bool:
    """Do something to the run other than cancel it: it completes, or fails with an error that is accepted."""
    acted: list[object] = []
    task = asyncio.create_task(run.block())
    after(turn, unless_over(run, lambda: acted.append(act())))
    await asyncio.wait({task})

    assert task.cancelling() == 0
    assert not task.cancelled()
    assert acceptable(task.exception(), accept), task.exception()
    return bool(acted)
