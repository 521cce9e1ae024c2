"""
What state a connection is in, for each of uvicorn's protocols; and whose handler a task runs.

Every function here answers a question, but for the first and the last four. A connection is one of uvicorn's protocol
objects; a cycle is one request of it, with its response; a connection of HTTP/2 can have many at a time.
"""

from __future__ import annotations

import asyncio
import functools
import operator
import sys
from collections.abc import Callable, Mapping
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import uvicorn
from uvicorn.server import ServerState

from aioserve import _limits
from aioserve._lifespan import Lifespan
from aioserve._report import awaited_by, coroutines_held_by, frame_of
from aioserve._uvicorn import http2

if TYPE_CHECKING:  # each Protocol takes a tenth of a millisecond at the import

    class Observer(Protocol):
        """Who is told of connections; and, from when a stop is asked for, of their requests."""

        @property
        def state(self) -> ServerState: ...
        def connection_added(self, connection: Any) -> None: ...
        def connection_removed(self, connection: Any) -> None: ...
        def progress_made(self, connection: Any) -> None: ...
        def has_more_requests(self, connection: Any) -> bool: ...
        def retire(self, connection: Any) -> object: ...
        def make_heads(self) -> Any: ...


ConnectionState: TypeAlias = Literal["busy", "opening", "answering", "partial", "new", "idle"]
"""
Whether a connection can be closed, by what has been read of it:

    busy       a request is being handled, or a WebSocket is being refused with a response of the app's
    opening    a WebSocket that the app has neither accepted nor refused yet
    answering  one whose answer is sent in the next turns of the loop
    partial    a part of a request has arrived
    new        nothing has been read yet: a first request may be on its way
    idle       it can be closed
"""


def create_protocol(
    config: uvicorn.Config, server_state: ServerState, lifespan: Lifespan, access_log: bool, is_named: bool
) -> asyncio.Protocol:
    """Make what handles a connection that was accepted, and whether `name_server()` will be called for it."""
    protocol_class: Any = config.http_protocol_class  # uvicorn types it as a bare asyncio.Protocol
    make = _named_class(protocol_class) if is_named else protocol_class
    protocol: asyncio.Protocol = make(config=config, server_state=server_state, app_state=lifespan.state)
    if not access_log:
        protocol.access_log = False  # type: ignore[attr-defined]  # all of uvicorn's have it
    return protocol


def name_server(connection: Any, paths: Mapping[Any, str | bytes | None]) -> None:
    """Let `scope["server"]` have the path of a Unix socket, by the name by which that was bound."""
    connection.server_paths = paths
    if not hasattr(type(connection), "server_paths"):  # uvicorn has made it: for a WebSocket, or for HTTP/2
        connection.__class__ = _named_class(type(connection))  # type: ignore[arg-type]


@functools.lru_cache
def _named_class(protocol_class: type[Any]) -> type[Any]:
    def set_server(self: Any, server: Any) -> None:
        path = None
        if self.server_paths is not None:  # else uvicorn is just making it
            name = self.transport.get_extra_info("sockname") if server is None else server[0]  # None: uvicorn 0.40
            path = self.server_paths.get(name)
        self.server_name = server if path is None else (path, None)

    class Named(protocol_class):  # type: ignore[misc]
        server_paths: Mapping[Any, str | bytes | None] | None = None
        server = property(operator.attrgetter("server_name"), set_server)  # no Python call to read it

    return Named


def is_http(connection: Any) -> bool:
    """Whether it is an HTTP connection, and not a WebSocket."""
    return hasattr(connection, "cycle") or hasattr(connection, "alpn_protocols")


def connection_state(connection: Any) -> ConnectionState:
    """Return the state of a connection by what has been read from it."""
    try:
        cycle = connection.cycle
    except AttributeError:
        return _state_without_cycle(connection)
    if cycle is not None and not cycle.response_complete:
        return "busy"

    scope = None if cycle is None else cycle.scope
    if hasattr(connection, "pipeline"):  # httptools
        partial = connection.scope is not scope
    elif hasattr(connection.conn, "trailing_data"):  # h11
        partial = bool(connection.conn.trailing_data[0])
    else:  # see `shows_first_request()`
        partial = cycle is not None and not cycle.more_body and connection.timeout_keep_alive_task is None
    if partial:
        return "partial"
    return "new" if cycle is None else "idle"


def awaited_head(connection: Any) -> object:
    """
    Return which head of a request a connection waits for, of which a part may have come; `None` for no head.

    Between two requests, uvicorn's `timeout_keep_alive` has the say until something comes, even an empty line.
    """
    if not is_http(connection):
        return None
    if http2.is_http2(connection):
        return http2.awaited_head(connection)
    state, cycle = connection_state(connection), getattr(connection, "cycle", None)
    if state == "busy" or (state == "idle" and connection.timeout_keep_alive_task is not None):
        return None
    if cycle is None:
        return "first"
    return None if _is_sending_body(connection) else cycle


def _is_sending_body(connection: Any) -> bool:
    """Whether the rest of a body is still to come whose request has its answer; or may be, with httptools."""
    cycle = connection.cycle
    if hasattr(getattr(connection, "conn", None), "trailing_data"):  # h11, where uvicorn does not see its end
        return repr(connection.conn.their_state) == "SEND_BODY"
    if not cycle.more_body or connection.scope is not cycle.scope:
        return False
    # An eager task can have answered before uvicorn has seen that there is no body.
    return any(name in (b"content-length", b"transfer-encoding") for name, _ in cycle.scope["headers"])


def shows_first_request(connection: Any) -> bool:
    """Whether it can be seen that a part of a first request has been read; not with zttp's HTTP/1."""
    is_decided = hasattr(connection, "cycle")
    return not is_decided or hasattr(connection, "pipeline") or hasattr(connection.conn, "trailing_data")


def _state_without_cycle(connection: Any) -> ConnectionState:
    if http2.is_http2(connection):
        return http2.stream_state(connection)
    if http2.is_undecided(connection):
        return "partial" if connection.buffer else "new"
    return _websocket_state(connection)


def _websocket_state(websocket: Any) -> ConnectionState:
    if hasattr(websocket, "handshake_completed_event"):  # the legacy one sends its answer in a task of its own
        if websocket.handshake_completed_event.is_set():
            return "idle"
        return "answering" if websocket.handshake_started_event.is_set() else "opening"
    # wsproto, websockets-sansio
    if getattr(websocket, "response_started", False) or getattr(websocket, "initial_response", None) is not None:
        return "idle" if websocket.close_sent else "busy"
    return "idle" if websocket.handshake_complete else "opening"


def is_being_refused(connection: Any) -> bool:
    """Whether it is a WebSocket that the app refuses with a response of its own, which is not complete."""
    return not is_http(connection) and connection_state(connection) == "busy"


def unanswered_cycles(connection: Any) -> list[Any]:
    """
    The cycles whose response is not complete.

    That is the current one, and with httptools those before and behind it; with HTTP/2, those of all streams.
    """
    cycles = list(connection.cycles.values()) if http2.is_http2(connection) else [getattr(connection, "cycle", None)]
    if getattr(connection, "pipeline", ()):  # the current one is the last of it, and the first one is running
        running = [unanswered_cycle_of(task) for task in connection.tasks]
        cycles += [each for each in running if each is not None and each.transport is connection.transport]
        cycles += [cycle for cycle, _app in connection.pipeline]
    return [cycle for cycle in cycles if cycle is not None and not cycle.response_complete]


def has_read_more(connection: Any) -> bool:
    """Whether more requests, or a part of one, have been read behind the current one."""
    if hasattr(connection, "pipeline"):  # httptools
        return bool(connection.pipeline) or connection.scope is not connection.cycle.scope
    trailing: tuple[bytes, bool] | None = getattr(connection.conn, "trailing_data", None)  # h11; zttp does not show it
    return trailing is not None and bool(trailing[0]) and not connection.cycle.more_body


def has_unread_body(connection: Any) -> bool:
    """Whether the rest of a current request's body may still come."""
    cycle = getattr(connection, "cycle", None)
    if cycle is not None:
        return cycle.more_body  # type: ignore[no-any-return]
    return any(each.more_body for each in getattr(connection, "cycles", {}).values())


def tasks_behind(websocket: Any) -> list[asyncio.Task[Any]]:
    """The tasks of the legacy WebSocket protocol that outlive their connection by some turns of the loop."""
    tasks = [getattr(websocket, name, None) for name in ("handler_task", "close_connection_task")]
    return [task for task in tasks if task is not None and not task.done()]


def handled_by(task: asyncio.Task[Any]) -> Any:
    """
    The cycle or the WebSocket protocol whose handler runs in a task; `None` where the task is not a handler.

    It is the `self` of uvicorn's `run_asgi()`, which a task factory may have wrapped in coroutines of its own.
    """
    try:
        if task.done():  # and CPython 3.12.1 crashes where an eager task that is done is asked for its coroutine
            return None
        coroutine: Any = task.get_coro()
        is_running = getattr(coroutine, "cr_running", False)
        frame = _called_run_asgi(coroutine.cr_frame) if is_running else _awaited_run_asgi(coroutine)
        return None if frame is None else frame.f_locals.get("self")
    except Exception:  # noqa: BLE001 (a coroutine of somebody else's can be anything)
        return None


def _called_run_asgi(outermost: FrameType) -> FrameType | None:
    """Look for it in the stack of calls: a coroutine that is running does not tell what it awaits."""
    found = None  # no list of frames: one that holds its own frame is left to the garbage collector
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "run_asgi":
            found = frame
        if frame is outermost:
            return found
        frame = frame.f_back
    return None


def _awaited_run_asgi(outermost: Any) -> FrameType | None:
    """Look for it in what a coroutine awaits, or holds in a variable, as a wrapper does that has not begun."""
    coroutines = [outermost]
    for coroutine in coroutines:
        frame = frame_of(coroutine)
        if frame is not None:
            if frame.f_code.co_name == "run_asgi":
                return frame
            for found in (awaited_by(coroutine), *coroutines_held_by(frame)):
                if not any(found is each for each in coroutines) and len(coroutines) < _limits.WRAPPING_COROUTINES:
                    coroutines.append(found)
    return None


def unanswered_cycle_of(task: asyncio.Task[Any]) -> Any:
    """The cycle whose handler runs in a task; `None` where its response is complete, or the task has no cycle."""
    cycle = handled_by(task)
    return cycle if hasattr(cycle, "message_event") and not cycle.response_complete else None


def scope_of(task: asyncio.Task[Any]) -> dict[str, Any]:
    """The ASGI scope of the request whose handler runs in a task; empty where the task is not a handler."""
    return getattr(handled_by(task), "scope", {})


def cancel_keep_alive_timer(connection: Any) -> None:
    """Cancel the timer of a connection that is lost or has become a WebSocket; and keep it from setting another."""
    if not hasattr(connection, "cycle"):
        return  # these do so themselves
    timer = connection.timeout_keep_alive_task
    if timer is not None:
        timer.cancel()
        connection.timeout_keep_alive_task = None  # or uvicorn would cancel it once more
    cycle = connection.cycle
    if cycle is not None and not cycle.response_complete:
        # An upgrade that came in one packet with a request before it: the answer to that is still to come.
        on_response = cycle.on_response

        def without_timer(*args: Any) -> None:
            on_response(*args)
            if connection.timeout_keep_alive_task is not None:
                connection.timeout_keep_alive_task.cancel()

        cycle.on_response = without_timer


def watch_bytes(connection: Any, on_bytes: Callable[[Any], None]) -> None:
    """Call a function after each part of a request that arrives."""
    if "data_received" in vars(connection):
        return
    received = connection.data_received

    def data_received(data: bytes) -> None:
        received(data)
        on_bytes(connection)

    connection.data_received = data_received
    connection.transport.set_protocol(connection)  # uvloop's transports remember the method


def stop_watching_bytes(connection: Any) -> None:
    vars(connection).pop("data_received", None)


def read_on(connection: Any) -> None:
    """Let an HTTP connection read what it holds back of a body."""
    connection.flow.resume_reading()


def close_gracefully(connection: Any) -> None:
    """Close an idle connection, with HTTP/2 by a GOAWAY, or a WebSocket with 1012."""
    try:
        connection.shutdown()
    except Exception:  # noqa: BLE001
        # The protocol is in a state in which it cannot, as h11 after an invalid request.
        connection.transport.abort()
