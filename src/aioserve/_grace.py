"""How long a stop waits for a request that may still come, or for the rest of one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from aioserve import _limits
from aioserve._uvicorn.protocols import stop_watching_bytes, watch_bytes


class GracePeriods:
    """The connections from which a request may still come; for those whose time is over, a function is called."""

    def __init__(self, *, on_expired: Callable[[Any], object]) -> None:
        self._on_expired = on_expired
        self._timers: dict[Any, asyncio.TimerHandle] = {}

    def begin(self, connection: Any, seconds: float) -> None:
        """Wait so long for a request, unless it is waited for already; and from each byte on, for the rest of one."""
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

    def _bytes_received(self, connection: Any) -> None:
        if (timer := self._timers.get(connection)) is not None:
            timer.cancel()
            self._set_timer(connection, _limits.PARTIAL_REQUEST)

    def _set_timer(self, connection: Any, seconds: float) -> None:
        self._timers[connection] = asyncio.get_running_loop().call_later(seconds, self._expire, connection)

    def _expire(self, connection: Any) -> None:
        del self._timers[connection]
        self._on_expired(connection)
