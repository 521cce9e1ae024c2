"""Lets handlers finish, and uses force when their time is over: for a server, and for an app that is replaced."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from aioserve import _limits
from aioserve._report import Report, UnfinishedHandler
from aioserve._types import Scope
from aioserve._waiting import Condition

logger = logging.getLogger("aioserve")


def is_event_stream(scope: Scope) -> bool:
    """Whether a client has asked for server-sent events, whose stream has no end of its own."""
    if scope["type"] != "http" or scope["method"] != "GET":
        return False
    return any(name == b"accept" and b"text/event-stream" in value.lower() for name, value in scope["headers"])


class Work(Protocol):
    """What has to be finished: the handlers of an app, and their connections."""

    def is_finished(self) -> bool: ...
    def has_handlers(self) -> bool: ...
    def unfinished(self) -> Sequence[tuple[Any, UnfinishedHandler]]: ...  # each with its task or call, which has done()
    def disconnect_handlers(self) -> None: ...
    def cancel_handlers(self) -> None: ...
    def abort_connections(self) -> int: ...


async def finish(
    work: Work,
    condition: Condition,
    *,
    name: str,
    budget: float | None,
    disconnect_after: float | None = None,
    since: float | None = None,
    is_expired: Callable[[], bool] = lambda: False,
) -> Report:
    """
    Let handlers finish; when their time is over, disconnect, cancel and drop what is left, and log that.

    The condition is notified of their ends. The times are in seconds, `None` is no limit, and they count from now, or
    from `since` in the loop's time. With `is_expired`, the budget can be cut short.
    """
    loop = asyncio.get_running_loop()
    since = loop.time() if since is None else since

    def time_left(limit: float | None) -> float | None:
        return None if limit is None else max(0.0, since + limit - loop.time())

    def is_over() -> bool:
        return work.is_finished() or is_expired()

    # Finish.
    if disconnect_after is not None and (budget is None or disconnect_after < budget):
        if disconnect_after:
            await condition.wait_for(is_over, time_left(disconnect_after))
        work.disconnect_handlers()
    await condition.wait_for(is_over, time_left(budget))
    if work.is_finished():
        return Report()

    # Disconnect.
    late = work.unfinished()
    if late:
        work.disconnect_handlers()
        await condition.turns(_limits.LAST_MESSAGE_TURNS)

    # Force.
    aborted = 0
    to_cancel = [(task, handler) for task, handler in late if not task.done()]
    disconnected = tuple(handler for task, handler in late if task.done())
    if not work.is_finished():
        work.cancel_handlers()
        await condition.wait_for(lambda: not work.has_handlers(), _limits.CANCELLED_HANDLERS, even_if_forced=True)
        aborted = work.abort_connections()
        await condition.turns(_limits.SETTLING_TURNS)
        for task, handler in to_cancel:
            handler.stuck = not task.done()
    cancelled = tuple(handler for _, handler in to_cancel)
    report = Report(aborted=aborted, disconnected=disconnected, cancelled=cancelled)
    if aborted or late:
        logger.warning("%s", report.summary(name))
    return report
