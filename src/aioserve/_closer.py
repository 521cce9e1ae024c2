"""
Closes connections in a stop: each one as soon as it owes nobody an answer, and without a reset.

What a connection owes is its state (see `ConnectionState`), which depends on what has been read, and on what has
arrived and is still unread.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from functools import partial
from typing import Any

from aioserve import _limits
from aioserve._net.acceptor import Acceptor
from aioserve._net.linger import LingeringSockets
from aioserve._net.transports import hang_up, idle_time, is_active, tcp_info, unread_bytes
from aioserve._uvicorn import http2, protocols
from aioserve._uvicorn.closing import has_answered_since
from aioserve._uvicorn.disconnect import refuse
from aioserve._uvicorn.protocols import ConnectionState
from aioserve._waiting import after_turns

_TOO_SLOW = b"The request took too long to arrive.\n"
_TIMEOUT = (
    b"HTTP/1.1 408 Request Timeout\r\ncontent-type: text/plain; charset=utf-8\r\n"
    b"content-length: %d\r\nconnection: close\r\n\r\n%s" % (len(_TOO_SLOW), _TOO_SLOW)
)


class Closer:
    """Closes the connections of one server."""

    _graces: GracePeriods | None = None
    _handshake_timer: asyncio.TimerHandle | None = None
    lingering: LingeringSockets | None = None
    """The sockets of connections that are closed, and whose clients may still be sending."""
    _active: frozenset[Any] = frozenset()  # WebSockets on which something was on its way when they were closed
    _is_dropping: bool = False  # whatever is left is dropped

    def __init__(self, acceptor: Acceptor, *, has_tls: bool, on_change: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._acceptor = acceptor
        self._has_tls = has_tls
        self._on_change = on_change

    def unread(self, connection: Any) -> int:
        """Return how many bytes have arrived and are not read yet; with TLS, encrypted ones."""
        return unread_bytes(self._acceptor.raw_transport(connection.transport))

    def may_have_unread(self, connection: Any) -> bool:
        """Whether something may have arrived that is not read yet."""
        return self._acceptor.is_portable or self.unread(connection) > 0

    def has_more_requests(self, connection: Any) -> bool:
        """Whether a client has sent more requests, without waiting for an answer to the first."""
        if protocols.has_read_more(connection):
            return True
        return not protocols.has_unread_body(connection) and self.unread(connection) > 0

    def close_if_unneeded(self, connection: Any, *, grace: float | None = None) -> ConnectionState | None:
        """
        Close a connection if it is idle, a WebSocket with 1012 or an unaccepted one with 503.

        One from which a request may still come is given some time for that. Return the state of one that is busy, or
        that will have another state in the next turns of the loop.
        """
        if not connection.transport.is_closing():
            state = self._state_of(connection)
            if state in ("busy", "answering") or (state == "partial" and self.unread(connection)):
                return state
            if state == "idle" and (seconds := self._time_to_read(connection)):
                self._wait_for_request(connection, seconds)
            elif state == "idle":
                if not protocols.is_http(connection) and is_active(self._acceptor.raw_transport(connection.transport)):
                    self._active |= {connection}
                protocols.close_gracefully(connection)
            elif state == "opening":
                refuse(connection)
            elif state == "new":
                self._wait_for_request(connection, grace or _limits.FIRST_REQUEST)
            else:
                self._wait_for_request(connection, _limits.PARTIAL_REQUEST)
        self.see_off(connection)
        return None

    def _time_to_read(self, connection: Any) -> float:
        """How long the client of an idle connection may take to acknowledge that it has read its answers (HTTP/2)."""
        if not http2.is_http2(connection):
            return 0.0
        seconds = _limits.HTTP2_ACKNOWLEDGEMENT
        if not has_answered_since(connection):
            seconds = _limits.HTTP2_RECENT if self.has_just_answered(connection) else 0.0
        return 0.0 if not seconds or connection.server_state.is_acknowledged() else seconds

    def has_just_answered(self, connection: Any) -> bool:
        """Whether a client of HTTP/2, with several streams so far, may still have its last answers to read."""
        if not http2.is_http2(connection) or http2.last_stream(connection) <= 1:
            return False
        return idle_time(self._acceptor.raw_transport(connection.transport), unknown=math.inf) < _limits.HTTP2_RECENT

    def close_partial(self, connection: Any) -> bool:
        """Close a connection that has sent no request, or only a part of one; else return `False`."""
        if connection.transport.is_closing():
            return False
        state = self._state_of(connection)
        is_partial = state in ("new", "partial")
        if state == "idle" and http2.is_http2(connection):
            # Otherwise its client does not read the answers; but a loop for Windows is always about to send something.
            is_partial = self._acceptor.is_portable or connection.transport.get_write_buffer_size() == 0
        if not is_partial or self.unread(connection):
            return False
        protocols.close_gracefully(connection)
        self.see_off(connection)
        if self._is_dropping and self._has_tls and self._acceptor.is_portable:  # its last words may not be sent yet
            after_turns(self._loop, _limits.SETTLING_TURNS, self._acceptor.raw_transport(connection.transport).abort)
        return True

    def close_late(self, connection: Any) -> None:
        """Close a connection whose client was too slow to send the head of a request; answer what has come of one."""
        if not http2.is_http2(connection) and self._state_of(connection) == "partial":
            connection.transport.write(_TIMEOUT)
        protocols.close_gracefully(connection)
        self._acceptor.when_flushed(connection.transport, hang_up)  # with TLS, the client would have to agree

    def _wait_for_request(self, connection: Any, seconds: float) -> None:
        if self._graces is None:
            self._graces = GracePeriods(self._loop, on_expired=self._expired)
        self._graces.begin(connection, seconds)

    def _expired(self, connection: Any) -> None:
        if self._acceptor.is_portable:
            # What has just arrived is read, and known, in the next turns.
            after_turns(self._loop, _limits.SETTLING_TURNS, partial(self.close_partial, connection))
        elif not self.close_partial(connection) and self.unread(connection):
            self._wait_for_request(connection, _limits.PARTIAL_REQUEST)  # something has just come

    def _state_of(self, connection: Any) -> ConnectionState:
        state = protocols.connection_state(connection)
        if state == "busy" or not protocols.is_http(connection):
            return state
        if state == "new" and not (self._has_tls or protocols.shows_first_request(connection)):
            info = tcp_info(connection.transport)
            return "partial" if info is not None and info.received else state
        # The rest of a body whose request has its answer is not waited for, and other frames only for a limited time.
        if protocols.has_unread_body(connection) or not self.unread(connection):
            return state
        is_flooding = state == "idle" and http2.is_http2(connection) and connection.server_state.is_flooding()
        return state if is_flooding else "partial"

    def watch_handshakes(self) -> None:
        """Drop the TLS handshakes that do not move."""
        if self._acceptor.pending and self._handshake_timer is None:
            self._handshake_timer = self._loop.call_later(_limits.TLS_HANDSHAKE, self._look_at_handshakes)

    def _look_at_handshakes(self) -> None:
        self._handshake_timer = None
        if self._acceptor.pending:
            left = self._acceptor.drop_silent(_limits.TLS_HANDSHAKE)
            self._handshake_timer = self._loop.call_later(left, self._look_at_handshakes)

    # The end of a connection that is closing.

    def progress_made(self, connection: Any) -> None:
        if connection.transport.is_closing():
            self.see_off(connection)  # before its loop reads more
        elif self._has_tls and protocols.has_unread_body(connection):
            # asyncio's TLS cannot close in front of something that it holds back.
            protocols.read_on(connection)

    def see_off(self, connection: Any) -> None:
        """See to it that a closing connection ends: with TLS, without its client's help; and without a reset."""
        transport = connection.transport
        if not transport.is_closing():
            return
        raw = self._acceptor.raw_transport(transport)
        if self._may_be_sending(connection):
            if self._has_tls:
                raw.pause_reading()  # asyncio's TLS fails if data comes behind its close_notify, and drops what it has
            has_read_all = http2.is_http2(connection) and connection.server_state.has_acknowledged
            self._linger(raw, _limits.HTTP2_LINGER if has_read_all else _limits.LINGER)
        if self._has_tls:
            self._acceptor.when_flushed(transport, self._hang_up)

    def _hang_up(self, raw: Any) -> None:
        """End a TLS connection whose data is sent; do not wait for the client's close_notify."""
        if self.lingering is not None and not raw.is_reading():
            self._linger(raw, _limits.LINGER)  # once more, if no descriptor was left before
        if self.lingering is not None and raw in self.lingering:
            raw.abort()
        else:
            hang_up(raw)

    def _may_be_sending(self, connection: Any) -> bool:
        if not protocols.is_http(connection):
            return connection in self._active
        # A client of HTTP/2 says how much more of an answer it can take, and may open another stream.
        will_send = http2.is_http2(connection) and has_answered_since(connection)
        return will_send or protocols.has_unread_body(connection) or self.unread(connection) > 0

    def _linger(self, raw: Any, seconds: float) -> None:
        # asyncio's transport for Windows shuts both directions down when it closes.
        if not (self._is_dropping or self._acceptor.is_portable):
            if self.lingering is None:
                self.lingering = LingeringSockets(self._loop, on_end=self._on_change)
            self.lingering.begin(raw, seconds)

    def removed(self, connection: Any) -> None:
        """A connection is lost: all is written that was to be written; its socket is still open, but not with TLS."""
        if self._graces is not None:
            self._graces.end(connection)
        # One that was idle is not asked, since it is of no use to the client, and a stop may have thousands.
        if not self._has_tls and protocols.is_http(connection) and has_answered_since(connection):
            self.see_off(connection)
        if self.lingering is not None:
            self.lingering.shut_down(self._acceptor.raw_transport(connection.transport))
        if connection in self._active:
            self._active -= {connection}

    def abort(self, connection: Any) -> None:
        # Not TLS's own abort(): closed twice, a TLS transport cannot abort any more (CPython 3.11 to 3.15).
        raw = self._acceptor.raw_transport(connection.transport)
        if self._acceptor.is_portable and connection.transport.is_closing():
            # The loop has begun to send the answer, and sends the rest of it in two turns.
            after_turns(self._loop, 2, raw.abort)
        else:
            raw.abort()

    def drop(self) -> None:
        """Linger no longer, and on no more connections."""
        self._is_dropping = True
        if self.lingering is not None:
            self.lingering.close()

    def close(self) -> None:
        if self._handshake_timer is not None:
            self._handshake_timer.cancel()
        if self.lingering is not None:
            self.drop()
        if self._graces is not None:
            self._graces.close()
            self._graces = None  # so that no cycle is left to the garbage collector


class GracePeriods:
    """The connections from which a request may still come; for those whose time is over, a function is called."""

    def __init__(self, loop: asyncio.AbstractEventLoop, *, on_expired: Callable[[Any], object]) -> None:
        self._loop = loop
        self._on_expired = on_expired
        self._timers: dict[Any, asyncio.TimerHandle] = {}

    def begin(self, connection: Any, seconds: float) -> None:
        """Wait so long for a request, unless it is waited for already; and from each byte on, for the rest of one."""
        if connection not in self._timers:
            protocols.watch_bytes(connection, self._bytes_received)
            self._set_timer(connection, seconds)

    def end(self, connection: Any) -> None:
        """Wait no longer: the connection is gone."""
        if (timer := self._timers.pop(connection, None)) is not None:
            timer.cancel()
        protocols.stop_watching_bytes(connection)

    def close(self) -> None:
        for connection in list(self._timers):
            self.end(connection)

    def _bytes_received(self, connection: Any) -> None:
        if (timer := self._timers.get(connection)) is not None:
            timer.cancel()
            self._set_timer(connection, _limits.PARTIAL_REQUEST)

    def _set_timer(self, connection: Any, seconds: float) -> None:
        self._timers[connection] = self._loop.call_later(seconds, self._expire, connection)

    def _expire(self, connection: Any) -> None:
        del self._timers[connection]
        self._on_expired(connection)
