"""Closes connections whose clients take too long to send the head of a request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

from aioserve import _limits
from aioserve._log import logger
from aioserve._report import count
from aioserve._uvicorn import protocols


class HeadTimeout:
    """
    Looks at all connections now and then, so that a request costs nothing for it.

    The time of a connection begins with the first look that finds it waiting, and is over at a look: so it is longer by
    up to two intervals.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float, close: Callable[[Any], None]) -> None:
        self._loop = loop
        self.interval: float = min(1.0, max(seconds, _limits.SHORTEST_LOOK))
        self._seconds = seconds
        self._close = close
        self._waiting: dict[Any, tuple[object, float]] = {}  # what has been awaited, and since when
        self._late: list[Any] = []

    def look(self, connections: Iterable[Any]) -> None:
        now = self._loop.time()
        waiting = {}
        is_closing = bool(self._late)
        for connection in connections:
            awaited = None if connection.transport.is_closing() else protocols.awaited_head(connection)
            if awaited is not None:
                before, since = self._waiting.get(connection, (awaited, now))
                if before != awaited:
                    since = now
                elif now - since >= self._seconds:
                    self._late.append(connection)
                waiting[connection] = awaited, since
        self._waiting = waiting
        if self._late and not is_closing:
            logger.debug("closing %s without a request in %g s", count(len(self._late), "connection"), self._seconds)
            self._close_some()

    def _close_some(self) -> None:
        """Close some of those that are late; before the next ones, others are answered."""
        some = self._late[-_limits.CLOSED_AT_ONCE :]
        del self._late[-_limits.CLOSED_AT_ONCE :]
        for connection in some:
            if not connection.transport.is_closing() and protocols.awaited_head(connection) is not None:
                self._close(connection)
        if self._late:
            self._loop.call_soon(self._close_some)

    def forget(self, connection: Any) -> None:
        """Hold no connection that is gone until the next look."""
        self._waiting.pop(connection, None)

    def close(self) -> None:
        self._late.clear()
        self._waiting.clear()
