"""
The one file that knows uvicorn's insides. When uvicorn changes, this file changes and nothing else.

What it relies on, in uvicorn 0.40 to 0.54 (a test names each of these, and says what breaks without it):

- `Server(config)` keeps `server_state`; the protocols are made with `config`, `server_state` and `app_state`, and put
  themselves into `server_state.connections` with `add()` and out of it with `discard()` (HTTP) or `remove()`
  (WebSocket); an upgrade takes one out and puts another in. `server_state.tasks` holds a task per request or WebSocket.
- HTTP protocols read their own `server_state.default_headers` at each request, and count up
  `server_state.total_requests` when a response is complete. In between there is `cycle`: with `scope`,
  `transport`, `default_headers`, `response_complete`, `more_body`, `disconnected`, `message_event` and `logger`.
- Their `timeout_keep_alive_task` is a timer after a response, and `None` again as soon as more bytes have come. A lost
  connection can leave it behind.
- What of a next request has come is told by httptools' `scope` and `pipeline`, and by h11's `conn.trailing_data`.
- Each protocol has `transport`, and `shutdown()`: it closes an idle connection, and a WebSocket with 1012, but one that
  is not yet accepted with a 500. Whether it is, `handshake_complete` says.
- The legacy WebSocket protocol has a `handshake_completed_event` for that, and runs tasks of its own: `handler_task`
  and `close_connection_task`.
- A request's or WebSocket's task runs a coroutine `run_asgi()`, whose `self` has the `scope` and a `logger`.
- `Config.load()` imports the app, calls a factory, makes the TLS context, and may raise `SystemExit`. An app that is
  ASGI 3 by its looks stays as it is; all else in a loaded Config comes from the options, from FORWARDED_ALLOW_IPS, from
  the logger's level, and from what `HTTP_PROTOCOLS` and `WS_PROTOCOLS` name.

What is ours in place of uvicorn's: `serve()`, which runs on events instead of a tick; the lifespan; the sockets and
what they accept; the shutdown; and no signal handlers at all.
"""

from __future__ import annotations

import asyncio
import contextvars
import errno
import fcntl
import functools
import inspect
import logging
import os
import socket
import ssl
import sys
import termios
import threading
import time
import types
from collections.abc import Callable, Mapping, Sequence
from email.utils import formatdate
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import anyio
import uvicorn
from uvicorn.config import HTTP_PROTOCOLS, WS_PROTOCOLS
from uvicorn.importer import import_from_string
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware
from uvicorn.server import ServerState

from aioserve._acceptor import Acceptor
from aioserve._errors import ServerCrashedError, ShutdownError, StartupError
from aioserve._lifespan import Lifespan, describe
from aioserve._shutdown import HeldUp, Report, begin_to_stop, shut_down
from aioserve._waiting import Waiting

if TYPE_CHECKING:
    from aioserve._options import Scope, Settings
    from aioserve._sockets import Listener

logger = logging.getLogger("aioserve")
uvicorn_logger = logging.getLogger("uvicorn.error")

CLOSE = (b"connection", b"close")

# What uvicorn says of a handler that has left its response unfinished.
_LEFT_UNFINISHED = tuple(f"ASGI callable returned without {what} response." for what in ("starting", "completing"))


# How many loop turns a handler may take to read what has arrived of a body, when it is to be told of a disconnect:
# enough for all that a kernel keeps.
_TURNS_FOR_A_BODY = 100


Standing: TypeAlias = Literal["busy", "arriving", "silent", "idle"]
"""
What a connection that is to be closed is still owed:

    busy        an answer: a request is being handled
    arriving    the rest of a request, and its answer: a part of it has come
    silent      a first request, for a moment: it may be on its way
    idle        nothing
"""


class Engine(uvicorn.Server):
    """
    A `uvicorn.Server` whose `serve()` is a well-behaved task.

    `serve()` never raises, whatever happens: what went wrong is in `error`. It survives being cancelled, which only
    hurries it. `ready` is done when it has started or failed to; the task's end is the end of everything.
    """

    error: BaseException | None = None
    """What went wrong: an `OSError` or a `ServingError`."""

    on_crash: Callable[[], None] | None = None
    """Called when the server dies in the middle of serving, from its own task."""

    on_closed: Callable[[], None] | None = None
    """Called when all is over, right before the waiters are told."""

    report: Report | None = None
    """How the shutdown went, when it is over."""

    out_of_time: bool = False
    """Whether the deadline of a `close()` is over, which ends what the requests in flight are given."""

    is_stopping: bool = False
    """Whether a stop has been asked for, or all is over."""

    crashed: bool = False
    asked_at: float | None = None

    # Here rather than in the constructor: an object with more than thirty attributes of its own is slow to make.
    _running: bool = False
    _leaving: bool = False  # the drain is over: connections close when they are owed nothing more
    _patient: bool = True  # it may still be that a silent one speaks
    _persuading: bool = False  # handlers are told that their client has gone
    _stopping: anyio.Event | None = None
    _date_timer: asyncio.TimerHandle | None = None
    _deadline: asyncio.TimerHandle | None = None

    def __init__(self, settings: Settings, listeners: Sequence[Listener]) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._context = contextvars.copy_context()
        self.waiting: Waiting = Waiting()
        self.ready: asyncio.Future[None] = self._loop.create_future()
        self.closed: asyncio.Event = asyncio.Event()

        super().__init__(settings.config)
        if settings.ssl is not None:
            settings.config.ssl = settings.ssl
        self.settings = settings
        self.listeners = listeners
        scheme = "https" if settings.config.ssl else "http"
        self.urls: list[str] = [listener.url(scheme) for listener in listeners]
        limit = settings.config.limit_max_requests
        if limit is not None:
            limit = getattr(self, "limit_max_requests", limit)  # which newer ones vary a little
        self.server_state: _State = _State(self) if limit is None else _LimitedState(self, limit)
        self.lifespan: Lifespan = Lifespan(
            settings.config.loaded_app,
            mode=settings.config.lifespan,
            asgi_version=settings.config.asgi_version,
            state={},
            waiting=self.waiting,
        )
        self.acceptor: Acceptor = Acceptor(
            listeners,
            functools.partial(_create_protocol, settings, self.server_state, self.lifespan),
            ssl=settings.config.ssl,
            backlog=settings.config.backlog,
            changed=self.waiting.notify,
        )
        self.servers: list[Any] = [self.acceptor]

        self._silent: set[Any] = set()  # those that are closing and may never have sent anything
        self._lingering: dict[Any, _Lingering] = {}
        self._watched: set[asyncio.Task[Any]] = set()
        self._background: set[asyncio.Task[Any]] = set()

    # The story.

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until asked to close; then stop, and close the sockets. Only aioserve calls this, and only once."""
        if self._running:
            raise RuntimeError("this server is run by aioserve, and only once")
        self._running = True
        try:
            await self._serve_until_asked()
            await shut_down(self)
        except GeneratorExit:
            # Its loop was closed under it, and now it is garbage.
            self.acceptor.close()
            self._tell_owner()
            raise
        except BaseException as exc:  # noqa: BLE001 (nothing may leave our task)
            self._fail("the server's own task failed while it was stopping", exc)
            await self._drop_everything()
        self._clean_up()

    async def _serve_until_asked(self) -> None:
        try:
            await self.lifespan.startup(self.settings.startup_timeout)
        except StartupError as exc:
            self.error = exc
            return
        except GeneratorExit:
            raise
        except BaseException as exc:  # noqa: BLE001 (the same; and the lifespan must be ended all the same)
            self._fail("the server's own task failed while it was starting", exc)
            return
        if not self.config.date_header:
            self.server_state.default_headers = self.config.encoded_headers
        self.acceptor.start()
        self.started = True
        uvicorn_logger.info("Serving on %s", ", ".join(self.urls))
        self._tell_systemd("READY=1")
        self._tell_starter()

        await self.waiting.wait_for(lambda: self.is_stopping or self.lifespan.died)
        if self.lifespan.died and not self.is_stopping and not self.waiting.forced:
            self._fail("the app's lifespan died while it was serving", self.lifespan.error)
        if not self.is_stopping:
            self.close()

    def ended(self, _: object) -> None:
        """Make sure of the end; for the task that was cancelled before its first step, so that `serve()` never ran."""
        if not self.closed.is_set():
            self.error = StartupError("the server's own task was cancelled before it had begun")
            self._clean_up()

    def _note_failure(self, what: str, cause: BaseException | None) -> None:
        self.error = ServerCrashedError(f"{what}: {describe(cause)}")
        self.error.__cause__ = cause
        self.crashed = True

    def _fail(self, what: str, cause: BaseException | None) -> None:
        self._note_failure(what, cause)
        self.close()
        if self.on_crash is not None:
            self.on_crash()
        else:
            logger.error("%s", self.error, exc_info=cause)

    async def _drop_everything(self) -> None:
        """Leave nothing, also where the shutdown has failed, which is a bug of ours."""
        self._leaving = True
        for drop in (self.acceptor.close, self.cancel_handlers, self.abort_connections):
            try:
                drop()
            except Exception:
                logger.exception("and so did what was to clean up after it")
        await self.waiting.wait_for(self.is_quiet, 1.0, even_if_forced=True)
        try:
            await self.lifespan.shutdown(0)
        except ShutdownError as exc:
            logger.error("%s", exc, exc_info=exc)

    def _clean_up(self) -> None:
        self.acceptor.close()
        for lingering in list(self._lingering.values()):
            lingering.end()
        for timer in (self._date_timer, self._deadline):
            if timer is not None:
                timer.cancel()
        self._say_that_it_stops()
        if self.started:
            uvicorn_logger.info("Closed %s", ", ".join(self.urls))
        self._tell_owner()
        self._tell_starter()
        self.closed.set()

        # Let go of each other: so we are gone when nobody holds us any more, and no garbage for a collector.
        self.lifespan.state = {name: value for name, value in self.lifespan.state.items() if name != "aioserve"}
        if not self.server_state.connections:
            self.server_state.connections = set()

    def _tell_owner(self) -> None:
        if self.on_closed is not None:
            self.on_closed()

    def _tell_starter(self) -> None:
        if not self.ready.done():
            self.ready.set_result(None)

    def _tell_systemd(self, state: str) -> None:
        if state in self.settings.notify_systemd:
            from aioserve._systemd import notify  # which is there, since we listen on what systemd has handed down

            notify(state)

    # Being asked to close.

    def close(self, deadline: float | None = None) -> None:
        """
        Ask for a graceful stop, from anywhere; a deadline, in the loop's time, can only shorten it.
        """
        if self._loop.is_closed():
            return  # and so is the server
        if threading.get_ident() == self._thread:
            self._close(deadline)
            if asyncio.current_task(self._loop) is not None:
                return
            # A signal handler, perhaps, which has interrupted the loop in its sleep: it has to be woken up.
        try:
            self._loop.call_soon_threadsafe(self._close, deadline)
        except RuntimeError:
            pass  # its loop has been closed just now

    def _close(self, deadline: float | None) -> None:
        if self.closed.is_set():
            return
        if self.asked_at is None:
            self.asked_at = self._loop.time()
            self._say_that_it_stops()
            self._tell_systemd("STOPPING=1")
            # From here on, every HTTP/1 response says that it is the last of its connection.
            for connection in list(self.server_state.connections):
                _make_last(self, connection)
        self.waiting.notify()
        if deadline is None:
            return

        if deadline <= self._loop.time():
            self.waiting.force()
        elif self._deadline is None or deadline < self._deadline.when():
            if self._deadline is not None:
                self._deadline.cancel()
            self._deadline = self._loop.call_at(deadline, self._run_out_of_time)

    def begin_to_stop(self) -> None:
        """
        Do in this very step what a stop can do without waiting; the next thing is to be `close()`.

        It is for a task of the program's that is about to wait for the end. A signal handler can be within any call of
        a protocol's, which is no place to close it; and so can a task, where tasks are begun eagerly. TLS transports
        keep to themselves what they have read.
        """
        if self.is_stopping or self.config.ssl or self._loop.get_task_factory() is not None:
            return
        try:
            # What is accepted here is not to run in the context of whoever asks.
            self._context.run(begin_to_stop, self)
        except Exception as exc:  # noqa: BLE001 (it is told at the end)
            self._note_failure("it could not begin to stop", exc)

    @property
    def stopping(self) -> anyio.Event:
        """Set from when `is_stopping`; made for those who look at it."""
        if self._stopping is None:
            self._stopping = anyio.Event()
            if self.is_stopping:
                self._stopping.set()
        return self._stopping

    def _say_that_it_stops(self) -> None:
        self.is_stopping = True
        if self._stopping is not None:
            self._stopping.set()

    def _run_out_of_time(self) -> None:
        self.out_of_time = True
        self.waiting.notify()

    # What the shutdown is told in.

    def is_settled(self) -> bool:
        """Whether all that has arrived is read, and has come to its handler."""
        return not self.acceptor.making and all(map(self._is_settled, self.server_state.connections))

    def _is_settled(self, connection: Any) -> bool:
        if not hasattr(connection, "cycle"):
            return _is_accepted(connection)
        return _standing(connection) in ("idle", "busy") and not self._unread(connection)

    def dismiss_idle(self) -> None:
        """Close the HTTP connections that are plainly owed nothing, and leave the others as they are."""
        for connection in list(self.server_state.connections):
            is_http = hasattr(connection, "cycle") and not connection.transport.is_closing()
            if is_http and _standing(connection) == "idle" and not self._unread(connection):
                self._say_goodbye(connection)

    def dismiss(self, *, patient: bool) -> None:
        """
        Close the connections that are owed nothing, WebSockets with 1012, and each other one as soon as it is.

        Args:
            patient: Whether a connection that has never sent anything is still owed a first request.
        """
        self._leaving = True
        self._patient = patient
        if not patient:
            self.acceptor.give_up()
        for connection in list(self.server_state.connections):
            self._dismiss(connection)

    def nobody_is_silent(self) -> bool:
        """Whether no connection is left that is owed a first request."""
        if self.acceptor.making:
            return False
        self._silent = {each for each in self._silent & self.server_state.connections if self._may_be_silent(each)}
        return not self._silent

    def _may_be_silent(self, connection: Any) -> bool:
        """Whether nothing has been read from it that shows for a request; what is not yet read may be one, or none."""
        if not hasattr(connection, "cycle") or connection.cycle is not None:
            return False
        return self._standing(connection) == "silent" or bool(self._unread(connection))

    def is_quiet(self) -> bool:
        """Whether no connection and no handler is left."""
        if self.server_state.connections or self.acceptor.making:
            return False
        return not self._handlers()

    def is_left_alone(self) -> bool:
        """Whether no handler is left, and each connection is closing: so the app has nothing more to do with it."""
        if self.acceptor.making or self._handlers():
            return False
        return all(connection.transport.is_closing() for connection in self.server_state.connections)

    def has_handlers(self) -> bool:
        return bool(self._handlers())

    def persuade(self) -> None:
        """Tell the handlers that wait in `receive()`, now or later, that their client has gone; they may still send."""
        self._persuading = True
        # A connection of httptools' knows the requests that wait behind the one in flight; that one, only its task.
        for task in list(self.server_state.tasks):
            cycle = _runs_for(task)
            if hasattr(cycle, "message_event") and not cycle.response_complete:
                _persuade(cycle, self._unread)
        for connection in list(self.server_state.connections):
            self._persuade(connection)

    def _persuade(self, connection: Any) -> None:
        for cycle in _unanswered(connection):
            _persuade(cycle, self._unread)

    def held_up(self) -> dict[asyncio.Task[Any], HeldUp]:
        """The handlers that are left, each with where it is."""
        return {task: _describe(task) for task in self._handlers() & self.server_state.tasks}

    def cancel_handlers(self) -> None:
        """Cancel the handlers that are left."""
        for task in self._handlers():
            _quieten(_runs_for(task))
            task.cancel()

    def abort_connections(self) -> int:
        """Drop the connections that are left, and return how many."""
        self.acceptor.give_up()
        connections = list(self.server_state.connections)
        for connection in connections:
            # Not TLS's own: one that was closed twice has forgotten how to abort (CPython, 3.11 to 3.13).
            self.acceptor.below(connection.transport).abort()
        return len(connections)

    def is_ours(self, task: asyncio.Task[Any] | None) -> bool:
        """Whether it is the lifespan's task, or a request's or WebSocket's."""
        if task is None:
            return False
        if task is self.lifespan.task or task in self.server_state.tasks:
            return True
        # An eager task runs before uvicorn has it in its set.
        scope = getattr(_runs_for(task), "scope", None)
        return scope is not None and getattr(scope["state"].get("aioserve"), "_engine", None) is self

    def _handlers(self) -> set[asyncio.Task[Any]]:
        """The tasks that are left of the handlers; their ends are noticed from here on."""
        tasks: set[asyncio.Task[Any]] = self.server_state.tasks | self._background
        for task in tasks - self._watched:
            task.add_done_callback(self._handler_done)
        self._watched |= tasks
        return tasks

    def _handler_done(self, task: asyncio.Task[Any]) -> None:
        self._watched.discard(task)
        if self.config.ssl and self._leaving:
            for connection in list(self.server_state.connections):
                self._see_off(connection)
        self.waiting.notify()

    def request_begun(self, connection: Any) -> None:
        """A connection makes a request of what it has read, after the stop was asked; look at it when that is made."""
        if self._persuading:
            self._loop.call_soon(self._dismiss, connection)

    def response_complete(self, connection: Any) -> None:
        """A connection has answered after the stop was asked; look at it again when it is done with that."""
        if self._leaving:
            self._loop.call_soon(self._dismiss, connection)
            self.waiting.notify()

    def _dismiss(self, connection: Any) -> None:
        if connection not in self.server_state.connections:
            return
        if not connection.transport.is_closing():
            standing = self._standing(connection)
            if standing == "busy" and self._persuading:
                self._persuade(connection)
            if self._may_be_silent(connection):
                self._silent.add(connection)
            if standing == "arriving" and self._unread(connection):
                self._loop.call_soon(self._dismiss, connection)  # to see what it is, when it is read
            if standing == "idle" or (standing == "silent" and not self._patient):
                self._say_goodbye(connection)
        self._see_off(connection)

    def _say_goodbye(self, connection: Any) -> None:
        try:
            connection.shutdown()
        except Exception:  # noqa: BLE001
            # The protocol is in no state to say so, as h11 after a request that was none.
            connection.transport.abort()

    def _standing(self, connection: Any) -> Standing:
        standing = _standing(connection)
        if standing == "busy" or not hasattr(connection, "cycle"):
            return standing
        # The rest of a body whose request has its answer is no reason to wait.
        rest_of_a_body = connection.cycle is not None and connection.cycle.more_body
        return "arriving" if not rest_of_a_body and self._unread(connection) else standing

    def _unread(self, connection: Any) -> int:
        """How much has come on a connection, or on that of a cycle, and is not yet read."""
        return _unread(self.acceptor.below(connection.transport))

    def more_is_waiting(self, connection: Any) -> bool:
        """Whether the connection's client has sent more requests, without waiting for an answer to the first."""
        if _more_is_waiting(connection):
            return True
        return not connection.cycle.more_body and self._unread(connection) > 0

    def _see_off(self, connection: Any) -> None:
        """Wait no longer for the client's part in closing a TLS connection than until ours is sent."""
        transport = connection.transport
        below = self.acceptor.below(transport)
        if below is transport or not transport.is_closing() or connection in self._lingering:
            return
        if not _unsent(transport, below):
            _hang_up(below)
            return
        try:
            lingering = _Lingering(transport, below, lambda: self._lingering.pop(connection))
        except OSError as exc:
            # No descriptor is left for it; so its client decides how long it takes, or the budget.
            logger.debug("cannot watch a closing TLS connection: %s", exc)
            return
        self._lingering[connection] = lingering

    # Connections come and go.

    def connection_added(self, connection: Any) -> None:
        if self.asked_at is not None:
            _make_last(self, connection)
            if self._leaving:
                # It was accepted in the last moment, or has just been upgraded to a WebSocket.
                self._silent.add(connection)
                self._loop.call_soon(self._dismiss, connection)
        if self._date_timer is None and self.config.date_header:
            self._tick()

    def connection_removed(self, connection: Any) -> None:
        if hasattr(connection, "cycle"):
            _let_go_of_timer(connection)
        else:
            # The legacy WebSocket protocol has tasks that outlive it by some turns.
            for name in ("handler_task", "close_connection_task"):
                task = getattr(connection, name, None)
                if task is not None and not task.done():
                    self._background.add(task)
                    task.add_done_callback(self._background.discard)
        if self.config.ssl is not None:
            if connection.transport.is_closing():
                self.acceptor.forget(connection.transport)
            lingering = self._lingering.get(connection)
            if lingering is not None:
                lingering.end()
        if self._leaving:
            self.waiting.notify()

    def requests_exhausted(self, limit: int) -> None:
        if not self.is_stopping:
            uvicorn_logger.info("Maximum request limit of %d exceeded. Closing.", limit)
            self.close()

    # The date header, kept right by one timer a second, and by none when nobody is connected.

    def _tick(self) -> None:
        if not self.server_state.connections:
            self._date_timer = None
            return
        self._refresh_default_headers()
        self._date_timer = self._loop.call_later(1.0, self._tick)

    def _refresh_default_headers(self) -> None:
        date = (b"date", formatdate(time.time(), usegmt=True).encode())
        self.server_state.default_headers = [date, *self.config.encoded_headers]

    # For code that knows uvicorn.Server and uses it on ours.

    @property
    def should_exit(self) -> bool:
        return self.is_stopping

    @should_exit.setter
    def should_exit(self, value: bool) -> None:
        if value:
            self.close()

    @property
    def force_exit(self) -> bool:
        return self.waiting.forced

    @force_exit.setter
    def force_exit(self, value: bool) -> None:
        if value:
            self.close(deadline=0)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        raise RuntimeError("this server is started by aioserve, and only once")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.close()


class _State(ServerState):
    """uvicorn's state, whose connections tell when they come and go: the price of it is paid once per connection."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.connections: set[Any] = _Connections(engine)


class _LimitedState(_State):
    """Says at the very request that the limit is reached, where uvicorn looks ten times a second."""

    def __init__(self, engine: Engine, limit: int) -> None:
        self._engine = engine
        self._limit = limit
        self._total = 0
        super().__init__(engine)

    @property
    def total_requests(self) -> int:
        return self._total

    @total_requests.setter
    def total_requests(self, value: int) -> None:
        self._total = value
        if value >= self._limit > 0:
            self._engine.requests_exhausted(self._limit)


class _Connections(set[Any]):
    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self._engine = engine

    def add(self, connection: Any) -> None:
        super().add(connection)
        self._engine.connection_added(connection)

    def discard(self, connection: Any) -> None:
        super().discard(connection)
        self._engine.connection_removed(connection)

    def remove(self, connection: Any) -> None:
        self.discard(connection)


# What uvicorn's protocols are given, and asked.


def _create_protocol(settings: Settings, server_state: ServerState, lifespan: Lifespan) -> asyncio.Protocol:
    protocol: Any = settings.config.http_protocol_class(
        config=settings.config,  # type: ignore[call-arg]  # uvicorn types it as a bare asyncio.Protocol
        server_state=server_state,
        app_state=lifespan.state,
    )
    if not settings.access_log:
        protocol.access_log = False
    return protocol  # type: ignore[no-any-return]


def _standing(connection: Any) -> Standing:
    if not hasattr(connection, "cycle"):
        return "idle"  # a WebSocket can be told to come again at any time
    cycle = connection.cycle
    if cycle is not None and not cycle.response_complete:
        return "busy"

    scope = None if cycle is None else cycle.scope
    if hasattr(connection, "pipeline"):  # httptools
        arriving = connection.scope is not scope
    elif hasattr(connection.conn, "trailing_data"):  # h11
        arriving = bool(connection.conn.trailing_data[0])
    else:  # zttp does not tell of a first request
        arriving = cycle is not None and not cycle.more_body and connection.timeout_keep_alive_task is None
    if arriving:
        return "arriving"
    return "silent" if cycle is None else "idle"


def _unanswered(connection: Any) -> list[Any]:
    """The cycles whose response is not yet complete: the last, and those of httptools' that wait before it."""
    cycles = [getattr(connection, "cycle", None), *(cycle for cycle, _app in getattr(connection, "pipeline", ()))]
    return [cycle for cycle in cycles if cycle is not None and not cycle.response_complete]


def _is_accepted(websocket: Any) -> bool:
    """Whether the app has accepted it, or refused."""
    completed: asyncio.Event | None = getattr(websocket, "handshake_completed_event", None)
    return bool(websocket.handshake_complete) if completed is None else completed.is_set()


def _more_is_waiting(connection: Any) -> bool:
    """Whether more requests have been read from the connection, or a part of one."""
    if hasattr(connection, "pipeline"):  # httptools
        return bool(connection.pipeline) or connection.scope is not connection.cycle.scope
    trailing: tuple[bytes, bool] | None = getattr(connection.conn, "trailing_data", None)  # h11; zttp does not tell
    return trailing is not None and bool(trailing[0]) and not connection.cycle.more_body


def _make_last(engine: Engine, connection: Any) -> None:
    """Let every response of an HTTP connection that has not begun yet say "connection: close"."""
    if not hasattr(connection, "cycle") or isinstance(connection.server_state, _LastState):
        return
    connection.server_state = state = _LastState(engine, connection)
    for cycle in _unanswered(connection):
        cycle.default_headers = state.default_headers


class _LastState:
    """
    Stands before uvicorn's state for one connection which is to close.

    A request costs nothing for it before a stop is asked for.
    """

    def __init__(self, engine: Engine, connection: Any) -> None:
        self._engine = engine
        self._connection = connection

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine.server_state, name)

    @property
    def default_headers(self) -> list[tuple[bytes, bytes]]:
        self._engine.request_begun(self._connection)
        return _LastHeaders(self._engine, self._connection)

    @property
    def total_requests(self) -> int:
        return self._engine.server_state.total_requests

    @total_requests.setter
    def total_requests(self, value: int) -> None:
        self._engine.server_state.total_requests = value
        self._engine.response_complete(self._connection)


class _LastHeaders(list[tuple[bytes, bytes]]):
    """
    The default headers, which get a "connection: close" when a response begins.

    Not where it would take back what has been promised: in an answer to an upgrade (101), and where the client has
    sent more requests already. (RFC 9112, 9.6: nothing is answered after it.)
    """

    def __init__(self, engine: Engine, connection: Any) -> None:
        super().__init__(engine.server_state.default_headers)
        self._engine = engine
        self._connection = connection

    def __add__(self, others: Any) -> Any:
        connection = self._connection
        upgraded = connection not in connection.connections
        if upgraded or self._engine.more_is_waiting(connection):
            return [*self, *others]
        return [*self, *(each for each in others if each[0].lower() != CLOSE[0]), CLOSE]


def _let_go_of_timer(connection: Any) -> None:
    """Let a connection that has gone, or has become a WebSocket, leave no keep-alive timer; nor set one later on."""
    timer = connection.timeout_keep_alive_task
    if timer is not None:
        timer.cancel()
    cycle = connection.cycle
    if cycle is not None and not cycle.response_complete:
        # An upgrade that came in one packet with a request before it: the answer to that is still to come.
        on_response = cycle.on_response

        def without_timer(*args: Any) -> None:
            on_response(*args)
            if connection.timeout_keep_alive_task is not None:
                connection.timeout_keep_alive_task.cancel()

        cycle.on_response = without_timer


def _persuade(cycle: Any, unread: Callable[[Any], int]) -> None:
    """
    Let `receive()` say `http.disconnect` from now on, after what has come of the request; `send()` works as before.

    uvicorn has one flag for both, so it is made to look different to the one: `receive()` waits for the event, clears
    it, and looks at the flag.
    """
    if isinstance(cycle.message_event, _Persuasion):
        return
    _quieten(cycle)
    cycle.message_event = _Persuasion(cycle, unread)
    cycle.__class__ = _persuaded(type(cycle))  # type: ignore[arg-type]
    cycle.message_event.wake_up()


class _Persuasion:
    """In place of a cycle's `asyncio.Event`: where there is no other news, it is that the client has gone."""

    def __init__(self, cycle: Any, unread: Callable[[Any], int]) -> None:
        self._cycle = cycle
        self._unread = unread
        self._event = cycle.message_event
        """What a handler may be waiting for already."""
        self._news = cycle.message_event.is_set()
        self._turns = _TURNS_FOR_A_BODY

    def wake_up(self) -> None:
        """Wake up whoever is waiting, but for those whom what has arrived will wake."""
        if self._has_arrived():
            asyncio.get_running_loop().call_soon(self.wake_up)
        else:
            self._event.set()

    async def wait(self) -> bool:
        while self._has_arrived():  # noqa: ASYNC110 (the loop reads it, and has no event for that)
            await asyncio.sleep(0)
        return True

    def _has_arrived(self) -> bool:
        """Whether something more of the request's body has arrived, and is about to be read."""
        self._turns -= 1
        return self._turns > 0 and not self._news and bool(self._cycle.more_body and self._unread(self._cycle))

    def set(self) -> None:
        self._news = True
        self._event.set()

    def is_set(self) -> bool:
        return True

    def clear(self) -> None:
        if self._news:
            self._news = False
        else:
            self._cycle.persuading = True


@functools.cache
def _persuaded(cycle_class: type[Any]) -> type[Any]:
    class PersuadedCycle(cycle_class):  # type: ignore[misc]
        persuading = False

        @property
        def disconnected(self) -> bool:
            if self.persuading:
                self.persuading = False
                return True
            disconnected: bool = self.__dict__["disconnected"]
            return disconnected

        @disconnected.setter
        def disconnected(self, value: bool) -> None:
            self.__dict__["disconnected"] = value

    return PersuadedCycle


def _runs_for(task: asyncio.Task[Any]) -> Any:
    """The cycle or the WebSocket protocol whose handler runs in the task; `None` where the task is no handler."""
    frame = getattr(task.get_coro(), "cr_frame", None)
    if frame is None or frame.f_code.co_name != "run_asgi":
        return None
    return frame.f_locals.get("self")


def _describe(task: asyncio.Task[Any]) -> HeldUp:
    scope: Scope = getattr(_runs_for(task), "scope", {})
    return HeldUp(
        method=scope.get("method", "WEBSOCKET"),
        path=scope.get("path", "?"),
        client=scope.get("client"),
        where=_where(task.get_coro()),
        stuck=False,
    )


def _where(waiting: Any) -> tuple[str, ...]:
    """The chain of coroutines, outermost first: what is called, and in which line of which file it waits."""
    chain = []
    while waiting is not None:
        for kind, below in (("cr", "await"), ("gi", "yieldfrom"), ("ag", "await")):
            frame = getattr(waiting, f"{kind}_frame", None)
            if frame is not None:
                chain.append(f"{waiting.__qualname__} ({frame.f_code.co_filename}:{frame.f_lineno})")
                waiting = getattr(waiting, f"{kind}_{below}")
                break
        else:
            break
    return tuple(chain)


def _quieten(runs_for: Any) -> None:
    """
    Let uvicorn not log what we bring about as a mistake of the app's: its cancellation, and what we have persuaded it
    to leave unfinished. We say that in one line.
    """
    has_logger = runs_for
    if isinstance(getattr(runs_for, "logger", None), logging.LoggerAdapter):  # the legacy WebSocket protocol's own
        has_logger = runs_for.logger
    logger = getattr(has_logger, "logger", None)
    if isinstance(logger, logging.Logger) and not isinstance(logger, _WithoutOurDoing):
        has_logger.logger = _without_our_doing(logger)


class _WithoutOurDoing(logging.Logger):
    def __init__(self, logger: logging.Logger) -> None:
        super().__init__(logger.name)
        self._logger = logger

    def isEnabledFor(self, level: int) -> bool:  # noqa: N802 (logging's own)
        return self._logger.isEnabledFor(level)

    def error(self, msg: object, *args: object, **kwargs: Any) -> None:
        if msg not in _LEFT_UNFINISHED:
            super().error(msg, *args, **{"stacklevel": 2, **kwargs})

    def handle(self, record: logging.LogRecord) -> None:
        if record.exc_info is None or not isinstance(record.exc_info[1], asyncio.CancelledError):
            self._logger.handle(record)


_without_our_doing = functools.cache(_WithoutOurDoing)


class _Lingering:
    """
    Sees to it that a closing TLS connection is gone when what we have sent is on its way, the close_notify included.

    asyncio waits half a minute for that of the client's, who need not send one. (RFC 8446, 6.1.)
    """

    def __init__(self, transport: Any, below: Any, ended: Callable[[], object]) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport = transport
        self._below = below
        self._ended = ended
        # A descriptor of our own, since the loop lets nobody look at a transport's.
        self._descriptor = os.dup(_descriptor(below))
        self._loop.add_writer(self._descriptor, self._writable)

    def _writable(self) -> None:
        if not _unsent(self._transport, self._below):
            self._loop.remove_writer(self._descriptor)
            _hang_up(self._below)

    def end(self) -> None:
        self._loop.remove_writer(self._descriptor)
        os.close(self._descriptor)
        self._ended()


def _unsent(transport: Any, below: Any) -> bool:
    """Whether there is something in a TLS transport, or in the one below, that the kernel has not got yet."""
    try:
        return bool(below.get_write_buffer_size() or transport.get_write_buffer_size())
    except AttributeError:
        return False  # closed twice, a TLS transport knows nothing more


def _hang_up(below: Any) -> None:
    """
    End a connection from the outside, as if its client had done it.

    So what has come and is not yet read does no harm, as it would with an abort: a reset, which can take back what we
    have sent.
    """
    try:
        sock = socket.socket(fileno=_descriptor(below))
    except OSError:
        return  # it is gone
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    finally:
        sock.detach()  # it is the transport's
    below.resume_reading()


def _unread(below: Any) -> int:
    """How much has come on a connection that nobody has read yet."""
    size = bytearray(4)  # an int of C's; bytes would be copied to and fro
    try:
        fcntl.ioctl(_descriptor(below), termios.FIONREAD, size)
    except OSError:
        return 0
    return int.from_bytes(size, sys.byteorder)


def _descriptor(below: Any) -> int:
    sock = below.get_extra_info("socket")
    descriptor: int = -1 if sock is None else sock.fileno()
    if descriptor < 0:
        raise OSError(errno.EBADF, "the connection is gone")
    return descriptor


# uvicorn's Config.


# Options that do more than to be remembered: they import, set up logging, read files, call.
_OF_TLS = ("certfile", "keyfile", "keyfile_password", "ca_certs", "cert_reqs", "ciphers", "version", "context_factory")
_DO_MORE = frozenset({"factory", "log_config", "log_level", *(f"ssl_{name}" for name in _OF_TLS)})


def configure(app: Any, options: Mapping[str, Any]) -> uvicorn.Config:
    """
    Make uvicorn's Config: a copy of one that is made and loaded, where that comes to the same.

    To make and load one takes half as long as all else in a start, and most servers of a program differ in their apps
    only.
    """
    world = _world(options) if _is_plain(app) and _DO_MORE.isdisjoint(options) else None
    # There are no workers here, so uvicorn need not look for their number in the environment.
    options = {"log_config": None, "workers": 1, **options}
    if world is not None:
        try:
            template = _template_for(world, **options)
        except TypeError:
            template = None  # an option cannot be hashed
        if template is not None:
            return template.copy_for(app)
    return uvicorn.Config(app, **options)


def _world(options: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """
    Return what a Config comes from, once it is loaded, besides the app and the options.

    Returns:
        None: A protocol is the program's own; or a server has to be loaded first: that imports the protocols, which
            takes long enough for a signal to come.
    """
    chosen = []
    for option, protocols in (("http", HTTP_PROTOCOLS), ("ws", WS_PROTOCOLS)):
        where = protocols.get(options.get(option, "auto"), "")
        if where is not None:  # as of "none"
            name, _, attribute = where.partition(":")
            protocol = getattr(sys.modules.get(name), attribute, None)
            if protocol is None:
                return None
            chosen.append(protocol)
    trusted = os.environ.get("FORWARDED_ALLOW_IPS")
    # The level, since uvicorn puts something before the app for "trace"; and who watches over apps may replace load().
    return uvicorn.Config, uvicorn.Config.load, *chosen, trusted, uvicorn_logger.getEffectiveLevel()


def _is_plain(app: Any) -> bool:
    """
    Whether uvicorn takes the app as it is: for ASGI 3, if the options do not say otherwise, and for no factory.

    It takes for a factory what can be called with nothing, and no class for ASGI 3.
    """
    # By their very types: a proxy can say that it is of another.
    function, bound = (app, 0) if type(app) is types.FunctionType else (type(app).__call__, 1)
    if type(function) is not types.FunctionType or isinstance(app, type):
        return False
    code = function.__code__
    required = code.co_argcount - len(function.__defaults__ or ()) - bound
    return required > 0 and bool(code.co_flags & inspect.CO_COROUTINE)


class _Template:
    """A Config that is loaded, to be copied for one app after another."""

    def __init__(self, config: uvicorn.Config) -> None:
        self._attributes = vars(config)
        self._lists = [name for name, value in self._attributes.items() if isinstance(value, list)]

    def copy_for(self, app: Any) -> uvicorn.Config:
        config = uvicorn.Config.__new__(uvicorn.Config)
        config.__dict__ = attributes = self._attributes.copy()
        for name in self._lists:
            attributes[name] = attributes[name].copy()
        config.app = config.loaded_app = app
        if config.proxy_headers:
            config.loaded_app = _behind_proxies(app, config.forwarded_allow_ips)
        return config


@functools.lru_cache(typed=True)
def _template_for(_world: tuple[Any, ...], **options: Any) -> _Template | None:
    """
    Load a Config with an app that is plain.

    Returns:
        None: It wraps the app, or it cannot be loaded; then what uvicorn does, and says, is better done by uvicorn.
    """

    async def app(scope: Scope, receive: object, send: object) -> None:
        pass

    try:
        config = uvicorn.Config(app, **options)
        load(config)
    except Exception:  # noqa: BLE001
        return None
    taken = config.loaded_app
    if config.proxy_headers:
        taken = taken.app
    return _Template(config) if taken is app else None


def _behind_proxies(app: Any, trusted: list[str] | str) -> ProxyHeadersMiddleware:
    """Wrap the app as uvicorn does; but who is trusted is worked out once for all servers, which takes a while."""
    middleware = ProxyHeadersMiddleware.__new__(ProxyHeadersMiddleware)
    middleware.app = app
    middleware.trusted_hosts = _trusted_hosts(trusted if isinstance(trusted, str) else tuple(trusted))
    return middleware


@functools.lru_cache
def _trusted_hosts(hosts: str | tuple[str, ...]) -> Any:
    nobody: Any = None
    return ProxyHeadersMiddleware(nobody, hosts if isinstance(hosts, str) else list(hosts)).trusted_hosts


def load(config: uvicorn.Config) -> None:
    """
    Import the app and all that the Config names, if that is not done.

    It takes as long as the import takes, and the loop stands still meanwhile.

    Raises:
        OSError: A certificate or key file cannot be read.
        StartupError: The app cannot be imported, its factory failed, or what came out cannot be called.
    """
    if config.loaded:
        return
    for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs"):
        path = getattr(config, name)
        if path:
            with open(path, "rb"):  # for the error: ssl's own does not say which file is missing
                pass

    app = config.app if isinstance(config.app, str) else "the app"
    behind_proxies, config.proxy_headers = config.proxy_headers, False  # that part of it is ours
    try:
        if isinstance(config.app, str):
            import_from_string(config.app)  # before uvicorn does it, and logs what it raises
        config.load()
    except SystemExit as exc:
        reason = exc.__context__ or exc  # uvicorn's has a reason; the app's own is one
        raise StartupError(f"cannot load {app}: {type(reason).__name__}: {reason}") from reason
    except Exception as exc:
        if isinstance(exc, ssl.SSLError) and not hasattr(config, "ssl"):  # it comes before the app is imported
            names = ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs", "ssl_ciphers")
            given = ", ".join(f"{name}={getattr(config, name)!r}" for name in names if getattr(config, name))
            raise type(exc)(exc.errno, f"{exc.strerror or exc}; with {given}") from exc
        raise StartupError(f"cannot load {app}: {type(exc).__name__}: {exc}") from exc
    finally:
        config.proxy_headers = behind_proxies

    loaded = config.loaded_app
    if behind_proxies:
        config.loaded_app = _behind_proxies(loaded, config.forwarded_allow_ips)
    while type(loaded).__module__.startswith("uvicorn.middleware."):
        loaded = loaded.app
    if inspect.iscoroutine(loaded):
        loaded.close()
        raise StartupError(f"cannot load {app}: its factory is a coroutine function, and must be a plain one")
    if not callable(loaded):
        raise StartupError(f"cannot load {app}: it is no ASGI app, but {loaded!r}")
