"""
A report names the code of the program: its route, its function, and the line that it waits at.
"""

from __future__ import annotations

import asyncio
import functools
import re
import threading
from collections.abc import AsyncIterator
from typing import Any

import anyio
import httpx
import pytest
from fastapi import APIRouter, FastAPI
from starlette.applications import Starlette
from starlette.endpoints import HTTPEndpoint
from starlette.middleware.base import RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Mount, Route

from aioserve import Swappable, UnfinishedHandler, serving
from tests.helpers.apps import App
from tests.helpers.turns import turns

pytestmark = pytest.mark.usefixtures("short_grace")

THIS = r"\(.*test_report\.py:\d+\)"


async def hang(begun: asyncio.Event) -> None:
    begun.set()
    await asyncio.Event().wait()


async def pass_through(request: Request, call_next: RequestResponseEndpoint) -> Response:
    return await call_next(request)


async def cut_off(app: Any, path: str, begun: asyncio.Event) -> UnfinishedHandler:
    """Request a path, wait until its handler has begun, and let a server cut it off."""
    async with serving(app, shutdown_timeout=0.01) as server, httpx.AsyncClient(base_url=server.url) as client:
        asking = asyncio.create_task(client.get(path))
        await begun.wait()
        await server.aclose()
        try:
            await asking
        except httpx.HTTPError:
            pass
    assert server.report is not None
    (handler,) = server.report.cancelled or server.report.disconnected
    return handler


async def test_fastapi_route_and_endpoint_are_named() -> None:
    """The path of the request comes first, then the route, its function, and the line."""
    begun = asyncio.Event()
    router = APIRouter(prefix="/shop")

    @router.get("/items/{item_id}")
    async def read_item(item_id: int) -> None:
        await hang(begun)

    app = FastAPI()
    app.include_router(router)
    handler = await cut_off(app, "/shop/items/7?q=1", begun)
    assert (handler.route, handler.in_thread) == ("/shop/items/{item_id}", False)
    assert handler.endpoint == f"{__name__}.{read_item.__qualname__}"
    assert handler.line is not None
    assert re.fullmatch(f"hang {THIS}", handler.line)
    assert re.fullmatch(
        rf"GET /shop/items/7 \(route /shop/items/\{{item_id\}}, {re.escape(handler.endpoint)}\) "
        rf"from 127\.0\.0\.1:\d+, waiting at hang {THIS}",
        str(handler),
    )


async def test_route_has_the_prefixes_of_its_routers_and_mounts() -> None:
    """The whole template is named, as the program has it."""
    begun = asyncio.Event()
    inner, outer = APIRouter(prefix="/inner"), APIRouter(prefix="/outer")

    @inner.get("/items/{item_id}")
    async def read_item(item_id: int) -> None:
        await hang(begun)

    outer.include_router(inner)
    mounted = FastAPI()
    mounted.include_router(outer)
    handler = await cut_off(Starlette(routes=[Mount("/api", mounted)]), "/api/outer/inner/items/7", begun)
    assert handler.route == "/api/outer/inner/items/{item_id}"


async def test_line_is_that_of_a_coroutine_that_is_gathered() -> None:
    """As in a group of tasks."""
    begun = asyncio.Event()
    app = FastAPI()

    @app.get("/slow")
    async def slow() -> None:
        await asyncio.gather(hang(begun), asyncio.sleep(100))

    handler = await cut_off(app, "/slow", begun)
    assert handler.line is not None
    assert re.fullmatch(f"hang {THIS}", handler.line)


async def test_route_with_the_path_of_the_request_is_not_said_twice() -> None:
    """Only its function is."""
    begun = asyncio.Event()

    class Slow(HTTPEndpoint):
        async def get(self, request: Request) -> None:
            await hang(begun)

    handler = await cut_off(Starlette(routes=[Route("/slow", Slow)]), "/slow", begun)
    assert str(handler).startswith(f"GET /slow ({__name__}.{Slow.__qualname__}) from 127.0.0.1:")


async def test_endpoint_is_named_behind_a_middleware_with_a_task_of_its_own() -> None:
    """Starlette's BaseHTTPMiddleware runs the rest of the app in a task group."""
    begun = asyncio.Event()
    app = FastAPI()

    @app.get("/slow")
    async def slow() -> None:
        await hang(begun)

    app.middleware("http")(pass_through)
    app.middleware("http")(pass_through)
    handler = await cut_off(app, "/slow", begun)
    assert handler.endpoint == f"{__name__}.{slow.__qualname__}"
    assert handler.line is not None
    assert re.fullmatch(f"hang {THIS}", handler.line)


@pytest.mark.parametrize("group", ["anyio", "asyncio"])
async def test_line_is_that_of_a_task_in_a_group(group: str) -> None:
    """The handler itself waits for the group."""
    begun = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if group == "anyio":
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(hang, begun)
        else:
            async with asyncio.TaskGroup() as group_of_asyncio:
                group_of_asyncio.create_task(hang(begun))

    async with serving(app, lifespan="off", shutdown_timeout=0.01) as server:
        asking = asyncio.create_task(httpx.AsyncClient().get(server.url))
        await begun.wait()
        await server.aclose()
        await asyncio.wait({asking})
        assert asking.exception() is not None or asking.result().status_code == 500
    assert server.report is not None
    (handler,) = server.report.cancelled
    assert handler.line is not None
    assert re.fullmatch(f"hang {THIS}", handler.line)


async def test_endpoint_of_a_copied_scope_is_named() -> None:
    """A mounted app, and the app of a `Swappable`, get copies of the scope."""
    begun = asyncio.Event()

    async def slow(request: Request) -> None:
        await hang(begun)

    async def copying(scope: Any, receive: Any, send: Any) -> None:
        await inner(dict(scope), receive, send)

    inner = Starlette(routes=[Mount("/api", routes=[Route("/slow", functools.partial(slow))])])
    handler = await cut_off(Swappable(copying), "/api/slow", begun)
    assert handler.endpoint == f"{__name__}.{slow.__qualname__}"


@pytest.mark.parametrize("middleware", [False, True])
def test_synchronous_endpoint_is_said_to_go_on_in_its_thread(
    middleware: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """No cancellation can end it."""
    release = threading.Event()

    async def main() -> UnfinishedHandler:
        begun = asyncio.Event()
        loop = asyncio.get_running_loop()
        app = FastAPI()
        if middleware:
            app.middleware("http")(pass_through)

        @app.get("/slow")
        def slow() -> None:
            loop.call_soon_threadsafe(begun.set)
            release.wait(20)

        try:
            return await cut_off(app, "/slow", begun)
        finally:
            release.set()

    handler = asyncio.run(main())  # a loop of its own: the worker thread lives as long as its loop
    assert handler.in_thread
    assert ", in a thread, which goes on" in str(handler)
    assert caplog.messages[-1].endswith("; a thread cannot be cancelled, so let its work have a time limit")


async def test_stream_of_an_endpoint_that_has_returned_is_named_after_the_endpoint() -> None:
    """The route stays in the scope."""
    begun = asyncio.Event()

    async def content() -> AsyncIterator[str]:
        yield "begun"
        await hang(begun)

    async def stream(request: Request) -> Response:
        return StreamingResponse(content())

    handler = await cut_off(Starlette(routes=[Route("/stream", stream)]), "/stream", begun)
    assert handler.endpoint == f"{__name__}.{stream.__qualname__}"
    assert handler.line is not None
    assert re.fullmatch(f"hang {THIS}", handler.line)


async def test_app_without_a_framework_is_named_by_its_line() -> None:
    """It has neither a route nor an endpoint."""
    app = App()
    handler = await cut_off(app, "/hold", app.holding)
    assert (handler.route, handler.endpoint) == (None, None)
    assert handler.line is not None
    assert re.fullmatch(r"App\.request \(.*apps\.py:\d+\)", handler.line)


@pytest.mark.parametrize("first", [True, False], ids=["handler first", "server first"])
async def test_handler_that_is_cancelled_together_with_its_server_is_named(*, first: bool) -> None:
    """As by `asyncio.run()` at a second Ctrl+C: it may have ended when the server looks."""
    begun = asyncio.Event()

    async def hold(request: Request) -> Response:
        await hang(begun)
        return Response()

    before = asyncio.all_tasks()
    async with serving(Starlette(routes=[Route("/hold", hold)]), shutdown_timeout=None) as server:
        servers = asyncio.all_tasks() - before
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"GET /hold HTTP/1.1\r\nhost: test\r\n\r\n")
        await begun.wait()
        handlers = asyncio.all_tasks() - before - servers
        server.close()
        await turns()  # so that the stop waits for the handler
        for task in [*handlers, *servers] if first else [*servers, *handlers]:
            task.cancel()
        await server.wait_closed()
        writer.transport.abort()
    assert server.report is not None
    assert server.report.disconnected == ()
    assert [(each.method, each.path) for each in server.report.cancelled] == [("GET", "/hold")]
