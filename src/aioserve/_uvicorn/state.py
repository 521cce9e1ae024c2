"""
The state that uvicorn's protocols share, which also tells when connections come and go.

Once a second it sets the date header and looks for clients that take too long to send the head of a request. This costs
something once per connection, and nothing per request.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from email.utils import formatdate
from typing import TYPE_CHECKING, Any, Protocol

import uvicorn
from uvicorn.server import ServerState

if TYPE_CHECKING:  # each Protocol takes a tenth of a millisecond at the import
    from aioserve._uvicorn.protocols import Observer

    class Heads(Protocol):
        """What looks for clients that take too long to send the head of a request."""

        interval: float
        """Seconds between two looks."""

        def look(self, connections: Iterable[Any]) -> None: ...
        def forget(self, connection: Any) -> None: ...
        def close(self) -> None: ...


def create_state(config: uvicorn.Config, observer: Observer, on_limit: Callable[[int], None]) -> TrackedState:
    """Return the state of a server, which may stop after a number of responses."""
    limit = config.limit_max_requests
    if limit is None:
        return TrackedState(config, observer)
    with_jitter = getattr(uvicorn.Server(config), "limit_max_requests", limit)  # as newer versions of uvicorn have it
    return LimitedState(config, observer, with_jitter, on_limit)


class TrackedState(ServerState):
    """uvicorn's state, with an observer of its connections."""

    looks_for_heads: bool = True
    _heads: Heads | None = None  # made with the first connection
    has_acknowledged: bool = False  # see `ClosingHTTP2State`

    def __init__(self, config: uvicorn.Config, observer: Observer) -> None:
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self._config = config
        self.connections: set[Any] = _ObservedConnections(self, observer)
        self.default_headers: list[tuple[bytes, bytes]] = config.encoded_headers
        self.timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """Set the date header, now and then once a second: by one timer, and by none when nobody is connected."""
        self.timer = None
        if not self.connections:
            return
        if self._config.date_header:
            date = (b"date", formatdate(time.time(), usegmt=True).encode())
            self.default_headers = [date, *self._config.encoded_headers]
        if self.looks_for_heads and self._heads is None:
            self._heads = self.connections.observer.make_heads()  # type: ignore[attr-defined]
        if self._heads is not None or self._config.date_header:
            interval = 1.0 if self._heads is None else self._heads.interval
            self.timer = self._loop.call_later(interval, self._go_on)

    def _go_on(self) -> None:
        if self._heads is not None:
            self._heads.look(self.connections)
        self.begin()

    def look_no_more(self) -> None:
        """Leave it to the stop how long a client may take from here."""
        self.looks_for_heads = False
        if self._heads is not None:
            self._heads.close()
            self._heads = None  # which holds the observer

    def close(self) -> None:
        """Cancel the timer and break the reference cycle with the observer."""
        if self.timer is not None:
            self.timer.cancel()
        self.look_no_more()
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
        self.observer = observer

    def add(self, connection: Any) -> None:
        super().add(connection)
        self.observer.connection_added(connection)
        if self._state.timer is None:
            self._state.begin()

    def discard(self, connection: Any) -> None:
        super().discard(connection)
        if self._state._heads is not None:
            self._state._heads.forget(connection)
        self.observer.connection_removed(connection)

    remove = discard
