"""
What leaves the app is raised by the request of `aioserve.testing.client()` that has caused it.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import httpx2
import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from uvicorn.config import HTTP_PROTOCOLS, WS_PROTOCOLS

from aioserve import _limits, start, testing
from aioserve.testing import app_errors
from tests.helpers import not_portable
from tests.helpers.apps import AppError, Message, Receive, Scope, Send
from tests.helpers.clients import get
from tests.helpers.threads import in_thread

START: Message = {"type": "http.response.start", "status": 200, "headers": []}
PART: Message = {"type": "http.response.body", "body": b"part", "more_body": True}
END: Message = {"type": "http.response.body", "body": b"end"}


class Raises:
    """Raises an exception of its own for each path; the query is how many messages it sends before."""

    def __init__(self) -> None:
        self.raised: dict[str, AppError] = {}
        self.scopes: list[Scope] = []
        self.release = asyncio.Event()
        self.release.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return
        self.scopes.append(scope)
        for message in [START, PART, END][: int(scope["query_string"] or 0)]:
            await send(message)
        await self.release.wait()
        self.raised[scope["path"]] = error = AppError(scope["path"])
        raise error


@pytest.fixture(
    params=["tcp", "tls", *(pytest.param(each, marks=not_portable.unix_sockets) for each in ("unix", "unix tls"))]
)
def where(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    options: dict[str, Any] = {"uds": str(tmp_path / "socket")} if "unix" in request.param else {}
    return {**options, "ssl": testing.tls().server} if "tls" in request.param else options


async def raised_by(client: Any, url: str) -> AppError:
    with pytest.raises(AppError) as caught:
        await client.get(url)
    return caught.value


@pytest.mark.parametrize("http", sorted(HTTP_PROTOCOLS.keys() - {"auto"}))
@pytest.mark.parametrize("client_class", [httpx.AsyncClient, httpx2.AsyncClient])
async def test_exception_of_the_app_is_raised_by_its_own_request(
    where: dict[str, Any], http: Any, client_class: Any
) -> None:
    """The very object, untouched: before, in and after the response, with many requests at a time, on one client."""
    app = Raises()
    async with testing.server(app, http=http, **where) as server:
        async with testing.client(server, client_class=client_class) as client:
            for sent in range(4):
                urls = [f"/{sent}-{number}?{sent}" for number in range(20)]
                caught = await asyncio.gather(*[raised_by(client, url) for url in urls])
                for url, error in zip(urls, caught, strict=True):
                    assert error is app.raised[url.partition("?")[0]]
                    assert error.__cause__ is error.__context__ is None
    assert not app_errors._sent
    assert not app_errors._running
    assert not app_errors._untaken


@not_portable.unix_sockets
async def test_client_uses_the_first_listener(tmp_path: Path) -> None:
    """And raises what leaves the app."""
    app = Raises()
    async with testing.server(app, port=0, uds=tmp_path / "app.sock") as server, testing.client(server) as client:
        assert str(client.base_url) == server.url == f"http://127.0.0.1:{server.port}"
        assert await raised_by(client, "/") is app.raised["/"]
    with socket.socket() as lent:
        lent.bind(("127.0.0.1", 0))
        async with testing.server(app, uds=tmp_path / "app.sock", sockets=[lent]) as server:
            assert server.port == lent.getsockname()[1]
            async with testing.client(server) as client:
                assert await raised_by(client, "/unix") is app.raised["/unix"]
            assert app.scopes[-1]["client"] is None


@pytest.mark.parametrize("sent", [1, 2])
async def test_exception_of_the_app_takes_the_place_of_a_broken_connection(sent: int) -> None:
    """Where a part of the response had been read before."""
    app = Raises()
    app.release.clear()
    async with testing.client(app) as client, client.stream("GET", f"/?{sent}") as response:
        assert response.status_code == 200
        app.release.set()
        with pytest.raises(AppError) as caught:
            await response.aread()
        assert caught.value is app.raised["/"]
        assert caught.value.__context__ is None


@pytest.mark.parametrize("client_class", [httpx.AsyncClient, httpx2.AsyncClient])
async def test_exception_is_raised_where_the_client_is_still_sending(client_class: Any) -> None:
    """The connection is closed before all of the request was sent; the 500 may be lost then."""
    app = Raises()
    async with testing.server(app) as server:
        async with testing.client(server, client_class=client_class) as client:
            with pytest.raises(AppError) as caught:
                await client.post("/", content=bytes(50_000_000))
            assert caught.value is app.raised["/"]
            assert caught.value.__context__ is None


async def test_exception_after_a_complete_response_is_not_waited_for() -> None:
    """It is shown in the report of a test that fails."""
    app = Raises()
    app.release.clear()
    async with testing.client(app) as client:
        assert (await client.get("/late?3")).text == "partend"
        app.release.set()
    (shown,) = app_errors._untaken
    assert shown.startswith("GET '/late'\nTraceback")
    assert shown.endswith("AppError: /late\n")
    app_errors._untaken.clear()


async def test_exceptions_are_not_raised_where_that_is_not_asked_for() -> None:
    """The client gets what any other gets; the report shows them."""
    async with testing.client(Raises(), raise_app_exceptions=False) as client:
        assert (await client.get("/")).status_code == 500
        with pytest.raises(httpx2.RemoteProtocolError):
            await client.get("/?2")
    assert [each.splitlines()[-1] for each in app_errors._untaken] == ["tests.helpers.apps.AppError: /"] * 2
    app_errors._untaken.clear()


async def test_client_of_any_server_raises() -> None:
    """Also of one that was started without the helpers for tests, and had another client."""
    app = Raises()
    async with await start(app) as server:
        assert (await get(server, "/before")).status_code == 500
        async with testing.client(server) as client:
            assert await raised_by(client, "/") is app.raised["/"]
    assert not app_errors._untaken


async def test_client_of_a_server_in_a_thread_raises() -> None:
    """The loops are different ones."""
    app = Raises()
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[Any] = loop.create_future()
    leave = threading.Event()

    def serve() -> None:
        with testing.live_server(app) as server:
            loop.call_soon_threadsafe(ready.set_result, server)
            leave.wait()

    serving = in_thread(serve)
    async with testing.client(await ready) as client:
        for path in ("/a", "/b"):
            assert await raised_by(client, path) is app.raised[path]
    leave.set()
    await serving


async def test_app_sees_the_scope_that_it_sees_without(where: dict[str, Any]) -> None:
    """No header, and no key; only the ports of the clients are different ones."""
    app = Raises()
    async with testing.server(app, **where) as server:
        for raising in (True, False):
            async with testing.client(server, raise_app_exceptions=raising) as client:
                try:
                    response = await client.get("/?3", headers={"x": "y"})
                except AppError:
                    continue
                assert b"aioserve-request" not in dict(response.request.headers.raw)
        first, second = app.scopes
        assert first.keys() == second.keys()
        for key in first.keys() - {"client", "state"}:
            assert first[key] == second[key]
    app_errors._untaken.clear()


async def test_app_gets_the_very_functions_of_uvicorn() -> None:
    """No wrapper of `receive` and `send`; and what it returns is still refused."""
    functions: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> Any:
        if scope["type"] == "http":
            functions.extend([receive, send])
            return 42
        return None

    async with testing.client(app) as client:
        with pytest.raises(httpx2.RemoteProtocolError):
            await client.get("/")
    assert all(type(each.__self__).__module__.startswith("uvicorn.") for each in functions)


async def test_failure_that_an_app_asks_of_pytest_is_raised() -> None:
    """It is no `Exception`, and neither is a skip."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        pytest.fail("the app's own")

    async with testing.client(app) as client:
        with pytest.raises(pytest.fail.Exception, match="the app's own"):
            await client.get("/")


async def test_server_on_the_same_port_of_another_address_gets_no_header_of_ours() -> None:
    """A port alone does not say whose it is."""
    scopes: list[Scope] = []

    async def other(scope: Scope, receive: Receive, send: Send) -> None:
        scopes.append(scope)
        await send({**START, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    async with testing.client(Raises()) as client:
        port = client.base_url.port
        assert port is not None
        async with await start(other, host="127.0.0.2", port=port, lifespan="off") as server:
            assert (await client.get(server.url)).status_code == 200
    (scope,) = scopes
    assert all(name != b"aioserve-request" for name, _ in scope["headers"])


@pytest.mark.parametrize("kinds", ["tcp", pytest.param("tcp and unix", marks=not_portable.unix_sockets)])
async def test_other_servers_get_no_header_of_ours(kinds: str, tmp_path: Path) -> None:
    """Whatever listens on another port, or on the same one later; also where the server has a Unix socket as well."""
    options: dict[str, Any] = {"port": 0, "uds": tmp_path / "app.sock"} if "unix" in kinds else {}
    seen: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            seen.append(scope)
            await send(START)
            await send(END)

    async with (
        testing.server(app, **options) as server,
        testing.client(server) as client,
        await start(app) as other,
    ):
        await client.get(other.url)
        await server.aclose()
        async with await start(app, port=server.port or 0):
            await client.get("/")
    assert len(seen) == 2
    assert not any(name == b"aioserve-request" for scope in seen for name, _ in scope["headers"])


async def check_framework(framework: Any, *, with_middleware: bool = False, debug: bool = False) -> None:
    error = AppError("the endpoint's own")

    async def raises(request: Request) -> Response:
        raise error

    async def is_refused(request: Request) -> Response:
        raise HTTPException(int(request.query_params["status"]))

    async def pass_on(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        return await call_next(request)

    middleware = [Middleware(BaseHTTPMiddleware, dispatch=pass_on)] if with_middleware else []
    app = framework(debug=debug, routes=[Route("/", raises), Route("/refused", is_refused)], middleware=middleware)
    async with testing.client(app) as client:
        assert await raised_by(client, "/") is error
        for status in (418, 500):
            assert (await client.get(f"/refused?status={status}")).status_code == status
    assert not app_errors._untaken


class TestFrameworks:
    """Their own middleware sends the response, and raises then."""

    @pytest.mark.parametrize("framework", [Starlette, FastAPI])
    @pytest.mark.parametrize("with_middleware", [False, True])
    async def test_exception_is_raised_behind_the_middleware_of(self, framework: Any, with_middleware: bool) -> None:
        """Starlette's ServerErrorMiddleware sends a 500; an HTTPException is a response like any other."""
        await check_framework(framework, with_middleware=with_middleware)

    @pytest.mark.parametrize("framework", [Starlette, FastAPI])
    def test_exception_is_raised_where_debug_shows_it(self, framework: Any) -> None:
        """Starlette writes its page in a thread."""
        asyncio.run(check_framework(framework, debug=True))

    async def test_end_of_a_500_is_waited_for(self) -> None:
        """The middleware raises some time after it."""
        error = AppError("late")
        read = asyncio.Event()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http":
                await send({**START, "status": 500})
                await send(END)
                await read.wait()
                raise error

        async with testing.client(app) as client:
            asking = asyncio.create_task(raised_by(client, "/"))
            while not app_errors._running:
                await asyncio.sleep(0)
            for _ in range(20):
                await asyncio.sleep(0)
            assert not asking.done()
            read.set()
            assert await asking is error

    async def test_end_of_a_500_is_waited_for_no_longer_than_the_limit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It may have work to do, or be a stream without an end."""
        monkeypatch.setattr(_limits, "RAISING_HANDLER", 0.01)
        ended = asyncio.Event()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http":
                await send({**START, "status": 500})
                await send(PART)
                await ended.wait()
                await send(END)

        async with testing.client(app) as client, client.stream("GET", "/") as response:
            assert response.status_code == 500
            ended.set()
            assert await response.aread() == b"partend"

    async def test_background_task_delays_no_response(self) -> None:
        """It runs in the handler, after the response."""
        done = asyncio.Event()

        async def hello(request: Request) -> Response:
            return PlainTextResponse("hello", background=BackgroundTask(done.wait))

        app = Starlette(routes=[Route("/", hello)])
        async with testing.client(app) as client:
            assert (await client.get("/")).text == "hello"
            done.set()


@pytest.mark.parametrize("ws", sorted(WS_PROTOCOLS.keys() - {"auto", "none"}))
async def test_exception_of_a_websocket_is_shown_unless_it_refuses(ws: Any) -> None:
    """A client whose WebSocket is refused with a 500 raises it. The scope has no header of ours."""
    error = AppError("the WebSocket's own")
    scopes = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            scopes.append(scope)
            await receive()
            if scope["path"] == "/accepted":
                await send({"type": "websocket.accept"})
                await receive()
            raise error

    async with testing.server(app, ws=ws) as server, testing.client(server) as client:
        with pytest.raises(AppError) as caught:
            async with client.websocket("/refused"):
                pass
        assert caught.value is error
        async with client.websocket("/accepted") as websocket:
            await websocket.send_text("hello")
            while server.stats.in_flight:
                await asyncio.sleep(0)
    assert len(scopes) == 2
    assert not any(name == b"aioserve-request" for scope in scopes for name, _ in scope["headers"])
    (shown,) = app_errors._untaken
    assert shown.startswith("WebSocket '/accepted'\nTraceback")
    app_errors._untaken.clear()


class TestWhatIsNoExceptionOfARequest:
    """It is neither raised nor shown."""

    async def test_client_that_goes_away(self) -> None:
        """Starlette raises ClientDisconnect in the handler."""
        reading = asyncio.Event()

        async def reads(request: Request) -> Response:
            reading.set()
            return Response(await request.body())

        app = Starlette(routes=[Route("/", reads, methods=["POST"])])
        async with testing.server(app) as server, testing.client(server) as client:

            async def body() -> Any:
                yield b"part"
                await asyncio.sleep(60)

            asking = asyncio.create_task(client.post("/", content=body()))
            await reading.wait()
            asking.cancel()
            await asyncio.wait([asking])
            while server.stats.in_flight:
                await asyncio.sleep(0)
        assert not app_errors._untaken

    async def test_handler_that_is_cancelled_at_a_stop(self) -> None:
        """The client has its own error."""
        app = Raises()
        app.release.clear()
        async with testing.server(app, shutdown_timeout=0) as server, testing.client(server) as client:
            asking = asyncio.create_task(client.get("/"))
            while not server.stats.in_flight:
                await asyncio.sleep(0)
            server.close(timeout=0)
            assert (await asking).status_code == 500  # it is uvicorn's
            await server.aclose()
        assert not app_errors._untaken

    async def test_request_that_reaches_nobody(self) -> None:
        """Nothing is waited for."""
        async with testing.server(Raises()) as server, testing.client(server) as client:
            await server.aclose()
            with pytest.raises(httpx2.ConnectError):
                await client.get("/")
        assert not app_errors._untaken
