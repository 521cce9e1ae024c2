"""Lets handlers finish, and uses force when their time is over: for a server, and for an app that is replaced."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from aioserve import _limits
from aioserve._log import logger
from aioserve._report import Report, UnfinishedHandler, count, describe_handlers
from aioserve._waiting import Condition, SlowStop

if TYPE_CHECKING:  # a Protocol takes a tenth of a millisecond at the import
    from aioserve._types import Scope

    class Work(Protocol):
        """What has to be finished: the handlers of an app, and their connections."""

        def is_finished(self) -> bool: ...
        def handlers(self) -> Collection[Any]: ...
        def unfinished(self) -> Iterable[tuple[Any, UnfinishedHandler]]: ...  # each with its handler, like a task
        def disconnect_handlers(self) -> None: ...
        def cancel(self, handler: Any) -> None: ...
        def abort_connections(self) -> int: ...


def is_event_stream(scope: Scope) -> bool:
    """Whether a client has asked for server-sent events, whose stream has no end of its own."""
    if scope["type"] != "http" or scope["method"] != "GET":
        return False
    return any(name == b"accept" and b"text/event-stream" in value.lower() for name, value in scope["headers"])


def _advice(report: Report, advice: str) -> str:
    handlers = [*report.cancelled, *report.disconnected]
    if handlers and all(each.in_thread for each in handlers):
        return "; a thread cannot be cancelled, so let its work have a time limit"
    return advice if handlers else ""


def _what_is_left(work: Work) -> str:
    described = describe_handlers(each for _, each in work.unfinished())
    return f"{count(len(work.handlers()), 'handler')} ({described})" if described else "connections that are still open"


async def finish(
    work: Work,
    condition: Condition,
    slow_stop: SlowStop,
    *,
    name: str,
    advice: str = "",
    budget: float | None,
    disconnect_after: float | None = None,
    since: float | None = None,
    is_expired: Callable[[], bool] = lambda: False,
    deadline: Callable[[], float | None] = lambda: None,
) -> Report:
    """
    Let handlers finish; when their time is over, disconnect, cancel and drop what is left, and log that.

    The condition is notified of their ends; `slow_stop` has the waits that may take long. The times are in seconds,
    `None` is no limit, and they count from now, or from `since` in the loop's time. With `is_expired`, the budget can
    be cut short; `deadline` says when that will be.
    """
    loop = condition.loop
    since = loop.time() if since is None else since

    def time_left(limit: float | None) -> float | None:
        return None if limit is None else max(0.0, since + limit - loop.time())

    def is_over() -> bool:
        return work.is_finished() or is_expired()

    def all_time_left() -> float | None:
        until = deadline()
        limits = (time_left(budget), None if until is None else max(0.0, until - loop.time()))
        return min((each for each in limits if each is not None), default=None)

    # Finish.
    if disconnect_after is not None and (budget is None or disconnect_after < budget):
        if disconnect_after:
            await slow_stop.wait_for(is_over, time_left(disconnect_after), partial(_what_is_left, work), all_time_left)
        work.disconnect_handlers()
    await slow_stop.wait_for(is_over, time_left(budget), partial(_what_is_left, work), all_time_left)
    if work.is_finished():
        return Report()

    # Disconnect.
    late = [(handler, each) for handler, each in work.unfinished() if not handler.done()]
    if late:
        work.disconnect_handlers()
        await condition.turns(_limits.LAST_MESSAGE_TURNS)

    # Force.
    cancelling, report = _Cancelling(work), _report_ended(late)
    if not work.is_finished():
        until = loop.time() + _limits.CANCELLED_HANDLERS
        while cancelling.has_more() and loop.time() < until:
            cancelling.cancel()
            await condition.wait_for(
                lambda: not work.handlers() or cancelling.has_more(), until - loop.time(), even_if_forced=True
            )
        report.aborted = work.abort_connections()
        cancelling.cancel()
        await condition.turns(_limits.SETTLING_TURNS)
        report.cancelled += cancelling.descriptions()
    if report.was_forced:
        logger.warning("%s%s", report.summary(name), _advice(report, advice))
    return report


def _report_ended(handlers: Iterable[tuple[Any, UnfinishedHandler]]) -> Report:
    """Report those that have ended by a disconnect, or were cancelled by somebody else, as `asyncio.run()` does it."""
    ended = [(each, bool(handler.cancelling())) for handler, each in handlers if handler.done()]
    report = Report(disconnected=tuple(each for each, cancelled in ended if not cancelled))
    report.cancelled = tuple(each for each, cancelled in ended if cancelled)
    return report


class _Cancelling:
    """Cancels each handler once, also those that begin when others have been cancelled already."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._cancelled: dict[Any, UnfinishedHandler | None] = {}

    def has_more(self) -> bool:
        return any(handler not in self._cancelled for handler in self._work.handlers())

    def cancel(self) -> None:
        more = [handler for handler in self._work.handlers() if handler not in self._cancelled]
        descriptions = dict(self._work.unfinished()) if more else {}
        for handler in more:
            self._cancelled[handler] = descriptions.get(handler)
            self._work.cancel(handler)

    def descriptions(self) -> tuple[UnfinishedHandler, ...]:
        """Describe those that were cancelled, and whether they are still running."""
        described = [(handler, each) for handler, each in self._cancelled.items() if each is not None]
        for handler, each in described:
            each.stuck = not handler.done()
        return tuple(each for _, each in described)
