"""
How a connection of HTTP/2 closes, in a stop or after many streams: its GOAWAY comes when the client has its answers.

A GOAWAY has the number of the last stream that was taken, so a client knows which requests it can send again (RFC 9113,
6.8). But httpcore 1.0, which is below httpx, gives up the answers that it waits for when it reads one, and also those
that it has read together with it. So a PING goes with the last answer; its acknowledgement says that the client has
read that far.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from aioserve import _limits
from aioserve._uvicorn.closing import ClosingState

if TYPE_CHECKING:
    from aioserve._uvicorn.protocols import Observer

_ANY_STREAM = 2**31 - 1
_PING = b"\0\0\x08\x06\0\0\0\0\0"  # the head of the frame (RFC 9113, 4.1 and 6.7)


class ClosingHTTP2State(ClosingState):
    """Takes the place of uvicorn's state for a connection of HTTP/2 that is to close once no stream is left."""

    def __init__(self, connection: Any, observer: Observer) -> None:
        super().__init__(connection, observer)
        self.has_answered = connection.conn.has_pending_send()
        self._streams = 0
        self._pings = 0
        self._is_pinged = False  # since the last stream began
        self.has_acknowledged: bool = False
        self._is_announced = False
        self._quiet_since: float | None = None  # it has been looked at since then, and found without a stream
        self._loop: asyncio.AbstractEventLoop = connection.loop
        self._busy_since = self._loop.time()
        connection.__class__ = _closing_class(type(connection))  # type: ignore[arg-type]
        connection.conn = conn = _PingingConnection(connection.conn, self)
        for cycle in connection.cycles.values():
            cycle.conn = conn

    def headers(self) -> list[tuple[bytes, bytes]]:
        return _ClosingHeaders(self._connection, self._observer)

    @property
    def default_headers(self) -> list[tuple[bytes, bytes]]:
        """Read when a stream begins."""
        self._is_pinged = self.has_acknowledged = False
        self._quiet_since = None
        self._streams += 1
        if not (self._connection.cycles or self._pings):
            self._busy_since = self._loop.time()
        elif self._connection.cycles and not self._is_announced:
            is_long = self._loop.time() - self._busy_since >= _limits.HTTP2_STREAMS
            if is_long or self._streams > _limits.HTTP2_REQUESTS:
                self._announce()
        return super().default_headers

    def _announce(self) -> None:
        """Tell a client that opens one stream after the other, and is never without one, to open no more."""
        self._is_announced = True
        self._connection.flush()
        self._connection.conn.close(0, _ANY_STREAM)
        self._connection.flush()

    def is_acknowledged(self) -> bool:
        """Whether the client has read all answers; otherwise it is asked to tell, unless it was so too often."""
        was_asked = self._pings >= _limits.HTTP2_PINGS and self._loop.time() - self._pinged_at >= _limits.HTTP2_STREAMS
        if was_asked or self._streams > _limits.HTTP2_REQUESTS:
            return True
        if not self._is_pinged:
            self._connection.transport.write(self.ping())
        return self.has_acknowledged

    def is_flooding(self) -> bool:
        """Whether the client has had no stream for some time, since this was asked first."""
        if self._quiet_since is None:
            self._quiet_since = self._loop.time()
        return self._loop.time() - self._quiet_since >= _limits.HTTP2_QUIET

    def ping(self) -> bytes:
        self._is_pinged = True
        if not self._pings:
            self._pinged_at = self._loop.time()
        self._pings += 1
        return _PING + self._pings.to_bytes(8, "big")

    def ping_with(self, data: bytes) -> bytes:
        """Return data that are about to be sent; behind the last answer, with a PING."""
        cycles = self._connection.cycles.values()
        is_last = data and not self._is_pinged and cycles and all(each.response_complete for each in cycles)
        return data + self.ping() if is_last and not self._connection.conn.has_pending_send() else data

    def ping_acknowledged(self, data: bytes) -> bool:
        """Return whether the client has read all answers, and has opened no stream before it did."""
        self.has_acknowledged = self._is_pinged and data == self._pings.to_bytes(8, "big")
        return self.has_acknowledged and not self._connection.cycles

    def all_is_read(self) -> None:
        """Whatever has arrived is handled: also that a client has cancelled its last stream, or takes more data."""
        if (self.has_answered or self.has_acknowledged) and not self._connection.cycles:
            self._observer.progress_made(self._connection)


class _PingingConnection:
    """Takes the place of zttp's connection."""

    def __init__(self, conn: Any, state: ClosingHTTP2State) -> None:
        self._conn = conn
        self._state = state

    def __getattr__(self, name: str) -> Any:
        return getattr(self._conn, name)

    def data_to_send(self) -> bytes:
        return self._state.ping_with(self._conn.data_to_send())


class _ClosingHeaders(list[tuple[bytes, bytes]]):
    """The default headers, which tell when a response begins."""

    def __init__(self, connection: Any, observer: Observer) -> None:
        super().__init__(observer.state.default_headers)
        self._connection = connection
        self._observer = observer

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
        self._observer.progress_made(self._connection)
        return super().__iter__()


@functools.lru_cache
def _closing_class(http2_class: type[Any]) -> type[Any]:
    from zttp import Ping

    class ClosingHTTP2(http2_class):  # type: ignore[misc]
        def events(self) -> Iterator[Any]:
            for event in super().events():
                if isinstance(event, Ping) and event.ack and self.server_state.ping_acknowledged(event.data):
                    self._close_connection()  # whatever comes behind has a higher number, and can be sent again
                    return
                yield event

        def flush(self) -> None:  # called at the end of `data_received()`
            super().flush()
            self.server_state.all_is_read()

    return ClosingHTTP2
