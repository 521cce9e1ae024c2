"""
The state that uvicorn's protocols share, which also tells when connections come and go, and keeps the date header.

This costs something once per connection, and nothing per request.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from email.utils import formatdate
from typing import Any

import uvicorn
from uvicorn.server import ServerState

from aioserve._uvicorn.protocols import Observer


def create_state(config: uvicorn.Config, observer: Observer, on_limit: Callable[[int], None]) -> TrackedState:
    """Return the state of a server, which may stop after a number of responses."""
    limit = config.limit_max_requests
    if limit is None:
        return TrackedState(config, observer)
    with_jitter = getattr(uvicorn.Server(config), "limit_max_requests", limit)  # as newer versions of uvicorn have it
    return LimitedState(config, observer, with_jitter, on_limit)


class TrackedState(ServerState):
    """uvicorn's state, with an observer of its connections."""

    def __init__(self, config: uvicorn.Config, observer: Observer) -> None:
        super().__init__()
        self._config = config
        self.connections: set[Any] = _ObservedConnections(self, observer)
        self.default_headers: list[tuple[bytes, bytes]] = config.encoded_headers
        self.date_timer: asyncio.TimerHandle | None = None

    def update_date(self) -> None:
        """Set the date header, now and then once a second: by one timer, and by none when nobody is connected."""
        if not self.connections or not self._config.date_header:
            self.date_timer = None
            return
        date = (b"date", formatdate(time.time(), usegmt=True).encode())
        self.default_headers = [date, *self._config.encoded_headers]
        self.date_timer = asyncio.get_running_loop().call_later(1.0, self.update_date)

    def close(self) -> None:
        """Cancel the timer and break the reference cycle with the observer."""
        if self.date_timer is not None:
            self.date_timer.cancel()
        if not self.connections:
            self.connections = set()


class LimitedState(TrackedState):
    """Calls back at the response that reaches the limit; uvicorn polls ten times a second."""

    def __init__(self, config: uvicorn.Config, observer: Observer, limit: int, on_limit: Callable[[int], None]) -> None:
        self._on_limit: Callable[[int], None] | None = on_limit
        self._limit = limit
        self._total = 0
        super().__init__(config, observer)

    @property
    def total_requests(self) -> int:
        return self._total

    @total_requests.setter
    def total_requests(self, value: int) -> None:
        self._total = value
        if value >= self._limit > 0 and self._on_limit is not None:
            self._on_limit(self._limit)

    def close(self) -> None:
        super().close()
        self._on_limit = None


class _ObservedConnections(set[Any]):
    def __init__(self, state: TrackedState, observer: Observer) -> None:
        super().__init__()
        self._state = state
        self._observer = observer

    def add(self, connection: Any) -> None:
        super().add(connection)
        self._observer.connection_added(connection)
        if self._state.date_timer is None:
            self._state.update_date()

    def discard(self, connection: Any) -> None:
        super().discard(connection)
        self._observer.connection_removed(connection)

    def remove(self, connection: Any) -> None:
        self.discard(connection)
