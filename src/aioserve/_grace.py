"""How long a stop waits for a request that may still come, or for the rest of one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from aioserve import _limits
from aioserve._uvicorn.protocols import stop_watching_bytes, watch_bytes


class GracePeriods:
    """The connections from which a request may still come."""

    def __init__(self) -> None:
        self._on_expired: Callable[[Any], None] | None = None
        self._timers: dict[Any, asyncio.TimerHandle] = {}

    def begin(self, connection: Any, seconds: float, on_expired: Callable[[Any], None]) -> None:
        """Wait so long for a request, anew with each byte, unless it is waited for already; then call a function."""
        self._on_expired = on_expired
        if connection not in self._timers:
            watch_bytes(connection, self._bytes_received)
            self._set_timer(connection, seconds)

    def end(self, connection: Any) -> None:
        """Wait no longer: the connection is gone."""
        if (timer := self._timers.pop(connection, None)) is not None:
            timer.cancel()
        stop_watching_bytes(connection)

    def close(self) -> None:
        for connection in list(self._timers):
            self.end(connection)
        self._on_expired = None  # so that nothing is left to the garbage collector

    def _bytes_received(self, connection: Any) -> None:
        if (timer := self._timers.get(connection)) is not None:
            timer.cancel()
            self._set_timer(connection, _limits.PARTIAL_REQUEST)

    def _set_timer(self, connection: Any, seconds: float) -> None:
        self._timers[connection] = asyncio.get_running_loop().call_later(seconds, self._expire, connection)

    def _expire(self, connection: Any) -> None:
        del self._timers[connection]
        if self._on_expired is not None:
            self._on_expired(connection)
