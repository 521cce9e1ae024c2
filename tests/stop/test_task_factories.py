"""
Task factories that run each coroutine inside of another one, as tracers do: a stop finds the handler all the same.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import types
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest
from uvicorn.config import HTTP_PROTOCOLS, WS_PROTOCOLS

from aioserve import Server, Swappable, start
from aioserve._report import unfinished_handler
from aioserve._uvicorn.protocols import handled_by, scope_of
from tests.helpers.apps import App, Receive, Scope, Send
from tests.helpers.clients import PIPELINING, UPGRADE, connect
from tests.helpers.turns import MOMENT, turns

pytestmark = pytest.mark.usefixtures("short_grace")

Wrap = Callable[[Any], Any]


def sentry(coroutine: Any) -> Any:
    """Await it from inside of a function that has it from around itself."""

    async def _task_with_sentry_span_creation() -> Any:
        return await coroutine

    return _task_with_sentry_span_creation()


async def opentelemetry(coroutine: Any) -> Any:
    """Await an argument."""
    return await coroutine


def both(coroutine: Any) -> Any:
    return sentry(opentelemetry(sentry(coroutine)))


async def preparing(coroutine: Any) -> Any:
    """Await something else before."""
    await asyncio.sleep(0)
    return await coroutine


def generator(coroutine: Any) -> Any:
    """Let a generator of the old kind await it."""

    @types.coroutine
    def tracing() -> Generator[Any, Any, Any]:
        return (yield from coroutine)

    async def outer() -> Any:
        return await tracing()

    return outer()


WRAPPERS = [sentry, opentelemetry, both, preparing, generator]


class Hiding:
    """An awaitable that does not tell what it awaits."""

    def __init__(self, coroutine: Any) -> None:
        self._coroutine = coroutine

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._coroutine.__await__()  # type: ignore[no-any-return]


async def hidden(hiding: Hiding) -> Any:
    return await hiding


def hide(coroutine: Any) -> Any:
    return hidden(Hiding(coroutine))


@contextmanager
def wrapping(wrap: Wrap, *, eager: bool = False) -> Iterator[None]:
    """Let the tasks of this block run what a function makes of their coroutines."""

    def factory(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        options = {name: value for name, value in options.items() if value is not None and name != "eager_start"}
        if eager:
            options["eager_start"] = True
        return asyncio.Task(wrap(coroutine), loop=loop, **options)

    loop = asyncio.get_running_loop()
    before = loop.get_task_factory()
    loop.set_task_factory(factory)
    try:
        yield
    finally:
        loop.set_task_factory(before)


each_wrapper = pytest.mark.parametrize("wrap", WRAPPERS)
each_http = pytest.mark.parametrize("http", [name for name in ("h11", "httptools", "zttp") if name in HTTP_PROTOCOLS])
each_eagerness = pytest.mark.parametrize(
    "eager",
    [False, pytest.param(True, marks=pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks: from 3.12"))],
    ids=["usual", "eager"],
)


async def hang(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
    await asyncio.Event().wait()


@asynccontextmanager
async def hanging(wrap: Wrap, request: bytes, *, eager: bool = False, **options: Any) -> AsyncIterator[Server]:
    """Serve a handler that has to be cancelled, and stop at the end of the block."""
    is_in = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        is_in.set()
        await hang(scope, receive, send)

    with wrapping(wrap, eager=eager):
        server = await start(app, lifespan="off", shutdown_timeout=MOMENT, **options)
        async with connect(server) as client:
            client.writer.write(request)
            await is_in.wait()
            await turns()
            yield server
            await server.aclose()
        assert server.report is not None


@each_wrapper
@each_http
@each_eagerness
async def test_report_names_a_request_whose_task_was_wrapped(wrap: Wrap, http: str, eager: bool) -> None:
    """And says where it was."""
    async with hanging(wrap, b"GET /hang HTTP/1.1\r\nhost: test\r\n\r\n", eager=eager, http=http) as server:
        pass
    assert server.report is not None
    (handler,) = server.report.cancelled
    assert (handler.method, handler.path) == ("GET", "/hang")
    assert handler.client is not None
    assert ", waiting at hang (" in str(handler)
    assert [name.split(" ")[0].rpartition(".")[2] for name in handler.where][-3:] == ["app", "hang", "wait"]


@each_wrapper
@each_eagerness
@pytest.mark.parametrize("ws", sorted(WS_PROTOCOLS.keys() - {"auto", "none"}))
async def test_report_names_a_websocket_whose_task_was_wrapped(wrap: Wrap, ws: str, eager: bool) -> None:
    """As any other."""
    async with hanging(wrap, UPGRADE, eager=eager, ws=ws) as server:
        pass
    assert server.report is not None
    (handler,) = server.report.cancelled
    assert (handler.method, handler.path) == ("WEBSOCKET", "/")
    assert ", waiting at hang (" in str(handler)


@each_wrapper
async def test_report_names_a_request_of_a_swappable_app_whose_task_was_wrapped(wrap: Wrap) -> None:
    """Which knows its own calls."""
    app, other = App(), App()
    swappable = Swappable(app)
    with wrapping(wrap):
        server = await start(swappable)
        async with connect(server) as client:
            client.ask("/hold")
            await app.holding.wait()
            (running,) = swappable._running
            ((_, handler),) = running.unfinished()
            assert (handler.method, handler.path) == ("GET", "/hold")
            assert ", waiting at App.request (" in str(handler)
            app.release.set()
            await client.answer()
            await swappable.swap(other)
        await server.aclose()


async def test_report_does_not_guess_what_a_task_factory_hides() -> None:
    """Neither the kind of a request nor its path."""
    async with hanging(hide, b"GET /hang HTTP/1.1\r\nhost: test\r\n\r\n") as server:
        pass
    assert server.report is not None
    (handler,) = server.report.cancelled
    assert (handler.method, handler.path, handler.client) == ("?", "?", None)
    assert str(handler).startswith("? ? ")


class Cycle:
    """What uvicorn's cycles have to have for this."""

    def __init__(self) -> None:
        self.scope = {"type": "http", "method": "GET", "path": "/new", "client": None}

    async def run_asgi(self) -> None:
        pass


def itself(coroutine: Any) -> Any:
    """Hold also itself, and what is no coroutine."""

    async def holding() -> Any:
        assert all_of_it != module  # type: ignore[comparison-overlap]
        return await coroutine

    module = asyncio
    all_of_it = holding()  # in the order of their names, it is the first
    return all_of_it


class Raising:
    """Raise whatever is asked."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)


async def among_others(coroutine: Any, strange: Any = Raising()) -> Any:  # noqa: B008
    return await coroutine


@pytest.mark.parametrize("wrap", [*WRAPPERS[:-1], itself, among_others])
async def test_handler_is_found_in_a_task_that_has_not_begun(wrap: Wrap) -> None:
    """A wrapper then has the handler's coroutine in a variable."""
    cycle = Cycle()
    task = asyncio.Task(wrap(cycle.run_asgi()))
    assert handled_by(task) is cycle
    handler = unfinished_handler(scope_of(task), task)
    assert (handler.method, handler.path) == ("GET", "/new")
    if wrap is not itself:
        assert handler.where[-1].startswith("Cycle.run_asgi (")
    await task


@pytest.mark.parametrize("found", [None, Raising(), object(), asyncio.sleep], ids=["none", "raises", "object", "other"])
async def test_task_that_is_like_no_other_is_no_handler(found: Any) -> None:
    """Task factories may return anything that behaves like a task."""

    class Task:
        def get_coro(self) -> Any:
            return found

    task: Any = Task()
    assert handled_by(task) is None
    assert handled_by(Raising()) is None  # type: ignore[arg-type]


async def test_search_for_a_handler_has_a_limit() -> None:
    """However many coroutines are in each other."""
    coroutine: Any = Cycle().run_asgi()
    for _ in range(100):
        coroutine = opentelemetry(coroutine)
    task = asyncio.Task(coroutine)
    assert handled_by(task) is None
    await task


@each_wrapper
@each_eagerness
async def test_handler_in_a_wrapped_task_cannot_wait_for_the_end_of_its_server(wrap: Wrap, eager: bool) -> None:
    """It would wait for itself; where tasks are eager, before uvicorn knows its task."""
    errors: list[BaseException] = []
    ended: list[Server] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        server = scope["state"]["aioserve"]
        for wait in (server.wait_closed, server.aclose):
            try:
                await wait()
            except RuntimeError as exc:
                errors.append(exc)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
        await send({"type": "http.response.body", "body": b"hello"})

        async def outlive() -> None:
            await server.aclose()
            ended.append(server)

        closing.append(asyncio.create_task(outlive()))  # a task of its own can

    closing: list[asyncio.Task[None]] = []
    with wrapping(wrap, eager=eager):
        server = await start(app, lifespan="off")
        async with connect(server) as client:
            client.ask("/")
            await client.answer()
            await client.rest()
            await server.wait_closed()
        await asyncio.gather(*closing)
    assert [str(error).split(" ")[0] for error in errors] == ["wait_closed()", "aclose()"]
    assert ended == [server]


@each_wrapper
@pytest.mark.parametrize("http", PIPELINING)
async def test_handlers_of_pipelined_requests_in_wrapped_tasks_hear_of_a_disconnect(wrap: Wrap, http: str) -> None:
    """Those that wait behind another one are known by their tasks alone."""
    received: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        received.append((scope["path"], (await receive())["type"]))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
        await send({"type": "http.response.body", "body": b"hello"})

    with wrapping(wrap):
        server = await start(app, lifespan="off", http=http, disconnect_after=0, shutdown_timeout=None)
        async with connect(server) as client:
            client.ask("/1")
            client.ask("/2")
            await turns()
            await server.aclose()
            await client.rest()
    assert received == [("/1", "http.disconnect"), ("/2", "http.disconnect")]


async def test_check_of_the_caller_leaves_nothing_to_the_garbage_collector() -> None:
    """It looks at frames, and a frame that holds itself would keep all that its callers hold."""

    class Kept:
        pass

    async def check() -> weakref.ref[Kept]:
        kept = Kept()
        task = asyncio.current_task()
        assert task is not None
        assert handled_by(task) is None
        return weakref.ref(kept)

    gc.disable()
    try:
        with wrapping(sentry):
            left: Awaitable[weakref.ref[Kept]] = asyncio.create_task(check())
            assert (await left)() is None
    finally:
        gc.enable()
