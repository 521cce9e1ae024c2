"""
The canary: everything that `_uvicorn/` relies on in uvicorn's private parts, each tested on the real object, with a
request or a WebSocket in it. A failure here says what would break in aioserve.

The parameters of `uvicorn.Config`, which it keeps as attributes, are not listed: those are public.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import uvicorn
from uvicorn.config import HTTP_PROTOCOLS, LOGGING_CONFIG, WS_PROTOCOLS
from uvicorn.importer import import_from_string
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware
from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.server import ServerState
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as connect_websocket

import aioserve._uvicorn
from aioserve import Server, _connections, _engine, _limits, _options, serving
from aioserve._connections import Connections
from aioserve._uvicorn.disconnect import refuse
from aioserve._uvicorn.protocols import connection_state
from tests.helpers.apps import App, Receive, Scope, Send, without_lifespan
from tests.helpers.clients import UPGRADE, Connection, connect

pytestmark = pytest.mark.timeout(10)  # if nothing works any more, the run should not take an hour

HTTP = [name for name in ("h11", "httptools", "zttp") if name in HTTP_PROTOCOLS]  # an older uvicorn has no zttp
WEBSOCKETS = [name for name in ("websockets", "websockets-sansio", "wsproto") if name in WS_PROTOCOLS]


class Thing(NamedTuple):
    """An attribute that is relied on; or, in the tables of `ABSENT`, one that must not exist."""

    of: str
    path: str
    breaks: str
    """What breaks without it."""
    only: tuple[str, ...] = ()
    """The implementations that have it, if not all do."""

    def __str__(self) -> str:
        return f"{self.of}.{self.path}"


OF_HTTP = [
    Thing("http", "transport", "A stop could neither close connections nor drop them."),
    Thing("http", "shutdown", "A stop could not close an idle connection in an orderly way."),
    Thing("http", "connections", "The answer to an upgrade during a stop would say that its connection closes."),
    Thing("http", "server_state", "Requests that begin during a stop would be answered without connection: close."),
    Thing("http", "access_log", "access_log=False would silence nothing."),
    Thing(
        "http", "timeout_keep_alive_task", "The timer of a lost connection would keep the app in memory after the stop."
    ),
    Thing("http", "cycle", "HTTP would be taken for a WebSocket, and a request in flight would be cut off."),
    Thing("http", "cycle.response_complete", "Busy and idle connections could not be distinguished."),
    Thing(
        "http", "cycle.scope", "A handler that waits for its own server would not be refused, and would wait for ever."
    ),
    Thing(
        "http", "cycle.default_headers", "A request in flight at a stop would be answered without connection: close."
    ),
    Thing("http", "cycle.disconnected", "A handler could not get a disconnect before it is cancelled."),
    Thing("http", "cycle.message_event", "A handler that waits in receive() would not wake up to get a disconnect."),
    Thing("http", "cycle.on_response", "An answer that comes after an upgrade would leave a timer behind."),
    Thing(
        "http",
        "cycle.transport",
        "The part of a body that has arrived would be lost when its handler gets a disconnect.",
    ),
    Thing("http", "cycle.logger", "Each handler that is cancelled would leave a traceback in the log."),
    Thing("http", "cycle.more_body", "A request's own body would be taken for the next request."),
    Thing("http", "flow.resume_reading", "Over TLS on asyncio, an early answer to an upload would be lost in a stop."),
    Thing("http", "server", "Over a Unix socket, apps would be told the name by which it was bound."),
    Thing("http", "tasks", "A stream with a request behind it would not be told of a stop.", ("httptools",)),
    Thing("http", "conn", "h11 and zttp could not be distinguished.", ("h11", "zttp")),
    Thing(
        "http", "conn.trailing_data", "The part of a request that has arrived would be discarded by a stop.", ("h11",)
    ),
    Thing("http", "conn.their_state", "A slow body whose request has its answer would be cut off.", ("h11",)),
    Thing("http", "scope", "The part of a request that has arrived would be discarded by a stop.", ("httptools",)),
    Thing("http", "pipeline", "Pipelined requests would be answered without connection: close.", ("httptools",)),
]
OF_WEBSOCKETS = [
    Thing("websocket", "transport", "A stop could not drop a WebSocket."),
    Thing("websocket", "server", "Over a Unix socket, apps would be told the name by which it was bound."),
    Thing("websocket", "shutdown", "A stop could not close a WebSocket with 1012."),
    Thing(
        "websocket",
        "handshake_complete",
        "A WebSocket that opens during a stop would be refused.",
        ("websockets-sansio", "wsproto"),
    ),
    Thing(
        "websocket",
        "handshake_completed_event",
        "A WebSocket that opens during a stop would be refused.",
        ("websockets",),
    ),
    Thing(
        "websocket",
        "handshake_started_event",
        "A WebSocket that is accepted at the moment of a stop would be answered twice.",
        ("websockets",),
    ),
    Thing(
        "websocket",
        "initial_response",
        "A response in place of a WebSocket would be cut off by a stop.",
        ("websockets", "websockets-sansio"),
    ),
    Thing("websocket", "response_started", "A response in place of a WebSocket would be cut off.", ("wsproto",)),
    Thing(
        "websocket",
        "close_sent",
        "A response in place of a WebSocket would hold a stop when it is complete.",
        ("websockets-sansio", "wsproto"),
    ),
    Thing(
        "websocket",
        "queue",
        "The handler of a WebSocket that is refused would get no disconnect.",
        ("websockets-sansio", "wsproto"),
    ),
    Thing(
        "websocket",
        "writable",
        "The handler of a WebSocket that is refused could send.",
        ("websockets-sansio", "wsproto"),
    ),
    Thing(
        "websocket",
        "ws_server.closing",
        "The handler of a WebSocket that is refused would not get 1012.",
        ("websockets",),
    ),
    Thing(
        "websocket",
        "recv",
        "The handler of a WebSocket that is refused would get no disconnect.",
        ("websockets",),
    ),
    Thing("websocket", "scope", "A WebSocket's handler that is cancelled would have no name in the report."),
    Thing("websocket", "logger", "A WebSocket's handler that is cancelled would leave a traceback in the log."),
    Thing("websocket", "handler_task", "The legacy protocol's task would outlive the server.", ("websockets",)),
    Thing(
        "websocket",
        "close_connection_task",
        "The legacy protocol's other task would outlive the server.",
        ("websockets",),
    ),
]
OF_STATE = [
    Thing("state", "connections", "No stop would know what is connected."),
    Thing("state", "tasks", "No stop would know a handler, to wait for it or to cancel it."),
    Thing("state", "default_headers", "No response would have a date or a server header."),
    Thing("state", "total_requests", "limit_max_requests would be no limit, and nothing would count as served."),
]
OF_SERVER = [
    Thing("server", "server_state", "Code that knows uvicorn would read the state of no server."),
    Thing("server", "started", "Code that knows uvicorn would wait for ever for the start."),
    Thing("server", "should_exit", "Code that knows uvicorn would set it, and nothing would stop."),
    Thing("server", "force_exit", "Code that knows uvicorn would set it, and nothing would be forced."),
    Thing("server", "serve", "Code that knows uvicorn would run it a second time, and not be refused."),
    Thing("server", "startup", "Code that knows uvicorn would start it a second time, and not be refused."),
    Thing("server", "shutdown", "Code that knows uvicorn would stop it without aioserve."),
]
if "limit_max_requests_jitter" in inspect.signature(uvicorn.Config).parameters:  # an older one has none
    OF_SERVER.append(Thing("server", "limit_max_requests", "limit_max_requests_jitter would be ignored."))
OF_CONFIG = [
    Thing("config", "load", "No app could be loaded."),
    Thing("config", "loaded", "A Config that is served twice would load its app twice."),
    Thing("config", "loaded_app", "There would be no app to run."),
    Thing("config", "http_protocol_class", "No connection could be made."),
    Thing("config", "encoded_headers", "The headers that were asked for would be in no response."),
    Thing("config", "ssl", "TLS would be plain text."),
    Thing("config", "asgi_version", "The scope of the app's lifespan would have no version of ASGI."),
]
PRESENT = [*OF_HTTP, *OF_WEBSOCKETS, *OF_STATE, *OF_SERVER, *OF_CONFIG]

OF_HTTP_ABSENT = [
    Thing("http", "pipeline", "It would be taken for httptools.", ("h11", "zttp")),
    Thing("http", "conn.trailing_data", "It would be taken for h11.", ("zttp",)),
]
OF_WEBSOCKETS_ABSENT = [
    Thing("websocket", "cycle", "A WebSocket would be taken for HTTP, and never be closed with 1012."),
]
OF_CONFIG_ABSENT = [
    Thing("config", "ssl", "An error in a key would be reported as an app that cannot be imported."),
]
ABSENT = [*OF_HTTP_ABSENT, *OF_WEBSOCKETS_ABSENT, *OF_CONFIG_ABSENT]


def each(things: Sequence[Thing], implementations: Sequence[str]) -> list[Any]:
    """Return every thing in every implementation that has to have it."""
    pairs = [(thing, name) for thing in things for name in implementations if name in (thing.only or implementations)]
    return [pytest.param(thing, name, id=f"{thing}-{name}") for thing, name in pairs]


def has(root: object, path: str) -> bool:
    for name in path.split("."):
        if not hasattr(root, name):
            return False
        root = getattr(root, name)
    return True


class Held(NamedTuple):
    """A request that its handler holds, until the block ends or `release()` is called."""

    server: Server
    connection: Connection
    protocol: Any
    state: Any
    release: Callable[[], None]


@asynccontextmanager
async def holding(http: str, **options: Any) -> AsyncIterator[Held]:
    app = App()
    async with serving(app, http=http, **options) as server, connect(server) as connection:
        connection.ask("/hold")
        await app.holding.wait()
        try:
            (protocol,) = server.uvicorn.server_state.connections
            yield Held(server, connection, protocol, server.uvicorn.server_state, app.release.set)
        finally:
            app.release.set()


@asynccontextmanager
async def websocket(ws: str) -> AsyncIterator[tuple[ClientConnection, Any, Any]]:
    """Open a WebSocket: yield the client's end, the server's, and uvicorn's state."""
    async with serving(App(), http="h11", ws=ws) as server:
        async with connect_websocket(server.url.replace("http", "ws"), proxy=None) as client:
            await client.send("hello")
            await client.recv()
            state: Any = server.uvicorn.server_state
            assert len(state.connections) == 1, "An upgraded connection would count twice, or a stop not know of it."
            (protocol,) = state.connections
            yield client, protocol, state


async def soon(happened: Callable[[], object]) -> bool:
    """Return whether it happens within some turns of the loop, in which everything sent on this machine is read."""
    for _ in range(_limits.BODY_TURNS + 50):
        if happened():
            return True
        await asyncio.sleep(0)
    return False


# What uvicorn has.


@pytest.mark.parametrize(("thing", "http"), each(OF_HTTP, HTTP))
async def test_http_protocol_has_what_is_relied_on(thing: Thing, http: str) -> None:
    async with holding(http) as held:
        assert has(held.protocol, thing.path), thing.breaks


@pytest.mark.parametrize(("thing", "http"), each(OF_HTTP_ABSENT, HTTP))
async def test_http_protocol_lacks_what_must_be_absent(thing: Thing, http: str) -> None:
    async with holding(http) as held:
        assert not has(held.protocol, thing.path), thing.breaks


@pytest.mark.parametrize(("thing", "ws"), each(OF_WEBSOCKETS, WEBSOCKETS))
async def test_websocket_protocol_has_what_is_relied_on(thing: Thing, ws: str) -> None:
    async with websocket(ws) as (_, protocol, _):
        assert has(protocol, thing.path), thing.breaks


@pytest.mark.parametrize(("thing", "ws"), each(OF_WEBSOCKETS_ABSENT, WEBSOCKETS))
async def test_websocket_protocol_lacks_what_must_be_absent(thing: Thing, ws: str) -> None:
    async with websocket(ws) as (_, protocol, _):
        assert not has(protocol, thing.path), thing.breaks


@pytest.mark.parametrize("thing", [*OF_STATE, *OF_SERVER, *OF_CONFIG], ids=str)
def test_state_server_and_config_have_what_is_relied_on(thing: Thing) -> None:
    config = uvicorn.Config(App, factory=True, log_config=None)
    config.load()
    roots = {"state": ServerState(), "server": uvicorn.Server(config), "config": config}
    assert has(roots[thing.of], thing.path), thing.breaks


@pytest.mark.parametrize("thing", OF_CONFIG_ABSENT, ids=str)
def test_config_that_is_not_loaded_lacks_what_must_be_absent(thing: Thing) -> None:
    assert not has(uvicorn.Config(App, log_config=None), thing.path), thing.breaks


# What uvicorn does.


@pytest.fixture
def noticed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Record the connections that are added and removed, as the engine notices them."""
    noticed: list[tuple[str, Any]] = []
    for name in ("connection_added", "connection_removed"):
        noticing = getattr(Connections, name)

        def notice(connections: Any, connection: Any, name: str = name, noticing: Any = noticing) -> None:
            noticed.append((name, connection))
            noticing(connections, connection)

        monkeypatch.setattr(Connections, name, notice)
    return noticed


ADDED = "A new connection would not be noticed: it would have no date, and would not be closed by a stop."
REMOVED = "A closed connection would not be noticed: a stop would wait for it, and its timer would be left."


@pytest.mark.parametrize("http", HTTP)
async def test_http_protocol_calls_add_and_discard_of_connections(http: str, noticed: list[tuple[str, Any]]) -> None:
    async with holding(http) as held:
        assert held.protocol in held.state.connections, ADDED
        assert noticed == [("connection_added", held.protocol)], ADDED
        held.release()
        await held.connection.answer()
        held.connection.writer.close()
        assert await soon(lambda: not held.state.connections), REMOVED
        assert ("connection_removed", held.protocol) in noticed, REMOVED


@pytest.mark.parametrize("ws", WEBSOCKETS)
async def test_websocket_protocol_calls_add_and_remove_of_connections(ws: str, noticed: list[tuple[str, Any]]) -> None:
    async with websocket(ws) as (client, protocol, state):
        assert ("connection_added", protocol) in noticed, ADDED
        assert noticed[1] == ("connection_removed", noticed[0][1]), REMOVED  # HTTP, at the upgrade
        await client.close()
        assert await soon(lambda: not state.connections), REMOVED
        assert ("connection_removed", protocol) in noticed, REMOVED


@pytest.mark.parametrize("http", HTTP)
async def test_http_protocol_counts_its_task_and_response(http: str) -> None:
    async with holding(http) as held:
        assert len(held.state.tasks) == 1, "No stop would know the handler."
        assert held.state.total_requests == 0, "limit_max_requests would close before the last request is answered."
        held.release()
        await held.connection.answer()
        assert held.state.total_requests == 1, "limit_max_requests would be no limit."
        assert await soon(lambda: not held.state.tasks), "A stop would wait for a handler that is done."


@pytest.mark.parametrize("ws", WEBSOCKETS)
async def test_websocket_protocol_counts_its_task(ws: str) -> None:
    async with websocket(ws) as (client, _, state):
        assert len(state.tasks) == 1, "No stop would know the handler."
        await client.close()
        assert await soon(lambda: not state.tasks), "A stop would wait for a handler that is done."


def class_of(http: str) -> type[Any]:
    found: type[Any] = import_from_string(HTTP_PROTOCOLS[http])
    return found


@pytest.mark.parametrize("http", HTTP)
async def test_task_of_a_request_leads_to_its_cycle(http: str) -> None:
    async with holding(http) as held:
        (task,) = held.state.tasks
        frame = task.get_coro().cr_frame
        assert frame.f_code.co_name == "run_asgi", "No handler would be known as one while it starts, nor be described."
        assert frame.f_locals["self"] is held.protocol.cycle, "The report could not say which request was cancelled."


@pytest.mark.parametrize("ws", WEBSOCKETS)
async def test_task_of_a_websocket_leads_to_its_protocol(ws: str) -> None:
    async with websocket(ws) as (_, protocol, state):
        (task,) = state.tasks
        frame = task.get_coro().cr_frame
        assert frame.f_code.co_name == "run_asgi", "No handler would be known as one while it starts, nor be described."
        assert frame.f_locals["self"] is protocol, "The report could not say which WebSocket was cancelled."


@pytest.mark.parametrize("http", HTTP)
def test_http_protocol_takes_the_arguments_that_are_passed(http: str) -> None:
    taken = set(inspect.signature(class_of(http)).parameters)
    assert {"config", "server_state", "app_state", "_loop"} <= taken, "No connection could be made."


@pytest.mark.parametrize("http", HTTP)
async def test_keep_alive_timer_ends_when_bytes_arrive(http: str) -> None:
    async with holding(http) as held:
        assert held.protocol.timeout_keep_alive_task is None, "A request in flight would be timed out."
        held.release()
        await held.connection.answer()
        timer = held.protocol.timeout_keep_alive_task
        assert has(timer, "cancel"), "The timer that a lost connection leaves could not be cancelled."
        held.connection.writer.write(b"GET / ")
        assert await soon(lambda: held.protocol.timeout_keep_alive_task is None), (
            "With zttp, the part of a request that has arrived would be discarded by a stop."
        )


BEGUN: dict[str, Callable[[Any], bool]] = {
    "h11": lambda protocol: bool(protocol.conn.trailing_data[0]),
    "httptools": lambda protocol: protocol.scope is not (protocol.cycle and protocol.cycle.scope),
}


@pytest.mark.parametrize("http", BEGUN)
async def test_part_of_a_request_that_has_arrived_can_be_seen(http: str) -> None:
    begun = BEGUN[http]
    async with holding(http) as held:
        held.release()
        await held.connection.answer()
        assert not begun(held.protocol), "An idle connection would delay a stop."
        held.connection.writer.write(b"GET / ")
        assert await soon(lambda: begun(held.protocol)), (
            "A request of which a part has arrived would be cut off by a stop."
        )

        async with connect(held.server) as fresh:
            await soon(lambda: len(held.state.connections) == 2)
            (protocol,) = held.state.connections - {held.protocol}
            assert not begun(protocol), "A connection that has sent nothing would delay a stop."
            fresh.writer.write(b"GET / ")
            assert await soon(lambda: begun(protocol)), (
                "A first request of which a part has arrived would be cut off by a stop."
            )


@pytest.mark.parametrize("http", ["h11", "httptools"])
async def test_pipelined_requests_that_wait_can_be_seen(http: str) -> None:
    breaks = "A response would have connection: close, and more requests would be answered on the connection."
    async with holding(http) as held:
        held.connection.ask("/")
        if http == "httptools":
            assert await soon(lambda: held.protocol.pipeline), breaks
            ((cycle, _app),) = held.protocol.pipeline
            assert has(cycle, "default_headers"), "Pipelined requests would be answered without connection: close."
        else:
            assert await soon(lambda: held.protocol.conn.trailing_data[0]), breaks
            assert not held.protocol.cycle.more_body, breaks


@pytest.mark.parametrize("http", HTTP)
async def test_each_request_reads_the_server_state_of_its_protocol(http: str) -> None:
    async with holding(http) as held:
        held.release()
        await held.connection.answer()
        held.protocol.server_state = state = ServerState()
        state.default_headers = [(b"x-from", b"canary")]
        held.connection.ask("/")
        answer = await held.connection.answer()
        assert b"x-from: canary" in answer, (
            "Requests that begin during a stop would be answered without connection: close."
        )
        assert state.total_requests == 1, "A connection would not be looked at again after its last response."


@pytest.mark.parametrize("http", HTTP)
async def test_default_headers_are_read_when_the_response_begins(http: str) -> None:
    async with holding(http) as held:
        held.protocol.cycle.default_headers = [(b"x-from", b"canary")]
        held.release()
        answer = await held.connection.answer()
        assert b"x-from: canary" in answer, "A request in flight at a stop would be answered without connection: close."


@pytest.mark.parametrize("waits", [False, True], ids=["busy", "waiting"])
@pytest.mark.parametrize("http", HTTP)
async def test_receive_can_return_a_disconnect_while_send_works(http: str, waits: bool) -> None:
    received = []
    go_on = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if not waits:
            await go_on.wait()
        received.append(await receive())
        received.append(await receive())
        await without_lifespan(scope, receive, send)

    async with serving(app, http=http, lifespan="off") as server, connect(server) as connection:
        connection.writer.write(b"POST / HTTP/1.1\r\nhost: test\r\ncontent-length: 9\r\n\r\npart")
        engine: Any = server.uvicorn
        assert await soon(lambda: engine.server_state.tasks)
        if waits:
            await soon(lambda: received)
        (protocol,) = engine.server_state.connections
        breaks = "A handler that waits in receive() would get no disconnect, and be cancelled."
        assert "disconnected" in vars(protocol.cycle), breaks
        server._engine.connections.disconnect_handlers()
        go_on.set()
        assert await soon(lambda: len(received) == 2), breaks
        assert received[0] == {"type": "http.request", "body": b"part", "more_body": True}, (
            "The part of a request's body that has arrived would be lost when its handler gets a disconnect."
        )
        assert received[1] == {"type": "http.disconnect"}, breaks
        assert await soon(lambda: protocol.cycle.response_complete), "A handler that gets a disconnect could not send."
        assert (await connection.answer()).startswith(b"HTTP/1.1 200"), (
            "A handler that gets a disconnect could not send."
        )


@pytest.mark.parametrize("http", HTTP)
async def test_shutdown_of_an_http_protocol_closes_only_idle_connections(http: str) -> None:
    async with holding(http) as held:
        held.protocol.shutdown()
        assert not held.protocol.transport.is_closing(), "A stop would cut off the requests in flight."
        held.release()
        assert (await held.connection.rest()).endswith(b"hello"), "A stop would wait for a connection that goes on."
    async with holding(http) as held:
        held.release()
        await held.connection.answer()
        held.protocol.shutdown()
        assert held.protocol.transport.is_closing(), "A stop would wait for the clients to close."


@pytest.mark.parametrize("ws", WEBSOCKETS)
async def test_shutdown_of_a_websocket_protocol_closes_with_1012(ws: str) -> None:
    async with websocket(ws) as (client, protocol, _):
        protocol.shutdown()
        await client.wait_closed()
        assert client.close_code == 1012, "The clients of WebSockets would not know that they may connect again."


@pytest.mark.parametrize("ws", WEBSOCKETS)
async def test_websocket_that_is_not_accepted_can_be_refused(ws: str, caplog: pytest.LogCaptureFixture) -> None:
    received: list[Any] = []
    accepting = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        received.append(await receive())
        accepting.set()
        await send({"type": "websocket.accept"})

    async with serving(app, ws=ws, lifespan="off") as server, connect(server) as client:
        client.writer.write(UPGRADE)
        state: Any = server.uvicorn.server_state
        assert await soon(lambda: state.tasks)
        (protocol,) = state.connections
        breaks = "A WebSocket that is not accepted when a stop begins would not be refused with 503."
        assert connection_state(protocol) == "opening", breaks
        refuse(protocol)
        assert (await client.rest()).startswith(b"HTTP/1.1 503"), breaks
        await accepting.wait()
        assert received[0]["code"] == 1012, "The handler of a WebSocket that is refused would get no disconnect."
        assert await soon(lambda: not state.tasks), "The handler of a WebSocket that is refused would hold a stop."
    assert issubclass(ClientDisconnected, OSError), "The handler of a WebSocket that is refused would not know it."
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == [], (
        "A handler that accepts a WebSocket too late would leave a traceback in the log."
    )


async def test_legacy_websocket_protocol_runs_tasks_of_its_own() -> None:
    async with websocket("websockets") as (_, protocol, _):
        for task in (protocol.handler_task, protocol.close_connection_task):
            assert isinstance(task, asyncio.Task), "They would outlive the server."


@pytest.mark.parametrize("http", HTTP)
async def test_access_log_is_an_attribute_of_the_protocol(http: str) -> None:
    async with holding(http, access_log=False) as held:
        assert held.protocol.cycle.access_log is False, "access_log=False would silence nothing."


@pytest.mark.parametrize("http", HTTP)
async def test_exception_of_a_handler_is_logged_by_the_logger_of_its_cycle(
    http: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As `exc_info`."""
    async with holding(http) as held:
        errors: list[Any] = []
        held.protocol.cycle.logger = logging.Logger("of the cycle")
        held.protocol.cycle.logger.error = lambda *_, **named: errors.append(named.get("exc_info"))
        (task,) = held.protocol.tasks
        task.cancel()
        await soon(lambda: bool(errors))
        assert [type(each) for each in errors] == [asyncio.CancelledError], "A second Ctrl+C would be ignored."


# How apps are loaded, and protocols chosen.


def test_system_exit_of_config_load_has_its_reason_as_context(caplog: pytest.LogCaptureFixture) -> None:
    """uvicorn exits when a factory takes arguments, and logs the reason; here it is an error like any other."""

    def factory(argument: object) -> None:
        """Take an argument that is not given."""

    config = uvicorn.Config(factory, factory=True, log_config=None)
    with pytest.raises(SystemExit) as exiting:
        config.load()
    assert isinstance(exiting.value.__context__, TypeError), "A StartupError would not say why."


def test_import_from_string_returns_what_is_no_string() -> None:
    app = App()
    assert import_from_string(app) is app, "Only apps that are import strings could be loaded."


def test_middleware_of_uvicorn_has_the_app_as_an_attribute() -> None:
    app = App()
    config = uvicorn.Config(app, log_config=None)
    config.load()
    loaded = config.loaded_app
    assert type(loaded).__module__.startswith("uvicorn.middleware."), "What an app is could not be seen at its start."
    assert getattr(loaded, "app", None) is app, "No app could be loaded."


def test_proxy_headers_middleware_has_an_app_and_trusted_hosts() -> None:
    app: Any = App()
    middleware = ProxyHeadersMiddleware(app, "127.0.0.1")
    assert vars(middleware).keys() == {"app", "trusted_hosts"}, "A copied Config would have another middleware."


def test_logging_config_has_a_handler_for_the_access_log() -> None:
    assert "stream" in LOGGING_CONFIG["handlers"]["access"], "The command line would log to standard output."
    assert LOGGING_CONFIG["formatters"], "The command line would not know whether to use colours."


def test_limit_max_requests_of_a_server_has_the_jitter_in_it() -> None:
    if "limit_max_requests_jitter" not in inspect.signature(uvicorn.Config).parameters:
        pytest.skip("this uvicorn has no jitter")
    config = uvicorn.Config(App(), limit_max_requests=100, limit_max_requests_jitter=10, log_config=None)
    limits = {uvicorn.Server(config).limit_max_requests for _ in range(100)}
    assert limits <= set(range(100, 111)), "The limit of requests would not be the one that was asked for."
    assert len(limits) > 1, "There would be no jitter."


@pytest.mark.parametrize(("option", "protocols"), [("http", HTTP_PROTOCOLS), ("ws", WS_PROTOCOLS)])
def test_every_protocol_of_uvicorn_is_known(option: str, protocols: dict[str, Any]) -> None:
    assert set(protocols) <= set(_options._CHOICES[option]), "A new protocol would be refused: find out what it does."


@pytest.mark.parametrize(
    ("option", "protocols", "name"),
    [*(("http", HTTP_PROTOCOLS, name) for name in HTTP), *(("ws", WS_PROTOCOLS, name) for name in WEBSOCKETS)],
)
def test_protocol_behind_auto_can_be_chosen(
    option: str, protocols: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is what the options of these tests rely on."""
    monkeypatch.setitem(protocols, "auto", protocols[name])
    config = uvicorn.Config(App, factory=True, log_config=None)
    config.load()
    chosen = getattr(config, f"{option}_protocol_class")
    assert chosen is import_from_string(protocols[name]), f"The tests' --{option} would choose nothing."


# The tables of this file.


@pytest.mark.parametrize("things", [PRESENT, ABSENT], ids=["present", "absent"])
def test_everything_that_is_relied_on_is_listed_once_with_a_reason(things: list[Thing]) -> None:
    assert len({str(thing) for thing in things}) == len(things)
    files = [
        Path(_connections.__file__),
        Path(_engine.__file__),
        *Path(aioserve._uvicorn.__file__).parent.glob("[!_]*.py"),
    ]
    code = "".join(file.read_text() for file in files)
    for thing in things:
        assert re.search(rf"\b{thing.path.rpartition('.')[2]}\b", code), f"{thing}: nothing relies on it any more"
        assert re.fullmatch(r"\S.*\.", thing.breaks), f"{thing}: what breaks without it?"
        assert set(thing.only) <= {"h11", "httptools", "zttp", "websockets", "websockets-sansio", "wsproto"}


def test_everything_that_the_folder_for_uvicorn_says_it_relies_on_is_tested() -> None:
    here = Path(__file__).read_text()
    said, _, _ = (inspect.getdoc(aioserve._uvicorn) or "").partition("\naioserve has")
    names = re.findall(r"`[\w.]*?(\w+)(?:\(\w*\))?`", said)
    assert names
    for name in names:
        assert re.search(rf"(\b|_){name}(\b|_)", here), f"{name}: nothing here looks at it"
