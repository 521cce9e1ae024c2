"""
WebSockets that their app has not accepted when the server stops: the client gets a 503, the handler a disconnect.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket
from uvicorn.config import WS_PROTOCOLS

from aioserve import Server, serving, start
from tests.conftest import LOOPS
from tests.helpers.apps import Message, Receive, Scope, Send
from tests.helpers.clients import UPGRADE, Connection, connect, connect_tls
from tests.helpers.turns import MOMENT, turns

pytestmark = pytest.mark.usefixtures("short_grace")

each_protocol = pytest.mark.parametrize("ws", sorted(WS_PROTOCOLS.keys() - {"auto", "none"}))

GONE = {"type": "websocket.disconnect", "code": 1012}


class Opening:
    """An app that does something in place of accepting a WebSocket."""

    def __init__(self, handle: Callable[[Opening, Receive, Send], Awaitable[None]]) -> None:
        self._handle = handle
        self.received: list[Message] = []
        self.is_in = asyncio.Event()
        self.release = asyncio.Event()
        self.error: BaseException | None = None
        self.has_answered = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "websocket"
        self.is_in.set()

        async def recording() -> Message:
            message = await receive()
            self.received.append({name: value for name, value in message.items() if name != "reason"})
            return message

        try:
            await self._handle(self, recording, send)
        except BaseException as exc:
            self.error = exc
            raise


@asynccontextmanager
async def opening(app: Opening, **options: Any) -> AsyncIterator[tuple[Server, Connection]]:
    """Ask for a WebSocket, whose handler has begun."""
    server = await start(app, lifespan="off", **options)
    async with server, connect(server) as client:
        client.writer.write(UPGRADE)
        await app.is_in.wait()
        await turns()
        yield server, client


def is_refusal(answer: bytes) -> bool:
    """Whether it is the whole 503, and nothing else."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *headers = head.lower().split(b"\r\n")
    expected = {b"connection: close", b"retry-after: 0", b"content-length: %d" % len(body)}
    return status == b"http/1.1 503 service unavailable" and expected <= set(headers) and len(body) > 0


def nothing_is_wrong(server: Server, caplog: pytest.LogCaptureFixture) -> bool:
    report = server.report
    noted = [record for record in caplog.records if record.levelno >= logging.WARNING]
    return report is not None and not report.was_forced and not noted


async def receives(app: Opening, receive: Receive, send: Send) -> None:
    await receive()
    await receive()


async def receives_late(app: Opening, receive: Receive, send: Send) -> None:
    await app.release.wait()
    await receive()
    await receive()


@each_protocol
@pytest.mark.parametrize("handle", [receives, receives_late])
async def test_websocket_that_is_not_accepted_gets_503_and_its_handler_a_disconnect(
    ws: str, handle: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """There is no budget here that could end it."""
    app = Opening(handle)
    async with opening(app, ws=ws, shutdown_timeout=None) as (server, client):
        closing = asyncio.create_task(server.aclose())
        assert is_refusal(await client.rest())
        app.release.set()
        await closing
    assert app.received == [{"type": "websocket.connect"}, GONE]
    assert app.error is None
    assert nothing_is_wrong(server, caplog)


class Spy:
    """A transport that also remembers what is written."""

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self.written: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        self.written.append(data)
        self._transport.write(data)


@each_protocol
@pytest.mark.parametrize("error", [None, ValueError("the app's own")], ids=["returns", "raises"])
async def test_nothing_is_written_behind_the_503(ws: str, error: Exception | None) -> None:
    """Where the transport cannot send at once, it would go to the client."""

    async def handle(app: Opening, receive: Receive, send: Send) -> None:
        await receives(app, receive, send)
        if error is not None:
            raise error

    app = Opening(handle)
    async with opening(app, ws=ws, shutdown_timeout=None) as (server, client):
        (protocol,) = server.uvicorn.server_state.connections
        protocol.transport = spy = Spy(protocol.transport)  # type: ignore[assignment]
        server.close()
        assert is_refusal(await client.rest())
    assert is_refusal(b"".join(spy.written))


MESSAGES: list[Message] = [
    {"type": "websocket.accept"},
    {"type": "websocket.close"},
    {"type": "websocket.send", "text": "hello"},
    {"type": "websocket.http.response.start", "status": 401, "headers": []},
    {"type": "websocket.http.response.body", "body": b"no"},
]


@each_protocol
@pytest.mark.parametrize("message", MESSAGES, ids=[message["type"] for message in MESSAGES])
@pytest.mark.parametrize("first", [0, 2], ids=["at once", "after the disconnect"])
@pytest.mark.parametrize("later", [False, True], ids=["before the connection is lost", "afterwards"])
async def test_every_send_to_a_websocket_that_was_refused_by_the_stop_is_an_os_error(
    ws: str, message: Message, first: int, later: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """As ASGI says of a client that has gone; and it is not logged as a mistake of the app's."""

    async def handle(app: Opening, receive: Receive, send: Send) -> None:
        if first:
            await receive()
            await receive()
        else:
            await app.release.wait()
        if later:
            await turns()
        for _ in range(2):
            with pytest.raises(OSError):
                await send(message)
        await send(message)

    app = Opening(handle)
    async with opening(app, ws=ws, shutdown_timeout=None) as (server, client):
        asyncio.get_running_loop().call_soon(server.close)
        await server.stopping.wait()
        await turns(6)
        app.release.set()
        assert is_refusal(await client.rest())
    assert isinstance(app.error, OSError)
    assert nothing_is_wrong(server, caplog)


@each_protocol
async def test_os_error_of_a_refused_websocket_is_not_logged_from_a_task_group(
    ws: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Where it comes in a group."""

    async def handle(app: Opening, receive: Receive, send: Send) -> None:
        await receive()
        await app.release.wait()
        async with asyncio.TaskGroup() as group:
            group.create_task(receive())  # type: ignore[arg-type]  # it is a coroutine
            group.create_task(send({"type": "websocket.accept"}))  # type: ignore[arg-type]

    app = Opening(handle)
    async with opening(app, ws=ws, shutdown_timeout=None) as (server, client):
        server.close()
        assert is_refusal(await client.rest())
        app.release.set()
    assert isinstance(app.error, BaseExceptionGroup)
    assert nothing_is_wrong(server, caplog)


@each_protocol
async def test_mistake_of_a_refused_websockets_handler_is_still_logged(
    ws: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Only what the stop causes is silenced."""

    async def handle(app: Opening, receive: Receive, send: Send) -> None:
        await receive()
        await receive()
        raise ValueError("the app's own")

    async with opening(Opening(handle), ws=ws, shutdown_timeout=None) as (server, client):
        server.close()
        assert is_refusal(await client.rest())
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], ValueError)


@each_protocol
async def test_websocket_of_starlette_that_is_not_accepted_is_refused_quietly(
    ws: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It looks something up before it accepts, and is late."""
    is_in, release = asyncio.Event(), asyncio.Event()

    async def endpoint(websocket: WebSocket) -> None:
        is_in.set()
        await release.wait()
        await websocket.accept()
        raise AssertionError

    app = Starlette(routes=[WebSocketRoute("/", endpoint)])
    async with serving(app, ws=ws, shutdown_timeout=None) as server, connect(server) as client:
        client.writer.write(UPGRADE)
        await is_in.wait()
        server.close()
        assert is_refusal(await client.rest())
        release.set()
    assert nothing_is_wrong(server, caplog)


@each_protocol
async def test_websocket_over_tls_that_is_not_accepted_gets_503(
    ws: str, tls: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """As in clear text."""
    options, context = tls
    app = Opening(receives)
    server = await start(app, lifespan="off", ws=ws, shutdown_timeout=None, **options)
    async with connect_tls(server, context) as client:
        client.writer.write(UPGRADE)
        await app.is_in.wait()
        await server.aclose()
        assert is_refusal(await client.rest())
    assert app.received == [{"type": "websocket.connect"}, GONE]
    assert nothing_is_wrong(server, caplog)


@each_protocol
async def test_websocket_that_is_not_accepted_gets_503_in_a_forced_stop(
    ws: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A handler that ends with the disconnect needs no force."""
    app = Opening(receives)
    async with opening(app, ws=ws) as (server, client):
        server.close(timeout=0)
        await server.wait_closed()
        assert is_refusal(await client.rest())
    assert app.received == [{"type": "websocket.connect"}, GONE]
    assert nothing_is_wrong(server, caplog)


@each_protocol
async def test_handler_of_a_refused_websocket_that_does_not_end_is_cancelled(
    ws: str, caplog: pytest.LogCaptureFixture
) -> None:
    """When the budget is over; its client has had its 503 long before."""

    async def handle(app: Opening, receive: Receive, send: Send) -> None:
        await app.release.wait()

    app = Opening(handle)
    async with opening(app, ws=ws, shutdown_timeout=MOMENT) as (server, client):
        closing = asyncio.create_task(server.aclose())
        assert is_refusal(await client.rest())
        await closing
    assert isinstance(app.error, asyncio.CancelledError)
    assert server.report is not None
    assert (len(server.report.cancelled), server.report.aborted) == (1, 0)
    assert [record.name for record in caplog.records if record.levelno >= logging.WARNING] == ["aioserve"]


async def accepts(app: Opening, receive: Receive, send: Send) -> None:
    await receive()
    await send({"type": "websocket.accept"})
    app.has_answered = True
    await receive()


async def closes(app: Opening, receive: Receive, send: Send) -> None:
    await receive()
    await send({"type": "websocket.close"})
    app.has_answered = True


async def denies(app: Opening, receive: Receive, send: Send) -> None:
    await receive()
    await send({"type": "websocket.http.response.start", "status": 401, "headers": [(b"content-length", b"2")]})
    await send({"type": "websocket.http.response.body", "body": b"no"})
    app.has_answered = True
    await turns(5)  # websockets-sansio takes it for incomplete before the connection is lost


@each_protocol
@pytest.mark.parametrize(("handle", "status"), [(accepts, b"101"), (closes, b"403"), (denies, b"401")])
@pytest.mark.parametrize("count", range(9))
async def test_websocket_is_answered_once_whenever_the_stop_comes(
    ws: str, handle: Any, status: bytes, count: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The app answers so many turns of the loop after the stop was asked for, or the stop does."""

    async def later(app: Opening, receive: Receive, send: Send) -> None:
        closing.append(asyncio.create_task(server.aclose()))
        await turns(count)
        await handle(app, receive, send)

    closing: list[asyncio.Task[None]] = []
    app = Opening(later)
    server = await start(app, lifespan="off", ws=ws, shutdown_timeout=None)
    async with connect(server) as client:
        client.writer.write(UPGRADE)
        answer = await client.rest()
        assert answer.startswith(b"HTTP/1.1 " + status) == app.has_answered
        assert is_refusal(answer) != app.has_answered
        assert answer.count(b"HTTP/1.1") == 1
        assert answer.endswith(b"no") == (b"HTTP/1.1 401" in answer)
        assert (b"\x88\x02\x03\xf4" in answer) == (b"HTTP/1.1 101" in answer)  # the close frame with 1012
        assert app.has_answered or count > 2
        await closing[0]
    assert nothing_is_wrong(server, caplog)


@pytest.mark.parametrize("ws", sorted(WS_PROTOCOLS.keys() - {"auto", "none", "websockets"}))
@pytest.mark.parametrize("waits", [False, True], ids=["sends on", "waits for the disconnect"])
async def test_response_in_place_of_a_websocket_that_has_begun_is_completed(
    ws: str, waits: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """As any response in flight. (The legacy protocol sends what there is in the step in which it begins.)"""

    async def handle(app: Opening, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.http.response.start", "status": 401, "headers": [(b"content-length", b"6")]})
        await send({"type": "websocket.http.response.body", "body": b"not", "more_body": True})
        if waits:
            await receive()
        await app.release.wait()
        await send({"type": "websocket.http.response.body", "body": b"now"})

    app = Opening(handle)
    async with opening(app, ws=ws, shutdown_timeout=None, disconnect_after=0) as (server, client):
        closing = asyncio.create_task(server.aclose())
        await turns()
        assert not closing.done()
        app.release.set()
        assert (await client.rest()).endswith(b"notnow")
        await closing
    assert app.received == ([{"type": "websocket.connect"}, GONE] if waits else [{"type": "websocket.connect"}])
    assert nothing_is_wrong(server, caplog)


@pytest.mark.parametrize("ws", sorted(WS_PROTOCOLS.keys() - {"auto", "none", "websockets"}))
async def test_response_in_place_of_a_websocket_that_is_left_unfinished_is_no_mistake_of_the_apps(
    ws: str, caplog: pytest.LogCaptureFixture
) -> None:
    """If its handler was told of a disconnect."""

    async def handle(app: Opening, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.http.response.start", "status": 401, "headers": [(b"content-length", b"6")]})
        await send({"type": "websocket.http.response.body", "body": b"not", "more_body": True})
        await receive()

    app = Opening(handle)
    async with opening(app, ws=ws, shutdown_timeout=None, disconnect_after=0) as (server, client):
        server.close()
        assert not (await client.rest()).endswith(b"now")
    assert app.received == [{"type": "websocket.connect"}, GONE]
    assert nothing_is_wrong(server, caplog)


@each_protocol
@pytest.mark.parametrize("loop_name", [name for name in ("asyncio", "eager", "uvloop") if name in LOOPS])
async def test_websocket_that_is_asked_for_during_the_stop_may_still_be_accepted(ws: str) -> None:
    """Its app has the same few turns of the loop for that; then it is closed with 1012."""
    server = await start(Opening(accepts), lifespan="off", ws=ws, shutdown_timeout=None)
    async with connect(server) as client:
        await turns()
        closing = asyncio.create_task(server.aclose())
        await turns()
        client.writer.write(UPGRADE)
        answer = await client.rest()
        assert answer.startswith(b"HTTP/1.1 101")
        assert answer.endswith(b"\x88\x02\x03\xf4")
        await closing


@each_protocol
async def test_websocket_that_is_asked_for_during_the_stop_gets_503_if_it_is_not_accepted(
    ws: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As one that was asked for before."""
    app = Opening(receives)
    server = await start(app, lifespan="off", ws=ws, shutdown_timeout=None)
    async with connect(server) as client:
        await turns()
        closing = asyncio.create_task(server.aclose())
        await turns()
        client.writer.write(UPGRADE)
        assert is_refusal(await client.rest())
        await closing
    assert app.received == [{"type": "websocket.connect"}, GONE]
    assert nothing_is_wrong(server, caplog)


@each_protocol
async def test_refused_websocket_is_no_obstacle_to_other_requests(ws: str) -> None:
    """They run on within the budget."""
    release, waiting = asyncio.Event(), Opening(receives)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await waiting(scope, receive, send)
            return
        await release.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"hello"})

    server = await start(app, lifespan="off", ws=ws, shutdown_timeout=None)
    async with httpx.AsyncClient(base_url=server.url, trust_env=False) as http, connect(server) as client:
        asking = asyncio.create_task(http.get("/"))
        client.writer.write(UPGRADE)
        await waiting.is_in.wait()
        await turns()
        closing = asyncio.create_task(server.aclose())
        assert is_refusal(await client.rest())
        release.set()
        assert (await asking).text == "hello"
        await closing
