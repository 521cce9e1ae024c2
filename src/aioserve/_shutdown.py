"""
How a server stops, told as a story.

    asked            `stopping` is set; from here every HTTP/1 response says "connection: close"
    drain            for `drain_delay`, it still accepts
    stop accepting   one last look at what waits in the kernel's queue, then the listeners close
    owe              what is idle closes at once; who has never sent anything gets a moment for a first request
    finish           WebSockets get 1012; requests in flight run on, within `shutdown_timeout`
    persuade         after `disconnect_after`, or when the budget is over, `receive()` says `http.disconnect`
    force            budget over: handlers are cancelled and awaited, what is left of connections is dropped
    end              the app's lifespan shuts down, after the last handler

So a request that had reached this machine is answered, and nobody waits who is owed nothing. Every wait is for a fact
(a task that ended, a connection that is gone), and every wait is bounded. With nothing in flight no timer is made.
"""

# No annotations from the future: a NamedTuple compiles each, if it is a string.

import asyncio
import logging
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from aioserve._errors import ShutdownError

if TYPE_CHECKING:
    from aioserve._engine import Engine

logger = logging.getLogger("aioserve")

# How long a connection that has never sent anything may still do so, in seconds.
FIRST_REQUEST = 0.25

# How long cancelled handlers may take to end, in seconds; a handler that swallows its cancellation holds us no longer.
CANCELLED_HANDLERS = 1.0

# How many loop turns it takes, at most, until a connection that we accepted, closed or aborted is known, or gone, and
# until what had arrived on it is read: one for the task that makes it, one for connection_made(), one to look at the
# socket, one to read it. Most handlers have accepted their WebSocket by then.
SETTLING_TURNS = 4

# How many loop turns a handler gets that has been told of a disconnect, before it is cancelled: for a farewell.
FAREWELL_TURNS = 10


class HeldUp(NamedTuple):
    """A handler that was still running when the time for it was over."""

    method: str
    """The request's method; ``"WEBSOCKET"`` for a WebSocket."""
    path: str
    client: tuple[str, int] | None
    """The client's address and port, where it has any."""
    where: tuple[str, ...]
    """The coroutines that were waiting for each other, outermost first, each with file and line."""
    stuck: bool
    """Whether it went on all the same when the server had closed."""

    def __str__(self) -> str:
        client = ":".join(map(str, self.client)) if self.client else "?"
        inner = [each for each in self.where if f"({_ASYNCIO}" not in each] or self.where
        where = f" in {inner[-1]}" if inner else ""
        return f"{self.method} {self.path} of {client}{where}{', which is stuck' if self.stuck else ''}"


class Report(NamedTuple):
    """How a server was closed."""

    duration: float
    """From the moment that it was asked to, in seconds."""
    aborted: int
    """Connections that had to be dropped."""
    persuaded: tuple[HeldUp, ...]
    """Handlers that were told of a disconnect because the time was over, and then ended by themselves."""
    cancelled: tuple[HeldUp, ...]
    """Handlers that had to be cancelled."""
    lifespan_stuck: bool
    """Whether the app's lifespan was cancelled, and went on all the same."""


Forced: TypeAlias = tuple[int, tuple[HeldUp, ...], tuple[HeldUp, ...]]

_ASYNCIO = asyncio.__file__.removesuffix("__init__.py")


def longest(drain_delay: float, shutdown_timeout: float, grace: float) -> float:
    """Return how long a stop can take, in seconds, where the app does not block the loop."""
    return drain_delay + shutdown_timeout + CANCELLED_HANDLERS + max(shutdown_timeout, grace) + grace


def begin_to_stop(engine: "Engine") -> None:
    """
    Do what needs no waiting, right before a stop is asked for; `shut_down()` goes on from there.

    So a server with nothing left to do has closed two turns of the loop later, and not four.
    """
    if engine.settings.drain_delay or not engine.started:
        return
    engine.acceptor.close()
    engine.dismiss_idle()
    if engine.is_left_alone():
        engine.lifespan.tell()


async def shut_down(engine: "Engine") -> None:
    loop = asyncio.get_running_loop()
    settings = engine.settings
    asked = loop.time() if engine.asked_at is None else engine.asked_at

    # Drain; not after a crash, nor when the start has failed.
    if settings.drain_delay and engine.started and not engine.crashed:
        await engine.waiting.wait_for(lambda: engine.out_of_time, settings.drain_delay)

    # Stop accepting.
    engine.acceptor.close()
    forced: Forced = (0, (), ()) if engine.is_quiet() else await _finish(engine)

    # End.
    try:
        await engine.lifespan.shutdown(settings.shutdown_timeout)
    except ShutdownError as exc:
        if engine.error is None:
            engine.error = exc
        elif exc.__cause__ is not engine.error.__cause__:  # after a crash of the lifespan it is the same story
            logger.error("the server had failed before, and now: %s", exc, exc_info=exc)
    engine.report = Report(loop.time() - asked, *forced, engine.lifespan.stuck)


async def _finish(engine: "Engine") -> Forced:
    """
    Finish with the connections and requests that there are; by force, when their time is over.

    Returns:
        What a report says first of what had to be forced.
    """
    loop = asyncio.get_running_loop()
    waiting = engine.waiting
    budget, patience = engine.settings.shutdown_timeout, engine.settings.disconnect_after

    if not engine.is_settled():
        await waiting.turns(SETTLING_TURNS)
    began = loop.time()

    def time_left(limit: float | None) -> float | None:
        return None if limit is None else max(0.0, began + limit - loop.time())

    def over() -> bool:
        return engine.is_quiet() or engine.out_of_time

    # Owe, and finish.
    engine.dismiss(patient=True)
    if not engine.nobody_is_silent():
        grace = FIRST_REQUEST if budget is None else min(FIRST_REQUEST, budget)
        await waiting.wait_for(lambda: engine.nobody_is_silent() or engine.out_of_time, grace)
        engine.dismiss(patient=False)
    if waiting.forced:
        await waiting.turns(SETTLING_TURNS)

    # Persuade.
    if patience is not None and (budget is None or patience < budget):
        if patience:
            await waiting.wait_for(over, time_left(patience))
        engine.persuade()
    await waiting.wait_for(over, time_left(budget))
    if engine.is_quiet():
        return 0, (), ()
    held_up = engine.held_up()
    if held_up:
        engine.persuade()
        await waiting.turns(FAREWELL_TURNS)

    # Force.
    aborted = 0
    to_cancel = {task: handler for task, handler in held_up.items() if not task.done()}
    if not engine.is_quiet():
        engine.cancel_handlers()
        await waiting.wait_for(lambda: not engine.has_handlers(), CANCELLED_HANDLERS, even_if_forced=True)
        aborted = engine.abort_connections()
        await waiting.turns(SETTLING_TURNS)
    cancelled = tuple(handler._replace(stuck=not task.done()) for task, handler in to_cancel.items())
    persuaded = tuple(handler for task, handler in held_up.items() if task not in to_cancel)
    if aborted or held_up:
        logger.warning("%s", in_one_line(engine.urls[0], aborted, persuaded, cancelled))
    return aborted, persuaded, cancelled


def in_one_line(url: str, aborted: int, persuaded: tuple[HeldUp, ...], cancelled: tuple[HeldUp, ...]) -> str:
    line = (
        f"{url} was stopped by force; handlers told to end: {len(persuaded)}, cancelled: {len(cancelled)}; "
        f"connections dropped: {aborted}"
    )
    shown = [str(handler) for handler in (*cancelled, *persuaded)[:5]]
    if len(cancelled) + len(persuaded) > len(shown):
        shown.append("...")
    return f"{line} ({'; '.join(shown)})" if shown else line
