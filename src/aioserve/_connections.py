"""
The connections of a server, from accept to close, and the handlers of their requests.

Until a stop is asked for, this only counts them in and out. Then a `Closer` decides when each one may be closed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from aioserve import _limits
from aioserve._closer import Closer
from aioserve._finish import is_event_stream
from aioserve._heads import HeadTimeout
from aioserve._lifespan import Lifespan
from aioserve._net.acceptor import Acceptor
from aioserve._net.listeners import Listener
from aioserve._net.transports import drop, hang_up, unread_bytes
from aioserve._report import UnfinishedHandler, unfinished_handler
from aioserve._settings import Settings
from aioserve._uvicorn import protocols
from aioserve._uvicorn.closing import ClosingState, announce_close
from aioserve._uvicorn.disconnect import disconnect, disconnect_websocket
from aioserve._uvicorn.http2 import count_streams, is_http2
from aioserve._uvicorn.logs import pass_on_interrupts, silence_expected_errors
from aioserve._uvicorn.state import TrackedState, create_state
from aioserve._waiting import Condition, OnceSoon, after_turns, let_die_quietly

if TYPE_CHECKING:
    from aioserve._uvicorn.cancelling import CancellableTasks


class Connections:
    """All connections and handlers of a server. The condition is notified of every change that a stop waits for."""

    _announced: bool = False  # responses say "connection: close"
    _closing: bool = False  # connections close as soon as they can
    _disconnecting: bool = False  # handlers are told that their client has gone
    _cancellable: CancellableTasks | None = None  # the handlers, where they are cancelled when their client is gone

    def __init__(
        self,
        listeners: Sequence[Listener],
        settings: Settings,
        lifespan: Lifespan,
        *,
        condition: Condition,
        on_limit: Callable[[int], None],
        acceptor: type[Acceptor],
    ) -> None:
        config = settings.config
        self.state: TrackedState = create_state(config, self, on_limit)
        if settings.cancel_on_disconnect:
            from aioserve._uvicorn.cancelling import CancellableTasks  # only where it is asked for

            self.state.tasks = self._cancellable = CancellableTasks()
        self._renamed = [each for each in listeners if each.file_path is not None or each.bound_as is not None]
        self.acceptor: Acceptor = acceptor(
            listeners,
            partial(protocols.create_protocol, config, self.state, lifespan, settings.access_log, bool(self._renamed)),
            ssl=config.ssl,
            handshake_timeout=settings.header_timeout,
            backlog=config.backlog,
            on_change=condition.notify,
        )
        self._condition, self._loop = condition, condition.loop
        self._has_tls = config.ssl is not None
        self._closer = Closer(self.acceptor, has_tls=self._has_tls, on_change=condition.notify)
        self.has_more_requests: Callable[[Any], bool] = self._closer.has_more_requests
        self._header_timeout = settings.header_timeout
        self._has_http2 = hasattr(config.http_protocol_class, "alpn_protocols")
        self._watched: dict[asyncio.Task[Any], Any] = {}  # handlers whose end is noticed, and their scopes
        self._background: set[asyncio.Task[Any]] = set()
        self._soon = OnceSoon(self._loop)

    # Questions.

    def is_settled(self) -> bool:
        """Whether all that has arrived has been read, and has reached its handler; `False` if nobody knows."""
        are_made = not (self.acceptor.pending or self.acceptor.has_rest or self.acceptor.is_portable)
        return are_made and all(map(self._is_settled, self.state.connections))

    def _is_settled(self, connection: Any) -> bool:
        is_handled = protocols.connection_state(connection) in ("idle", "busy")
        is_read = not (protocols.is_http(connection) and self._closer.unread(connection))
        return connection.transport.is_closing() or (is_handled and is_read)

    def has_idle(self) -> bool:
        """Whether an HTTP connection has no request; its next one may be on its way."""
        return any(
            protocols.is_http(each) and protocols.connection_state(each) != "busy" for each in self.state.connections
        )

    def is_finished(self) -> bool:
        return not self.state.connections and not self._closer.lingering and self._is_idle()

    def handlers(self) -> set[asyncio.Task[Any]]:
        return self.state.tasks | self._background

    def needs_no_app(self) -> bool:
        """Whether no handler is left, and every connection is closing."""
        return self._is_idle() and all(each.transport.is_closing() for each in self.state.connections)

    def _is_idle(self) -> bool:
        is_accepting = self.acceptor.pending or self.acceptor.has_rest
        return not (is_accepting or self.state.tasks or self._background)

    def unfinished(self) -> Iterator[tuple[asyncio.Task[Any], UnfinishedHandler]]:
        for task in tuple(self.state.tasks):
            yield task, unfinished_handler(protocols.scope_of(task) or self._watched.get(task, {}), task)

    # The steps of a stop.

    def announce_close(self) -> None:
        """Let HTTP/1 responses from here on say "connection: close" (see `ClosingHeaders`), and HTTP/2 its GOAWAY."""
        self._announced = True
        handlers = 0
        for connection in list(self.state.connections):
            if not connection.transport.is_closing():
                handlers += self.retire(connection)
        if len(self.state.tasks) > handlers:  # there are some whose clients have gone
            for task in self.state.tasks:
                pass_on_interrupts(protocols.handled_by(task))

    def close_idle(self) -> None:
        """
        Close idle HTTP connections whose clients do not owe a body; leave all others for `close_unneeded()`.

        With TLS, leave all: the transport may hold data that nobody has processed. The same where nobody knows.
        """
        if self._has_tls or self.acceptor.is_portable:
            return
        for connection in list(self.state.connections):
            is_open = protocols.is_http(connection) and not connection.transport.is_closing()
            is_idle = is_open and protocols.connection_state(connection) == "idle"
            if not is_idle or protocols.has_unread_body(connection) or unread_bytes(connection.transport):
                continue
            if not (self._has_http2 and self._closer.has_just_answered(connection)):
                protocols.close_gracefully(connection)

    def close_unneeded(self) -> None:
        """
        Close idle connections, WebSockets with 1012 or unaccepted with 503, and every other one as soon as it is idle.

        Handlers of event streams are told at once that their client has gone. A connection from which a request may
        still come is given some time for that, as is a TLS handshake.
        """
        self._closing = True
        self._closer.watch_handshakes()
        self._watch_handlers()
        for connection in list(self.state.connections):
            self._close_if_unneeded(connection)

    def _close_if_unneeded(self, connection: Any, *, grace: float | None = None) -> None:
        if connection in self.state.connections:
            state = self._closer.close_if_unneeded(connection, grace=grace)
            if state == "busy" and self._closing:
                self._disconnect(connection)
            elif state not in ("busy", None):
                self._soon.call(self._close_if_unneeded, connection)

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
        pass_on_interrupts(cycle)
        is_stream = cycle.response_started and is_event_stream(cycle.scope)
        if self._disconnecting or is_stream:
            disconnect(cycle, self._loop, self._closer.may_have_unread, end_response=is_stream)

    def cancel(self, handler: asyncio.Task[Any]) -> None:
        self._watch_handlers_soon()
        if self._cancellable is None or not self._cancellable.is_cleaning_up(handler):
            silence_expected_errors(protocols.handled_by(handler))
            handler.cancel()

    def abort_connections(self) -> int:
        self._closer.drop()
        for task in self.acceptor.pending:
            task.cancel()
        aborted = len(self.acceptor.pending) + self.acceptor.lose_rest()
        for connection in list(self.state.connections):
            if not self._closer.close_partial(connection):
                self._closer.abort(connection)
                aborted += 1
        return aborted

    def close(self) -> None:
        self.acceptor.close()
        for connection in list(self.state.connections) if self._has_tls else ():
            self.acceptor.forget(connection.transport)
        self._closer.close()
        self.state.close()

    # What uvicorn's protocols tell.

    def connection_added(self, connection: Any) -> None:
        if self._cancellable is not None:
            self._cancellable.watch_streams(connection)
        if self._renamed:
            protocols.name_server(connection, {each.bound_as: each.path for each in self._renamed})
        if self._has_http2 and is_http2(connection):
            count_streams(connection)
        if not self._announced:
            return
        self.retire(connection)
        if self._closing:
            # It was accepted in the last moment, or has just been upgraded: to a WebSocket that the app may accept.
            grace = _limits.PARTIAL_REQUEST if self._has_tls else _limits.FIRST_REQUEST
            turns = 1 if protocols.is_http(connection) else 1 + _limits.SETTLING_TURNS
            after_turns(self._loop, turns, partial(self._close_if_unneeded, connection, grace=grace))
            self._watch_handlers_soon()

    def connection_removed(self, connection: Any) -> None:
        if self._cancellable is not None:
            self._cancellable.cancel_handlers_of(connection)
        if protocols.is_http(connection):
            protocols.cancel_keep_alive_timer(connection)
        else:
            for task in protocols.tasks_behind(connection):
                self._background.add(task)
                task.add_done_callback(self._background.discard)
        if self._announced or (self._has_http2 and is_http2(connection)):
            self._closer.removed(connection)
        if self.acceptor.has_rest:
            self._loop.call_soon(self.acceptor.accept_rest)  # when its descriptor is free
            self._loop.call_soon(self._closer.watch_handshakes)
        if self._has_tls and connection.transport.is_closing():
            self.acceptor.forget(connection.transport)
        if self._closing:
            self._watch_handlers_soon()
            self._condition.notify()

    def make_heads(self) -> HeadTimeout | None:
        seconds = self._header_timeout
        return None if seconds is None else HeadTimeout(self._loop, seconds, self._closer.close_late)

    def retire(self, connection: Any) -> int:
        """Let a connection close when it has answered; return how many handlers it has."""
        return announce_close(connection, self, _closing_state(connection) if self._has_http2 else ClosingState)

    def progress_made(self, connection: Any) -> None:
        """A request has come, or its response begins or is complete, after the stop was asked for."""
        self._closer.progress_made(connection)
        if self._closing or (self._has_http2 and is_http2(connection)):
            self._soon.call(self._close_if_unneeded, connection)  # once it is done with that
        if self._closing:
            self._watch_handlers_soon()
            self._condition.notify()

    # The ends of handlers.

    def _watch_handlers_soon(self) -> None:
        self._soon.call(Connections._watch_handlers, self)

    def _watch_handlers(self) -> None:
        """Notice the ends of the handlers that there are now."""
        for task in self.handlers() - self._watched.keys():
            task.add_done_callback(self._handler_done)
            self._watched[task] = protocols.scope_of(task)
        self._condition.notify()  # one may have ended before it was watched

    def _handler_done(self, task: asyncio.Task[Any]) -> None:
        self._watched.pop(task, None)
        if self._has_tls and self._closing:
            for connection in list(self.state.connections):
                self._closer.see_off(connection)
        self._condition.notify()


def _closing_state(connection: Any) -> type[ClosingState]:
    if not is_http2(connection):
        return ClosingState
    from aioserve._uvicorn.goaway import ClosingHTTP2State  # only for HTTP/2

    return ClosingHTTP2State


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
            for cycle in protocols.unanswered_cycles(connection):
                cycle.on_response = lambda *_args: None  # it would set a timer, when its handler's frame is freed
            with suppress(Exception):  # it may call the loop
                connection.connection_lost(None)
            drop(raw)
