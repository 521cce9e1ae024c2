"""
The connections of a server, from accept to close, and the handlers of their requests.

Until a stop is asked for, this only counts them in and out. Then it decides when each one may be closed: by its state
(see `ConnectionState`), which depends on what has been read, and on what has arrived and is still unread.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import uvicorn

from aioserve import _limits
from aioserve._finish import is_event_stream
from aioserve._grace import GracePeriods
from aioserve._lifespan import Lifespan
from aioserve._net.acceptor import Acceptor
from aioserve._net.listeners import Listener
from aioserve._net.transports import drop, hang_up, unread_bytes
from aioserve._report import UnfinishedHandler, unfinished_handler
from aioserve._uvicorn import protocols
from aioserve._uvicorn.closing import announce_close
from aioserve._uvicorn.config import name_server
from aioserve._uvicorn.disconnect import disconnect, disconnect_websocket, refuse
from aioserve._uvicorn.logs import silence_expected_errors
from aioserve._uvicorn.protocols import ConnectionState
from aioserve._uvicorn.state import TrackedState, create_state
from aioserve._waiting import Condition, after_turns, let_die_quietly


class Connections:
    """All connections and handlers of a server. The condition is notified of every change that a stop waits for."""

    _announced: bool = False  # responses say "connection: close"
    _closing: bool = False  # connections close as soon as they can
    _disconnecting: bool = False  # handlers are told that their client has gone
    _graces: GracePeriods | None = None
    _pending_timer: asyncio.TimerHandle | None = None
    _watch_is_due: bool = False

    def __init__(
        self,
        listeners: Sequence[Listener],
        config: uvicorn.Config,
        lifespan: Lifespan,
        *,
        access_log: bool,
        condition: Condition,
        on_limit: Callable[[int], None],
    ) -> None:
        self.state: TrackedState = create_state(config, self, on_limit)
        self.acceptor: Acceptor = Acceptor(
            listeners,
            functools.partial(protocols.create_protocol, _named(config, listeners), self.state, lifespan, access_log),
            ssl=config.ssl,
            backlog=config.backlog,
            on_change=condition.notify,
        )
        self._loop = asyncio.get_running_loop()
        self._condition = condition
        self._has_tls = config.ssl is not None

        self._watched: set[asyncio.Task[Any]] = set()  # handlers whose end is noticed
        self._background: set[asyncio.Task[Any]] = set()

    # Questions.

    def is_settled(self) -> bool:
        """Whether all that has arrived has been read, and has reached its handler."""
        return not self.acceptor.pending and all(map(self._is_settled, self.state.connections))

    def _is_settled(self, connection: Any) -> bool:
        is_handled = protocols.connection_state(connection) in ("idle", "busy")
        is_read = not (protocols.is_http(connection) and self._unread(connection))
        return connection.transport.is_closing() or (is_handled and is_read)

    def is_finished(self) -> bool:
        return not (self.state.connections or self.acceptor.pending or self.handlers())

    def handlers(self) -> set[asyncio.Task[Any]]:
        return self.state.tasks | self._background

    def needs_no_app(self) -> bool:
        """Whether no handler is left, and every connection is closing."""
        are_closing = not self.state.connections or all(each.transport.is_closing() for each in self.state.connections)
        return are_closing and not self.acceptor.pending and not self.handlers()

    def unfinished(self) -> list[tuple[asyncio.Task[Any], UnfinishedHandler]]:
        return [(task, unfinished_handler(protocols.scope_of(task), task)) for task in self.state.tasks]

    def has_more_requests(self, connection: Any) -> bool:
        """Whether a client has sent more requests, without waiting for an answer to the first."""
        if protocols.has_read_more(connection):
            return True
        return not protocols.has_unread_body(connection) and self._unread(connection) > 0

    def _state_of(self, connection: Any) -> ConnectionState:
        state = protocols.connection_state(connection)
        if state == "busy" or not protocols.is_http(connection):
            return state
        # The rest of a body whose request has its answer is not waited for.
        return "partial" if not protocols.has_unread_body(connection) and self._unread(connection) else state

    def _unread(self, connection: Any) -> int:
        return unread_bytes(self.acceptor.raw_transport(connection.transport))

    # The steps of a stop.

    def announce_close(self) -> None:
        """Let HTTP/1 responses from here on say "connection: close"; `ClosingHeaders` has the exceptions."""
        self._announced = True
        for connection in list(self.state.connections):
            if not connection.transport.is_closing():
                announce_close(connection, self)

    def close_idle(self) -> None:
        """
        Close idle HTTP connections; leave all others for `close_unneeded()`.

        With TLS, leave all: the transport may hold data that nobody has processed.
        """
        if self._has_tls:
            return
        for connection in list(self.state.connections):
            is_open = protocols.is_http(connection) and not connection.transport.is_closing()
            if is_open and protocols.connection_state(connection) == "idle" and not self._unread(connection):
                protocols.close_gracefully(connection)

    def close_unneeded(self) -> None:
        """
        Close idle connections, WebSockets with 1012 or unaccepted with 503, and every other one as soon as it is idle.

        Handlers of event streams are told at once that their client has gone. A connection from which a request may
        still come is given some time for that, as is a TLS handshake.
        """
        self._closing = True
        if self.acceptor.pending:
            self._pending_timer = self._loop.call_later(_limits.TLS_HANDSHAKE, self.acceptor.drop_pending)
        self._watch_handlers()
        for connection in list(self.state.connections):
            self._close_if_unneeded(connection)

    def _close_if_unneeded(self, connection: Any, *, grace: float | None = None) -> None:
        if connection not in self.state.connections:
            return
        if not connection.transport.is_closing():
            state = self._state_of(connection)
            if state == "busy":
                self._disconnect(connection)
            elif state == "idle":
                protocols.close_gracefully(connection)
            elif state == "opening":
                refuse(connection)
            elif state == "new":
                self._wait_for_request(connection, grace or _limits.FIRST_REQUEST)
            elif state == "answering" or self._unread(connection):
                self._loop.call_soon(self._close_if_unneeded, connection)  # once it is answered, or read
            else:
                self._wait_for_request(connection, _limits.PARTIAL_REQUEST)
        self.acceptor.hang_up_when_flushed(connection.transport)

    def _wait_for_request(self, connection: Any, seconds: float) -> None:
        if self._graces is None:
            self._graces = GracePeriods(on_expired=self._close_partial)
        self._graces.begin(connection, seconds)

    def _close_partial(self, connection: Any) -> bool:
        """Close a connection that has sent no request, or only a part of one; else return `False`."""
        is_partial = self._state_of(connection) in ("new", "partial") and not self._unread(connection)
        if connection.transport.is_closing() or not is_partial:
            return False
        protocols.close_gracefully(connection)
        self.acceptor.hang_up_when_flushed(connection.transport)
        return True

    def disconnect_handlers(self) -> None:
        """Tell the handlers that wait in `receive()`, now or later, that their client has gone. They may still send."""
        self._disconnecting = True
        # Only httptools' connections list the requests that wait behind the current one; but each has its task.
        for task in list(self.state.tasks):
            if (cycle := protocols.unanswered_cycle_of(task)) is not None:
                self._disconnect_cycle(cycle)
        for connection in list(self.state.connections):
            self._disconnect(connection)

    def _disconnect(self, connection: Any) -> None:
        for cycle in protocols.unanswered_cycles(connection):
            self._disconnect_cycle(cycle)
        if self._disconnecting and protocols.is_being_refused(connection):
            disconnect_websocket(connection)

    def _disconnect_cycle(self, cycle: Any) -> None:
        is_stream = cycle.response_started and is_event_stream(cycle.scope)
        if self._disconnecting or is_stream:
            disconnect(cycle, self._unread, end_response=is_stream)

    def cancel(self, handler: asyncio.Task[Any]) -> None:
        self._watch_handlers_soon()
        silence_expected_errors(protocols.handled_by(handler))
        handler.cancel()

    def abort_connections(self) -> int:
        self.acceptor.drop_pending()
        aborted = 0
        for connection in list(self.state.connections):
            if not self._close_partial(connection):
                # Not TLS's own abort(): closed twice, a TLS transport cannot abort any more (CPython 3.11 to 3.13).
                self.acceptor.raw_transport(connection.transport).abort()
                aborted += 1
        return aborted

    def close(self) -> None:
        self.acceptor.close()
        for connection in list(self.state.connections) if self._has_tls else ():
            self.acceptor.forget(connection.transport)
        if self._graces is not None:
            self._graces.close()
            self._graces = None  # so that no cycle is left to the garbage collector
        if self._pending_timer is not None:
            self._pending_timer.cancel()
        self.state.close()

    # What uvicorn's protocols tell.

    def connection_added(self, connection: Any) -> None:
        if not self._announced:
            return
        announce_close(connection, self)
        if self._closing:
            # It was accepted in the last moment, or has just been upgraded: to a WebSocket that the app may accept.
            grace = _limits.PARTIAL_REQUEST if self._has_tls else _limits.FIRST_REQUEST
            turns = 1 if protocols.is_http(connection) else 1 + _limits.SETTLING_TURNS
            after_turns(turns, functools.partial(self._close_if_unneeded, connection, grace=grace))
            self._watch_handlers_soon()

    def connection_removed(self, connection: Any) -> None:
        if protocols.is_http(connection):
            protocols.cancel_keep_alive_timer(connection)
        else:
            for task in protocols.tasks_behind(connection):
                self._background.add(task)
                task.add_done_callback(self._background.discard)
        if self._has_tls and connection.transport.is_closing():
            self.acceptor.forget(connection.transport)
        if self._closing:
            if self._graces is not None:
                self._graces.end(connection)
            self._watch_handlers_soon()
            self._condition.notify()

    def progress_made(self, connection: Any) -> None:
        """A request has come, or its response begins or is complete, after the stop was asked for."""
        if self._closing:
            self._loop.call_soon(self._close_if_unneeded, connection)  # once it is done with that
            self._watch_handlers_soon()
            self._condition.notify()

    # The ends of handlers.

    def _watch_handlers_soon(self) -> None:
        if not self._watch_is_due:
            self._watch_is_due = True
            self._loop.call_soon(self._watch_handlers)

    def _watch_handlers(self) -> None:
        """Notice the ends of the handlers that there are now."""
        self._watch_is_due = False
        handlers = self.handlers()
        for task in handlers - self._watched:
            task.add_done_callback(self._handler_done)
        self._watched |= handlers
        self._condition.notify()  # one may have ended before it was watched

    def _handler_done(self, task: asyncio.Task[Any]) -> None:
        self._watched.discard(task)
        if self._has_tls and self._closing:
            for connection in list(self.state.connections):
                self.acceptor.hang_up_when_flushed(connection.transport)
        self._condition.notify()


def _named(config: uvicorn.Config, listeners: Sequence[Listener]) -> uvicorn.Config:
    """Return a Config whose app is told the path of a Unix socket; the socket was bound by another name."""
    path = listeners[0].path if listeners[0].file_path is not None else None
    return name_server(config, path) if isinstance(path, str) else config


def abandon(connections: Connections) -> None:
    """Close the sockets, where the loop does not run any more; if it is closed, the handlers are garbage."""
    connections.acceptor.close()
    is_closed = connections._loop.is_closed()
    if is_closed:
        connections._closing = False  # nobody waits for their ends
        for task in connections.handlers() | connections.acceptor.pending:
            silence_expected_errors(protocols.handled_by(task))
            let_die_quietly(task)
    for connection in list(connections.state.connections):
        raw = connections.acceptor.raw_transport(connection.transport)
        hang_up(raw)
        if is_closed:
            with suppress(Exception):  # it may call the loop
                connection.connection_lost(None)
            drop(raw)
