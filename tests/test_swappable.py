"""
An app that is replaced while it is being served: what its requests, its lifespan and the one who swaps see of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio
import pytest
from fastapi import FastAPI, Request
from starlette.applications import Starlette
from starlette.routing import Mount
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as connect_websocket
from websockets.exceptions import ConnectionClosed, InvalidStatus

from aioserve import (
    Server,
    ServerCrashedError,
    ShutdownError,
    StartupError,
    StartupInterruptedError,
    StartupTimeoutError,
    Swappable,
    serving,
    start,
)
from tests.apps import App, AppError, Receive, Scope, Send, without_lifespan
from tests.clients import Connection, connect, get
from tests.conftest import LOOPS
from tests.plain import Plain
from tests.turns import MANY_TURNS, after, turns

pytestmark = pytest.mark.usefixtures("short_grace")

WHOLE_LIFE = ["startup", "shutdown", "lifespan over"]


class Named(App):
    """An app that answers with a name of five letters, which is in its lifespan's state."""

    def __init__(self, name: str, startup: str = "completes", shutdown: str = "completes") -> None:
        super().__init__(startup, shutdown)
        self.name = name
        self.started = asyncio.Event()

    async def lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def name_first(message: dict[str, Any]) -> None:
            if message["type"] == "lifespan.startup.complete":
                scope["state"]["greeting"] = self.name
            await send(message)

        self.started.set()
        await super().lifespan(scope, receive, name_first)

    @property
    def life(self) -> list[str]:
        """What its lifespan has gone through."""
        return [event for event in self.events if event in WHOLE_LIFE]

    def has_ended_if_begun(self) -> bool:
        return self.events.count("lifespan over") == int(self.started.is_set())


@contextlib.asynccontextmanager
async def swapping(swappable: Swappable, app: Any, **options: Any) -> AsyncIterator[asyncio.Task[None]]:
    """A swap that is begun before a block, and over after it."""
    task = asyncio.create_task(swappable.swap(app, **options))
    try:
        yield task
    finally:
        await asyncio.wait({task})


async def switched(swappable: Swappable, app: object) -> None:
    """Wait until new requests are an app's."""
    while swappable.app is not app:
        await asyncio.sleep(0)


def sending(app: Any, before: Callable[[dict[str, Any]], Awaitable[None]]) -> Any:
    """An app with a middleware that does something before each message that is sent."""

    async def wrapped(scope: Any, receive: Any, send: Any) -> None:
        async def wrapped_send(message: Any) -> None:
            await before(message)
            await send(message)

        await app(scope, receive, wrapped_send)

    return wrapped


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged; but not what asyncio's debug mode says of a busy machine."""
    return [record.getMessage() for record in caplog.records if record.name != "asyncio"]


async def in_a_thread(act: Callable[[], None]) -> None:
    """Do something in a thread that is gone afterwards."""
    with ThreadPoolExecutor(1) as executor:
        await asyncio.get_running_loop().run_in_executor(executor, act)


# What its requests see.


async def test_new_requests_are_the_new_apps() -> None:
    """On connections that are kept alive, too; and each app's lifespan begins and ends once."""
    first, second = Named("first"), Named("other")
    swappable = Swappable(first)
    assert swappable.app is first
    async with serving(swappable) as server, connect(server) as connection:
        connection.ask("/")
        assert (await connection.reader.readuntil(b"first")).startswith(b"HTTP/1.1 200")
        await swappable.swap(second)
        assert swappable.app is second
        assert (first.life, second.life) == (WHOLE_LIFE, ["startup"])
        connection.ask("/")
        assert (await connection.reader.readuntil(b"other")).startswith(b"HTTP/1.1 200")
        assert (await get(server)).text == "other"
    assert (first.life, second.life) == (WHOLE_LIFE, WHOLE_LIFE)


async def test_a_request_in_flight_is_finished_by_the_app_that_began_it() -> None:
    """Its lifespan ends behind that, while new requests are answered by the new app."""
    first, second = Named("first"), Named("other")
    swappable = Swappable(first)
    async with serving(swappable) as server, connect(server) as connection:
        connection.ask("/hold")
        await first.holding.wait()
        async with swapping(swappable, second) as swap:
            await switched(swappable, second)
            assert (await get(server)).text == "other"
            assert first.life == ["startup"]
            assert not swap.done()
            first.release.set()
        assert await connection.reader.readuntil(b"first")
        swap.result()
    assert first.events == ["startup", "GET /hold", "answered /hold", "shutdown", "lifespan over"]


async def test_each_app_has_a_state_of_its_own_beside_the_servers() -> None:
    """Each request gets a copy, and what an app has put there is not the next one's."""
    seen: list[dict[str, Any]] = []

    def make(**state: object) -> FastAPI:
        @contextlib.asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, object]]:
            yield {**state, "aioserve": "not the server"}

        app = FastAPI(lifespan=lifespan)

        @app.get("/")
        async def look(request: Request) -> None:
            seen.append(dict(request.state._state))
            request.state.scribble = True

        return app

    swappable = Swappable(make(database="one"))
    async with serving(swappable) as server:
        await get(server)
        await get(server)
        await swappable.swap(make(cache="two"))
        await get(server)
        one, two = {"database": "one", "aioserve": server}, {"cache": "two", "aioserve": server}
        assert seen == [one, one, two]
        assert server.state == {"aioserve": server}


@pytest.mark.parametrize("timeout", [0, 0.05], ids=["at once", "within a budget"])
async def test_a_request_that_takes_too_long_gets_a_503(timeout: float, caplog: pytest.LogCaptureFixture) -> None:
    """It is cancelled, and awaited, before its app's lifespan ends; and the log says which it was."""
    first, second = Named("first"), Named("other")
    swappable = Swappable(first)
    async with serving(swappable) as server, connect(server) as connection:
        connection.ask("/hold")
        await first.holding.wait()
        await swappable.swap(second, shutdown_timeout=timeout)
        assert first.events == ["startup", "GET /hold", "cancelled /hold", "shutdown", "lifespan over"]
        answer = await connection.reader.readuntil(b"ask again.\n")
        assert answer.startswith(b"HTTP/1.1 503")
        connection.ask("/")
        assert await connection.reader.readuntil(b"other")
    assert "swapped out by force; requests that were still running: 1 (GET /hold)" in caplog.text
    assert server.report is not None
    assert (server.report.aborted, server.report.cancelled) == (0, ())


async def test_a_response_that_has_begun_is_seen_to_be_cut_short(caplog: pytest.LogCaptureFixture) -> None:
    """Not to have ended well."""
    first = Named("first")
    swappable = Swappable(first)
    async with serving(swappable) as server, connect(server) as connection:
        connection.ask("/stream")
        assert await connection.reader.readuntil(b"data: 0\n\n")
        await swappable.swap(Named("other"), shutdown_timeout=0)
        rest = await connection.rest()
        assert b"0\r\n\r\n" not in rest
        assert b"503" not in rest
    assert "GET /stream" in caplog.text
    assert "Exception in ASGI application" not in caplog.text


class Listening(Named):
    """An app whose requests wait for the client to go, and then may say something."""

    def __init__(self, name: str, farewell: bool) -> None:
        super().__init__(name)
        self._farewell = farewell

    async def request(self, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        self.holding.set()
        self.events.append((await receive())["type"])
        self.events.append((await receive())["type"])
        if self._farewell:
            await super().request(scope, receive, send)


@pytest.mark.parametrize("farewell", [True, False], ids=["that answers", "that does not"])
async def test_a_handler_that_listens_is_told_before_it_is_cancelled(farewell: bool) -> None:
    """It may still answer; if it does not, the client hears that it should ask again."""
    first = Listening("first", farewell)
    swappable = Swappable(first)
    async with serving(swappable) as server, connect(server) as connection:
        connection.ask("/")
        await first.holding.wait()
        await turns()
        await swappable.swap(Named("other"), shutdown_timeout=0)
        answer = await connection.reader.readuntil(b"first" if farewell else b"ask again.\n")
        assert answer.startswith(b"HTTP/1.1 200" if farewell else b"HTTP/1.1 503")
    assert [event for event in first.events if event.startswith("http")] == ["http.disconnect"] * 2
    assert not any(event.startswith("cancelled") for event in first.events)


async def test_a_handler_that_clings_holds_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """The swap ends within its bound, and the log says who goes on."""
    first = Named("first")
    swappable = Swappable(first)
    async with serving(swappable) as server, connect(server) as connection:
        connection.ask("/cling")
        await first.holding.wait()
        await swappable.swap(Named("other"), shutdown_timeout=0)
        assert first.life == WHOLE_LIFE
        assert "(GET /cling, which is stuck)" in caplog.text
        first.release.set()
        assert await connection.reader.readuntil(b"first")


async def test_a_timeout_of_somebody_elses_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    """In a handler and in `receive()`, what we have interrupted and what we have not can be told apart."""
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await receive()
        except TimeoutError as exc:
            seen.append(str(exc))
            raise TimeoutError("the app's own") from None
        raise AppError("I do without a lifespan")

    async def server(scope: Any, receive: Any, send: Any) -> None:
        async def times_out() -> None:
            raise TimeoutError("the server's own")

        await swappable(scope, times_out if scope["type"] == "http" else receive, send)

    swappable = Swappable(without_lifespan)
    async with serving(server) as running:
        await swappable.swap(Starlette(routes=[Mount("/", app)]))
        assert (await get(running)).status_code == 500
    assert seen == ["the server's own"]
    assert "TimeoutError: the app's own" in caplog.text


async def test_an_apology_is_no_part_of_the_apps_call() -> None:
    """It is not cancelled, also where it takes its time."""
    first = Listening("first", farewell=False)
    swappable = Swappable(first)

    async def slowly(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            await turns()

    async with serving(sending(swappable, slowly)) as server, connect(server) as connection:
        connection.ask("/")
        await first.holding.wait()
        await turns()
        await swappable.swap(Named("other"), shutdown_timeout=0)
        assert (await connection.reader.readuntil(b"ask again.\n")).startswith(b"HTTP/1.1 503")
    assert first.life == WHOLE_LIFE


async def test_the_server_can_still_cancel_a_handler() -> None:
    """The two cancellations have nothing to do with each other."""
    app = Named("first")
    async with serving(Swappable(app), shutdown_timeout=0) as server, connect(server) as connection:
        connection.ask("/hold")
        await app.holding.wait()
    assert app.events == ["startup", "GET /hold", "cancelled /hold", "shutdown", "lifespan over"]
    assert server.report is not None
    assert [handler.path for handler in server.report.cancelled] == ["/hold"]


# What its WebSockets see.


async def test_a_websocket_of_the_old_app_is_closed_at_once() -> None:
    """With 1012, which says that it may come again; and its handler hears the same."""
    first, second = Named("first"), Named("other")
    swappable = Swappable(first)
    async with serving(swappable) as server:
        async with connect_websocket(server.url.replace("http", "ws"), proxy=None) as websocket:
            await websocket.send("hello")
            assert await websocket.recv() == "hello"
            await swappable.swap(second, shutdown_timeout=None)
            assert first.events == ["startup", "websocket 1012", "shutdown", "lifespan over"]
            with pytest.raises(ConnectionClosed) as caught:
                await websocket.recv()
        assert caught.value.rcvd is not None
        assert caught.value.rcvd.code == 1012
        async with connect_websocket(server.url.replace("http", "ws"), proxy=None) as websocket:
            await websocket.send("hello")
            assert await websocket.recv() == "hello"
            assert second.events == ["startup"]


class Pushing(Named):
    """An app whose WebSockets do not listen: they wait for something else, and send it."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.accepting = asyncio.Event()
        self.accepting.set()

    async def websocket(self, receive: Receive, send: Send) -> None:
        await receive()
        self.holding.set()
        await self.accepting.wait()
        await send({"type": "websocket.accept"})
        try:
            await self.release.wait()
            await send({"type": "websocket.send", "text": "news"})
        except OSError as exc:
            self.events.append(str(exc))
            raise
        finally:
            await send({"type": "websocket.close"})
            self.events.append("websocket over")


async def test_a_websocket_that_does_not_listen_is_closed_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    """And when its handler sends something, that is an OSError, as with a client which has gone."""
    first = Pushing("first")
    swappable = Swappable(first)
    async with serving(swappable) as server:
        async with connect_websocket(server.url.replace("http", "ws"), proxy=None) as websocket:
            async with swapping(swappable, Named("other"), shutdown_timeout=None) as swap:
                with pytest.raises(ConnectionClosed) as caught:
                    await websocket.recv()
                assert caught.value.rcvd is not None
                assert caught.value.rcvd.code == 1012
                assert not swap.done()
                first.release.set()
            swap.result()
        closed = "the WebSocket was closed with 1012: its app has been replaced"
        assert first.events == ["startup", closed, "websocket over", "shutdown", "lifespan over"]
    assert logged(caplog) == []


async def test_a_handler_is_told_at_once_and_does_not_cut_the_close_short() -> None:
    """Some servers take their time to send it."""
    first = Named("first")
    swappable = Swappable(first)

    async def slowly(message: dict[str, Any]) -> None:
        while message["type"] == "websocket.close" and "websocket 1012" not in first.events:
            await asyncio.sleep(0)
        await turns()

    async with serving(sending(swappable, slowly)) as server:
        async with connect_websocket(server.url.replace("http", "ws"), proxy=None) as websocket:
            await websocket.send("hello")
            assert await websocket.recv() == "hello"
            await swappable.swap(Named("other"), shutdown_timeout=None)
            with pytest.raises(ConnectionClosed) as caught:
                await websocket.recv()
        assert caught.value.rcvd is not None
        assert caught.value.rcvd.code == 1012


async def test_a_websocket_that_cannot_be_closed_is_nobodys_fault(caplog: pytest.LogCaptureFixture) -> None:
    """Its client has gone, perhaps; and each server has its own way to say so."""
    first = Named("first")
    swappable = Swappable(first)

    async def fails(message: dict[str, Any]) -> None:
        if message["type"] == "websocket.close":
            raise AppError("the server's own")

    async with serving(sending(swappable, fails)) as server:
        async with connect_websocket(server.url.replace("http", "ws"), proxy=None) as websocket:
            await swappable.swap(Named("other"), shutdown_timeout=None)
            with pytest.raises(ConnectionClosed):
                await websocket.recv()
    assert first.events == ["startup", "websocket 1012", "shutdown", "lifespan over"]
    assert logged(caplog) == []


async def test_a_websocket_whose_close_hangs_holds_nobody() -> None:
    """It is cut short with its handler."""
    first = Pushing("first")
    swappable = Swappable(first)
    never = asyncio.Event()

    async def hangs(message: dict[str, Any]) -> None:
        if message["type"] == "websocket.close":
            await never.wait()

    async with serving(sending(swappable, hangs)) as server:
        async with connect_websocket(server.url.replace("http", "ws"), proxy=None):
            await swappable.swap(Named("other"), shutdown_timeout=0)
            await turns()
            assert not any(task.get_name() == "aioserve websocket" for task in asyncio.all_tasks())
    assert first.events == ["startup", "websocket over", "shutdown", "lifespan over"]
    never.set()


async def open_websocket(server: Server) -> ClientConnection:
    return await connect_websocket(server.url.replace("http", "ws"), proxy=None)


async def test_a_websocket_that_was_not_open_yet_is_closed_when_it_is() -> None:
    """A handshake that has begun is no WebSocket yet, which could be told anything."""
    first = Pushing("first")
    first.accepting.clear()
    swappable = Swappable(first)
    async with serving(swappable) as server:
        connecting = asyncio.create_task(open_websocket(server))
        await first.holding.wait()
        async with swapping(swappable, Named("other"), shutdown_timeout=None) as swap:
            await switched(swappable, swappable.app)
            await turns()
            assert not connecting.done()
            first.accepting.set()
            websocket = await connecting
            with pytest.raises(ConnectionClosed) as caught:
                await websocket.recv()
            assert caught.value.rcvd is not None
            assert caught.value.rcvd.code == 1012
            first.release.set()
        swap.result()


async def test_a_websocket_that_is_never_opened_is_refused_with_503() -> None:
    """As a request is that was not answered in time."""
    first = Pushing("first")
    first.accepting.clear()
    swappable = Swappable(first)
    async with serving(swappable) as server:
        connecting = asyncio.create_task(open_websocket(server))
        await first.holding.wait()
        await swappable.swap(Named("other"), shutdown_timeout=0)
        with pytest.raises(InvalidStatus) as caught:
            await connecting
        assert caught.value.response.status_code == 503


async def test_a_websocket_is_refused_with_403_where_the_server_knows_no_other_refusal() -> None:
    """The extension for that is one of ASGI's, and not of each server."""
    first = Pushing("first")
    first.accepting.clear()
    swappable = Swappable(first)

    async def without_extensions(scope: Any, receive: Any, send: Any) -> None:
        await swappable({**scope, "extensions": None}, receive, send)

    async with serving(without_extensions) as server:
        connecting = asyncio.create_task(open_websocket(server))
        await first.holding.wait()
        await swappable.swap(Named("other"), shutdown_timeout=0)
        with pytest.raises(InvalidStatus) as caught:
            await connecting
        assert caught.value.response.status_code == 403


# What the one who swaps sees.


@pytest.mark.parametrize("startup", ["raises", "fails", "fails quietly"])
async def test_a_new_app_that_fails_to_start_changes_nothing(startup: str) -> None:
    """The error is that of `serving()`, with the app's own as its cause; the old app goes on."""
    first, second = Named("first"), Named("other", startup)
    swappable = Swappable(first)
    async with serving(swappable) as server:
        with pytest.raises(StartupError, match="the app's lifespan failed to start: ") as caught:
            await swappable.swap(second)
        assert caught.value.__cause__ is (None if startup == "fails quietly" else second.error)
        assert (await get(server)).text == "first"
        assert (first.life, second.life) == (["startup"], ["startup", "lifespan over"])
        await swappable.swap(Named("third"))
        assert (await get(server)).text == "third"


async def test_a_new_app_that_takes_too_long_to_start_changes_nothing() -> None:
    """It has been cancelled."""
    second = Named("other", "hangs")
    swappable = Swappable(Named("first"))
    async with serving(swappable) as server:
        with pytest.raises(StartupTimeoutError, match=r"within startup_timeout=0\.05 seconds"):
            await swappable.swap(second, startup_timeout=0.05)
        assert (await get(server)).text == "first"
        assert second.life == ["startup", "lifespan over"]


async def test_a_new_app_that_dies_behind_its_startup_changes_nothing() -> None:
    """It is never switched to."""
    error = AppError("the app's own")

    async def dies(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        raise error

    swappable = Swappable(Named("first"))
    async with serving(swappable) as server:
        with pytest.raises(StartupError, match="died as soon as it had started: AppError: the app's own") as caught:
            await swappable.swap(dies)
        assert caught.value.__cause__ is error
        assert (await get(server)).text == "first"


async def test_apps_without_a_lifespan_can_be_swapped() -> None:
    """In and out."""
    first, third = Named("first"), Named("third")
    swappable = Swappable(first)
    async with serving(swappable) as server:
        await swappable.swap(without_lifespan)
        assert (await get(server)).text == "hello"
        await swappable.swap(third)
        assert (await get(server)).text == "third"
    assert (first.life, third.life) == (WHOLE_LIFE, WHOLE_LIFE)


@pytest.mark.parametrize("shutdown", ["raises", "fails", "hangs"])
async def test_an_old_app_that_fails_at_its_end_is_told_of(shutdown: str) -> None:
    """But the new one is there by then, and stays."""
    first = Named("first", shutdown=shutdown)
    swappable = Swappable(first)
    async with serving(swappable) as server:
        with pytest.raises(ShutdownError) as caught:
            await swappable.swap(Named("other"), shutdown_timeout=0.05)
        if shutdown == "hangs":
            assert isinstance(caught.value.__cause__, TimeoutError)
        else:
            assert caught.value.__cause__ is first.error
        assert (await get(server)).text == "other"


async def test_an_old_app_that_dies_while_it_finishes_is_told_of() -> None:
    """It is no longer the one that the server lives by."""
    first = Named("first")
    swappable = Swappable(first)
    async with serving(swappable) as server, connect(server) as connection:
        connection.ask("/hold")
        await first.holding.wait()
        async with swapping(swappable, Named("other")) as swap:
            await switched(swappable, swappable.app)
            await turns()
            first.crash.set()
            await turns()
            first.release.set()
        with pytest.raises(ShutdownError) as caught:
            swap.result()
        assert caught.value.__cause__ is first.error
        assert (await get(server)).text == "other"


async def test_swaps_wait_for_each_other() -> None:
    """So that each app is served for a moment, in the order of the calls."""
    apps = [Named(f"app {number}") for number in range(5)]
    swappable = Swappable(apps[0])
    async with serving(swappable) as server:
        async with asyncio.TaskGroup() as group:
            for app in apps[1:]:
                group.create_task(swappable.swap(app))
        assert (await get(server)).text == "app 4"
        assert [app.life for app in apps] == [WHOLE_LIFE] * 4 + [["startup"]]


async def test_a_request_cannot_swap_the_app_that_answers_it() -> None:
    """It would wait for itself; a task of its own can, and the request is answered before."""
    errors: list[str] = []
    tasks: list[asyncio.Task[None]] = []

    class Swapping(Named):
        async def request(self, scope: Scope, receive: Receive, send: Send) -> None:
            try:
                await swappable.swap(Named("other"))
            except RuntimeError as exc:
                errors.append(str(exc))
            tasks.append(asyncio.create_task(swappable.swap(Named("other"))))
            await super().request(scope, receive, send)

    swappable = Swappable(Swapping("first"))
    async with serving(swappable) as server:
        assert (await get(server)).text == "first"
        await asyncio.wait_for(tasks[0], None)
        assert (await get(server)).text == "other"
    assert errors == [
        "swap() in a request or the lifespan of a swappable app would wait for itself; let a task of its own call it"
    ]


@pytest.mark.parametrize("which", ["the running app's", "the new app's"])
async def test_nor_can_a_lifespan(which: str) -> None:
    """For the same reason."""
    errors: list[str] = []
    go = asyncio.Event()

    async def swaps(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        if which == "the running app's":
            await go.wait()
        try:
            await swappable.swap(Named("third"))
        except RuntimeError as exc:
            errors.append(str(exc))
        go.set()
        await receive()

    swappable = Swappable(swaps if which == "the running app's" else Named("first"))
    async with serving(swappable):
        if which == "the running app's":
            go.set()
            await turns()
        else:
            await swappable.swap(swaps)
            await go.wait()
    assert len(errors) == 1
    assert "would wait for itself" in errors[0]


async def test_swapping_is_for_the_time_between_startup_and_shutdown() -> None:
    """Before, after, and during the latter it is refused, and the app is not asked."""
    second = Named("other")
    swappable = Swappable(Named("first", shutdown="hangs"))
    with pytest.raises(RuntimeError, match="for the time between the server's startup and its shutdown"):
        await swappable.swap(second)
    with pytest.raises(ShutdownError):
        async with serving(swappable, shutdown_timeout=0.05) as server:
            server.close()
            await turns()
            with pytest.raises(RuntimeError, match="for the time between"):
                await swappable.swap(second)
    with pytest.raises(RuntimeError, match="for the time between"):
        await swappable.swap(second)
    assert second.events == []


async def off() -> tuple[Any, dict[str, Any], Swappable]:
    swappable = Swappable(without_lifespan)
    return swappable, {"lifespan": "off"}, swappable


async def mounted() -> tuple[Any, dict[str, Any], Swappable]:
    swappable = Swappable(without_lifespan)
    return Starlette(routes=[Mount("/", swappable)]), {}, swappable


@pytest.mark.parametrize("make", [off, mounted], ids=lambda each: each.__name__)
async def test_without_the_servers_lifespan_the_first_app_is_called_as_it_is(make: Callable[[], Any]) -> None:
    """There is nobody who would end another one's."""
    app, options, swappable = await make()
    async with serving(app, **options) as server:
        assert (await get(server)).text == "hello"
        with pytest.raises(RuntimeError, match=r'not with lifespan="off", nor where this is mounted in another app'):
            await swappable.swap(Named("other"))
        assert (await get(server)).text == "hello"


async def test_swapping_belongs_to_the_servers_loop() -> None:
    """In another one it says so."""
    swappable = Swappable(Named("first"))

    def elsewhere() -> None:
        with pytest.raises(RuntimeError, match="for the event loop that the server runs in"):
            asyncio.run(swappable.swap(Named("other")))

    async with serving(swappable) as server:
        await in_a_thread(elsewhere)
        assert (await get(server)).text == "first"


async def test_what_cannot_be_an_app_or_a_timeout_is_told_at_once() -> None:
    """Before anything is done."""
    not_callable: Any = 42
    with pytest.raises(TypeError, match="app must be an ASGI callable, not 42"):
        Swappable(not_callable)
    swappable = Swappable(Named("first"))
    async with serving(swappable) as server:
        soon: Any = "soon"
        with pytest.raises(TypeError, match="app must be an ASGI callable, not 42"):
            await swappable.swap(not_callable)
        with pytest.raises(TypeError, match="startup_timeout must be a number of seconds or None, not 'soon'"):
            await swappable.swap(Named("other"), startup_timeout=soon)
        with pytest.raises(ValueError, match="shutdown_timeout must be 0 or more seconds"):
            await swappable.swap(Named("other"), shutdown_timeout=-1)
        assert (await get(server)).text == "first"


# Cancellations.


class Slow(Named):
    """An app that takes some turns to start and to end."""

    async def lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def slow_receive() -> dict[str, Any]:
            message = await receive()
            await turns(4)
            return message

        async def slow_send(message: dict[str, Any]) -> None:
            await turns(4)
            await send(message)

        await super().lifespan(scope, slow_receive, slow_send)


@pytest.mark.parametrize("how", ["natively", "by a scope"])
async def test_it_can_be_cancelled_at_every_turn(how: str) -> None:
    """Before the switch the new app is gone again, after it the old one; and the cancellation comes out."""
    outcomes = set()
    for turn in range(MANY_TURNS):
        first, second = Slow("first"), Slow("other")
        swappable = Swappable(first)
        async with serving(swappable) as server, connect(server) as connection:
            connection.ask("/hold")
            await first.holding.wait()
            after(turn // 2, first.release.set)
            if how == "natively":
                task = asyncio.create_task(swappable.swap(second))
                after(turn, task.cancel)
                await asyncio.wait({task})
                cancelled = task.cancelled()
            else:
                with anyio.CancelScope() as scope:
                    after(turn, scope.cancel)
                    await swappable.swap(second)
                cancelled = scope.cancelled_caught
            gone, stays = (second, first) if swappable.app is first else (first, second)
            assert gone.has_ended_if_begun()
            assert stays.life == ["startup"]
            assert await connection.reader.readuntil(b"first")
            assert (await get(server)).text == stays.name
        assert stays.life == WHOLE_LIFE
        assert first.life == WHOLE_LIFE
        outcomes.add((swappable.app is second, cancelled))
    assert outcomes == {(False, True), (True, True), (True, False)}


async def test_cancelled_in_the_last_moment_before_the_switch_a_new_app_cannot_hold_it() -> None:
    """One that has just started, and hangs when it is to end again."""
    for turn in range(MANY_TURNS):
        first, second = Named("first"), Slow("other", shutdown="hangs")
        swappable = Swappable(first)
        server = await start(swappable)
        task = asyncio.create_task(swappable.swap(second))
        after(turn, task.cancel)
        await asyncio.wait({task})
        if swappable.app is second:
            break
        await server.aclose()
        assert second.has_ended_if_begun()
    assert second.life == ["startup"]
    with pytest.raises(ShutdownError):
        server.close(timeout=0)
        await server.aclose()


async def test_cancelled_after_the_switch_it_lets_the_old_app_finish() -> None:
    """What its requests are given is theirs; a second cancellation takes it."""
    first, second = Named("first"), Named("other")
    swappable = Swappable(first)
    async with serving(swappable) as server, connect(server) as connection:
        connection.ask("/hold")
        await first.holding.wait()
        async with swapping(swappable, second, shutdown_timeout=None) as swap:
            await switched(swappable, second)
            swap.cancel()
            await turns()
            assert not swap.done()
            swap.cancel()
        assert swap.cancelled()
        assert first.events == ["startup", "GET /hold", "cancelled /hold", "shutdown", "lifespan over"]
        assert (await connection.reader.readuntil(b"ask again.\n")).startswith(b"HTTP/1.1 503")


async def test_a_scope_lets_the_old_app_finish_as_well() -> None:
    """Though it delivers its cancellation anew with each turn of the loop."""
    first = Named("first")
    swappable = Swappable(first)
    async with serving(swappable) as server, connect(server) as connection:
        connection.ask("/hold")
        await first.holding.wait()
        with anyio.CancelScope() as scope:
            after(MANY_TURNS, scope.cancel)
            after(2 * MANY_TURNS, first.release.set)
            await swappable.swap(Named("other"))
        assert scope.cancelled_caught
        assert await connection.reader.readuntil(b"first")
    assert first.events == ["startup", "GET /hold", "answered /hold", "shutdown", "lifespan over"]


async def test_a_failure_behind_a_cancellation_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Since it is the cancellation that comes out."""
    first, second = Named("first", shutdown="raises"), Named("other")
    swappable = Swappable(first)
    async with serving(swappable) as server, connect(server) as connection:
        connection.ask("/hold")
        await first.holding.wait()
        async with swapping(swappable, second) as swap:
            await switched(swappable, second)
            swap.cancel()
            await turns()
            first.release.set()
        assert swap.cancelled()
        assert await connection.reader.readuntil(b"first")
    assert "the app's lifespan failed to shut down: AppError: the app's own" in caplog.text


async def test_one_that_waits_its_turn_can_be_cancelled() -> None:
    """Its app is not asked."""
    first, second, third = Named("first"), Named("other", "hangs"), Named("third")
    swappable = Swappable(first)
    async with serving(swappable) as server:
        async with swapping(swappable, second) as one:
            await second.started.wait()
            async with swapping(swappable, third) as two:
                await turns()
                two.cancel()
            assert two.cancelled()
            one.cancel()
        assert one.cancelled()
        assert (await get(server)).text == "first"
    assert (second.life, third.events) == (["startup", "lifespan over"], [])


async def test_one_that_waits_its_turn_when_the_server_stops_is_refused() -> None:
    """Its app is not asked."""
    second, third = Named("other", "hangs"), Named("third")
    swappable = Swappable(Named("first"))
    async with serving(swappable):
        one = asyncio.create_task(swappable.swap(second))
        await second.started.wait()
        two = asyncio.create_task(swappable.swap(third))
        await turns()
    await asyncio.wait({one, two})
    assert isinstance(one.exception(), StartupInterruptedError)
    with pytest.raises(RuntimeError, match="for the time between"):
        two.result()
    assert third.events == []


# What the server sees.


async def test_a_first_app_that_fails_to_start_has_failed() -> None:
    """With its own exception as the cause."""
    app = Named("first", "raises")
    with pytest.raises(StartupError, match="the app's lifespan failed to start: AppError: the app's own") as caught:
        await start(Swappable(app))
    assert caught.value.__cause__ is app.error


async def test_a_first_app_that_does_not_say_why_it_fails_has_failed() -> None:
    """With what there is to be said."""
    with pytest.raises(StartupError, match=r"failed to start: .*as told") as caught:
        await start(Swappable(Named("first", "fails quietly")))
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("swapped", [False, True], ids=["the first app", "another app"])
async def test_an_app_that_fails_to_shut_down_has_failed(swapped: bool) -> None:
    """With its own exception as the cause."""
    app = Named("other", shutdown="raises")
    swappable = Swappable(Named("first") if swapped else app)
    with pytest.raises(ShutdownError, match="failed to shut down: AppError: the app's own") as caught:
        async with serving(swappable):
            if swapped:
                await swappable.swap(app)
    assert caught.value.__cause__ is app.error


@pytest.mark.parametrize("swapped", [False, True], ids=["the first app", "another app"])
async def test_an_app_whose_lifespan_dies_crashes_the_server(swapped: bool) -> None:
    """With the app's own exception as the cause; and nothing can be swapped any more."""
    app = Named("other")
    swappable = Swappable(Named("first") if swapped else app)
    with pytest.raises(ServerCrashedError) as caught:
        async with serving(swappable) as server:
            if swapped:
                await swappable.swap(app)
            app.crash.set()
            await server.wait_closed()
    assert caught.value.__cause__ is app.error
    assert app.life == ["startup", "lifespan over"]
    with pytest.raises(RuntimeError, match="for the time between"):
        await swappable.swap(Named("third"))


async def test_a_crash_ends_a_new_app_that_is_about_to_start() -> None:
    """Nothing half started stays."""
    first, second = Named("first"), Named("other", "hangs")
    swappable = Swappable(first)
    server = await start(swappable)
    async with swapping(swappable, second) as swap:
        await second.started.wait()
        first.crash.set()
    with pytest.raises(StartupInterruptedError):
        swap.result()
    with pytest.raises(ServerCrashedError):
        await server.aclose()
    assert second.life == ["startup", "lifespan over"]


async def test_a_death_at_every_turn_of_a_swap_is_the_servers_or_the_old_apps() -> None:
    """Before the switch the server has crashed, and after it the swap has failed; there is nothing in between."""
    outcomes = set()
    for turn in range(MANY_TURNS):
        first, second = Slow("first"), Slow("other")
        swappable = Swappable(first)
        server = await start(swappable)
        task = asyncio.create_task(swappable.swap(second))
        after(turn, first.crash.set)
        await asyncio.wait({task})
        await turns()
        error = task.exception()
        if isinstance(error, StartupInterruptedError):
            with pytest.raises(ServerCrashedError):
                await server.aclose()
            assert swappable.app is first
        else:
            assert (await get(server)).text == "other"
            assert isinstance(error, ShutdownError | None)
            await server.aclose()
            assert second.life == WHOLE_LIFE
        assert first.has_ended_if_begun()
        assert second.has_ended_if_begun()
        outcomes.add(type(error))
    assert outcomes == {StartupInterruptedError, ShutdownError, type(None)}


async def test_a_stop_interrupts_the_start_of_a_new_app() -> None:
    """The old one ends, and whoever swaps hears why."""
    first, second = Named("first"), Named("other", "hangs")
    swappable = Swappable(first)
    async with serving(swappable):
        task = asyncio.create_task(swappable.swap(second))
        await second.started.wait()
    await asyncio.wait({task})
    assert isinstance(task.exception(), StartupInterruptedError)
    assert (first.life, second.life) == (WHOLE_LIFE, ["startup", "lifespan over"])


async def test_a_stop_at_every_turn_of_a_swap_ends_both_apps() -> None:
    """Each once, whichever is the current one."""
    outcomes = set()
    for turn in range(MANY_TURNS):
        first, second = Slow("first"), Slow("other")
        swappable = Swappable(first)
        async with serving(swappable) as server:
            task = asyncio.create_task(swappable.swap(second))
            after(turn, server.close)
            await server.wait_closed()
        await asyncio.wait({task})
        error = task.exception()
        assert error is None or isinstance(error, StartupInterruptedError)
        assert first.life == WHOLE_LIFE
        assert second.has_ended_if_begun()
        assert error is not None or second.life == WHOLE_LIFE
        outcomes.add(error is None)
    assert outcomes == {True, False}


async def test_a_stop_does_not_wait_for_what_the_server_has_given_up() -> None:
    """A handler that clings has had its time when the lifespan is told to end."""
    app = Named("first")
    swappable = Swappable(app)
    async with serving(swappable, shutdown_timeout=0) as server, connect(server) as connection:
        connection.ask("/cling")
        await app.holding.wait()
        async with swapping(swappable, Named("other"), shutdown_timeout=None) as swap:
            await turns()
            await server.aclose()
        swap.result()
    assert app.life == WHOLE_LIFE
    app.release.set()
    await turns()


async def test_a_shutdown_that_hangs_is_cancelled_by_the_server() -> None:
    """In its own time: the cancellation is passed on."""
    app = Named("first", shutdown="hangs")
    with pytest.raises(ShutdownError) as caught:
        async with serving(Swappable(app), shutdown_timeout=0) as server:
            pass
    assert isinstance(caught.value.__cause__, TimeoutError)
    assert server.report is not None
    assert not server.report.lifespan_stuck
    assert app.life == WHOLE_LIFE


async def test_served_again_it_begins_with_its_last_app() -> None:
    """One server after the other."""
    first, second = Named("first"), Named("other")
    swappable = Swappable(first)
    async with serving(swappable):
        await swappable.swap(second)
    async with serving(swappable) as server:
        assert (await get(server)).text == "other"
    assert (first.life, second.life) == (WHOLE_LIFE, WHOLE_LIFE * 2)


async def test_when_its_server_has_stopped_it_is_as_before() -> None:
    """Nothing stays of what its apps' lifespans have made."""
    swappable = Swappable(Named("first"))
    async with serving(swappable) as server:
        assert (await get(server)).text == "first"
    async with serving(swappable, lifespan="off") as server:
        assert (await get(server)).text == "hello"


async def test_it_is_for_one_server_at_a_time() -> None:
    """The second one cannot start."""
    swappable = Swappable(Named("first"))
    async with serving(swappable) as server:
        with pytest.raises(StartupError, match="a Swappable is for one server at a time"):
            await start(swappable)
        assert (await get(server)).text == "first"


def test_a_loop_that_ends_early_ends_the_app_in_order() -> None:
    """`asyncio.run` cancels every task at its end, the apps' own among them; the last request is over before."""
    events = []
    asked = asyncio.Event()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            yield
            events.append("in order")
        finally:
            events.append("over")

    app = FastAPI(lifespan=lifespan)

    @app.get("/")
    async def hold() -> None:
        asked.set()
        try:
            await asyncio.Event().wait()
        finally:
            await turns(5)
            events.append("tidied up")

    async def main() -> socket.socket:
        swappable = Swappable(without_lifespan)
        server = await start(swappable)
        await swappable.swap(app)
        client = socket.create_connection((server.host, server.port))
        client.sendall(b"GET / HTTP/1.1\r\nhost: test\r\n\r\n")
        await asked.wait()
        return client

    asyncio.run(main()).close()
    assert events == ["tidied up", "in order", "over"]


async def test_under_uvicorns_own_server_it_is_the_same() -> None:
    """It is an ASGI app, and knows nothing of the server."""
    first, second = Named("first"), Named("other")
    swappable = Swappable(first)
    async with Plain(swappable) as server:
        reader, writer = await asyncio.open_connection(server.host, server.port)
        connection = Connection(reader, writer)
        connection.ask("/")
        assert await connection.reader.readuntil(b"first")
        connection.ask("/hold")
        await first.holding.wait()
        async with swapping(swappable, second, shutdown_timeout=0) as swap:
            assert (await connection.reader.readuntil(b"ask again.\n")).startswith(b"HTTP/1.1 503")
        swap.result()
        connection.ask("/")
        assert await connection.reader.readuntil(b"other")
        writer.close()
        await writer.wait_closed()
    assert (first.life, second.life) == (WHOLE_LIFE, WHOLE_LIFE)


@pytest.mark.parametrize("lifespan", ["on", "auto"])
async def test_under_uvicorns_own_server_a_failing_shutdown_is_reported(
    lifespan: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """In uvicorn's own way, which is to log what it was told."""
    app = Named("first", shutdown="raises")
    async with Plain(Swappable(app), lifespan=lifespan):
        pass
    assert "the app's lifespan failed to shut down: AppError: the app's own" in caplog.text
    assert app.life == WHOLE_LIFE


async def test_under_uvicorns_own_server_a_death_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    """In uvicorn's own way; it goes on all the same."""
    app = Named("first")
    async with Plain(Swappable(app), lifespan="on"):
        app.crash.set()
        await turns()
    assert "Exception in 'lifespan' protocol" in caplog.text
    assert "AppError: the app's own" in caplog.text
    assert app.life == ["startup", "lifespan over"]


@pytest.mark.parametrize("when", ["while it serves", "while it shuts down"])
async def test_a_cancelled_lifespan_of_the_server_leaves_no_app_behind(when: str) -> None:
    """As when a loop ends that runs another server; the app's lifespan ends, and then the cancellation goes on."""
    app = Named("first", shutdown="clings")
    told = asyncio.Queue[dict[str, Any]]()
    said: list[str] = []

    async def send(message: Any) -> None:
        said.append(message["type"])

    scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}
    lifespan = asyncio.create_task(Swappable(app)(scope, told.get, send))
    told.put_nowait({"type": "lifespan.startup"})
    await turns()
    assert said == ["lifespan.startup.complete"]
    if when == "while it shuts down":
        told.put_nowait({"type": "lifespan.shutdown"})
        await app.holding.wait()
    else:
        app.release.set()
    lifespan.cancel()
    await turns()
    app.release.set()
    await asyncio.wait({lifespan})
    assert lifespan.cancelled()
    assert app.life == WHOLE_LIFE
    assert said == ["lifespan.startup.complete"]


# What only shows when somebody is quick.


async def test_a_websocket_whose_app_never_stops_sending_is_told_to_come_again() -> None:
    """With 1012 as well, though its handler ends at the next thing that it sends."""

    async def chatty(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return
        await receive()
        await send({"type": "websocket.accept"})
        while True:
            await send({"type": "websocket.send", "text": "tick"})
            await asyncio.sleep(0)

    swappable = Swappable(chatty)
    async with serving(swappable) as server:
        async with connect_websocket(server.url.replace("http", "ws"), proxy=None) as client:
            await client.recv()
            swapping = asyncio.create_task(swappable.swap(App()))
            with pytest.raises(ConnectionClosed) as caught:
                while True:
                    await client.recv()
            assert caught.value.rcvd is not None
            assert caught.value.rcvd.code == 1012
            await swapping


async def test_an_app_that_dies_during_a_swap_crashes_the_server_and_not_the_swap() -> None:
    """Whoever swaps in the body of the server's block gets the server's error, with the app's own as its cause."""
    app = App()
    swappable = Swappable(app)
    with pytest.raises(ServerCrashedError) as caught:
        async with serving(swappable):
            after(5, app.crash.set)
            await swappable.swap(App("hangs"))
    assert caught.value.__cause__ is app.error


async def test_a_swap_that_the_death_of_the_app_interrupts_says_so() -> None:
    """Where nobody is cancelled by it."""
    app = App()
    swappable = Swappable(app)
    server = await start(swappable)
    after(5, app.crash.set)
    with pytest.raises(StartupInterruptedError, match="the current app's lifespan died, and so the server ends"):
        await swappable.swap(App("hangs"))
    with pytest.raises(ServerCrashedError):
        await server.aclose()


@pytest.mark.parametrize("loop_name", [name for name in LOOPS if name in ("asyncio", "eager")])
async def test_a_lifespan_that_swaps_is_refused_in_its_first_step(loop_name: str) -> None:
    """Also where tasks begin at once."""
    swappable = Swappable(App())

    async def swapping(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await swappable.swap(App())

    async with serving(swappable):
        with pytest.raises(StartupError, match="would wait for itself"):
            await swappable.swap(swapping)
