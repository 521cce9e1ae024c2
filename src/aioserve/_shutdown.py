"""
How a server stops, told as a story.

    stop accepting   the listeners close
    finish           idle connections close, WebSockets get 1012; requests in flight run on, within the budget
    force            budget over: the handlers are cancelled and awaited, what is left of connections is dropped
    end              the app's lifespan shuts down, after the last handler

Every wait is for a fact (a task that ended, a connection that is gone), and every wait is bounded. With nothing in
flight no timer is made at all.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from aioserve._errors import ShutdownError

if TYPE_CHECKING:
    from aioserve._engine import Engine

logger = logging.getLogger("aioserve")

# How long cancelled handlers may take to end, in seconds; a handler that swallows its cancellation holds us no longer.
CANCELLED_HANDLERS = 1.0

# How many loop turns it takes, at most, until a connection that we accepted, closed or aborted is known, or gone: one
# for the task of asyncio that accepts it, one for connection_made(), one to end that task.
SETTLING_TURNS = 3


async def shut_down(engine: Engine) -> None:
    waiting = engine.waiting
    budget = engine.settings.shutdown_timeout

    # Stop accepting. What was accepted in this very turn becomes a connection in the next ones.
    engine.stop_accepting()
    await waiting.turns(SETTLING_TURNS)
    engine.close_listeners()

    # Finish.
    engine.finish_connections()
    if waiting.forced:
        await waiting.turns(SETTLING_TURNS)
    quiet = await waiting.wait_for(engine.is_quiet, budget)

    # Force.
    if not quiet:
        handlers = engine.cancel_handlers()
        await waiting.wait_for(lambda: not engine.has_handlers(), CANCELLED_HANDLERS, even_if_forced=True)
        connections = engine.abort_connections()
        await waiting.turns(SETTLING_TURNS)
        logger.warning(
            "stopped by force: handlers cancelled: %d, connections dropped: %d%s",
            handlers,
            connections,
            "" if engine.is_quiet() else "; not all of them have ended",
        )

    # End.
    try:
        await engine.lifespan.shutdown(budget)
    except ShutdownError as exc:
        if engine.error is None:
            engine.error = exc
        elif exc.__cause__ is not engine.error.__cause__:  # after a crash of the lifespan it is the same story
            logger.error("the server had failed before, and now: %s", exc, exc_info=exc)
