"""
What the requests see of a swap.
"""

from __future__ import annotations

import contextlib
import contextvars
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fastapi import FastAPI, Request
from starlette.applications import Starlette
from starlette.routing import Mount

from aioserve import (
    Swappable,
    serving,
)
from tests.helpers.apps import App, AppError, Receive, Scope, Send, without_lifespan
from tests.helpers.clients import connect, get
from tests.helpers.swapping import WHOLE_LIFE, Named, sending, swapping, switched
from tests.helpers.turns import turns

pytestmark = pytest.mark.usefixtures("short_grace")


async def test_new_requests_go_to_the_new_app() -> None:
    """Also on kept-alive connections; and each app's lifespan begins and ends once."""
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


async def test_request_in_flight_is_finished_by_the_old_app() -> None:
    """Its lifespan ends after that, while new requests are answered by the new app."""
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


async def test_each_swapped_app_has_a_lifespan_state_of_its_own() -> None:
    """Each request gets a copy; the next app does not see what an app has put there."""
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
async def test_request_that_exceeds_the_budget_of_a_swap_gets_a_503(
    timeout: float, caplog: pytest.LogCaptureFixture
) -> None:
    """Its handler is cancelled and awaited before its app's lifespan ends; and the log names the request."""
    first, second = Named("first"), Named("other")
    swappable = Swappable(first)
    async with serving(swappable) as server, connect(server) as connection:
        connection.ask("/hold")
        await first.holding.wait()
        await swappable.swap(second, shutdown_timeout=timeout)
        assert first.events == ["startup", "GET /hold", "cancelled /hold", "shutdown", "lifespan over"]
        answer = await connection.reader.readuntil(b"try again.\n")
        assert answer.startswith(b"HTTP/1.1 503")
        connection.ask("/")
        assert await connection.reader.readuntil(b"other")
    assert "the replaced app: forced shutdown: 0 handlers disconnected, 1 cancelled, 0 connections" in caplog.text
    assert "(GET /hold from 127.0.0.1:" in caplog.text
    assert server.report is not None
    assert (server.report.aborted, server.report.cancelled) == (0, ())


async def test_response_that_has_begun_is_cut_off_by_a_forced_swap(caplog: pytest.LogCaptureFixture) -> None:
    """Its client can see that it is incomplete."""
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
    """An app whose handlers wait for the disconnect, and then may answer."""

    def __init__(self, name: str, answers: bool) -> None:
        super().__init__(name)
        self._answers = answers

    async def request(self, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        self.holding.set()
        self.events.append((await receive())["type"])
        self.events.append((await receive())["type"])
        if self._answers:
            await super().request(scope, receive, send)


@pytest.mark.parametrize("answers", [True, False], ids=["that answers", "that does not"])
async def test_handler_that_waits_in_receive_gets_a_disconnect_from_a_swap(answers: bool) -> None:
    """It may still answer; if it does not, its client gets a 503."""
    first = Listening("first", answers)
    swappable = Swappable(first)
    async with serving(swappable) as server, connect(server) as connection:
        connection.ask("/")
        await first.holding.wait()
        await turns()
        await swappable.swap(Named("other"), shutdown_timeout=0)
        answer = await connection.reader.readuntil(b"first" if answers else b"try again.\n")
        assert answer.startswith(b"HTTP/1.1 200" if answers else b"HTTP/1.1 503")
    assert [event for event in first.events if event.startswith("http")] == ["http.disconnect"] * 2
    assert not any(event.startswith("cancelled") for event in first.events)


async def test_handler_that_swallows_its_cancellation_does_not_block_a_swap(caplog: pytest.LogCaptureFixture) -> None:
    """The swap ends within its bound, and the log names the handler that is still running."""
    first = Named("first")
    swappable = Swappable(first)
    async with serving(swappable) as server, connect(server) as connection:
        connection.ask("/cling")
        await first.holding.wait()
        await swappable.swap(Named("other"), shutdown_timeout=0)
        assert first.life == WHOLE_LIFE
        assert re.search(r"\(GET /cling from 127.*, waiting at .*, which is still running\)", caplog.text)
        first.release.set()
        assert await connection.reader.readuntil(b"first")


async def test_timeout_error_of_the_app_or_server_is_not_taken_for_a_swaps(caplog: pytest.LogCaptureFixture) -> None:
    """In a handler and in `receive()`, an interruption by the swap and other errors can be told apart."""
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


async def test_sending_the_503_of_a_swap_is_not_cancelled() -> None:
    """It is no part of the call of the app, also if it takes its time."""
    first = Listening("first", answers=False)
    swappable = Swappable(first)

    async def slowly(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            await turns()

    async with serving(sending(swappable, slowly)) as server, connect(server) as connection:
        connection.ask("/")
        await first.holding.wait()
        await turns()
        await swappable.swap(Named("other"), shutdown_timeout=0)
        assert (await connection.reader.readuntil(b"try again.\n")).startswith(b"HTTP/1.1 503")
    assert first.life == WHOLE_LIFE


async def test_server_can_cancel_a_handler_of_a_swappable_app() -> None:
    """The cancellations of swap and server are independent."""
    app = Named("first")
    async with serving(Swappable(app), shutdown_timeout=0) as server, connect(server) as connection:
        connection.ask("/hold")
        await app.holding.wait()
    assert app.events == ["startup", "GET /hold", "cancelled /hold", "shutdown", "lifespan over"]
    assert server.report is not None
    assert [handler.path for handler in server.report.cancelled] == ["/hold"]


async def test_requests_see_the_context_variables_that_the_startup_of_their_app_has_set() -> None:
    """Those of the app that answers, and a request changes nothing for the next one."""
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="nothing")

    class Naming(App):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name
            self.seen: list[str] = []

        async def lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
            variable.set(self.name)
            await super().lifespan(scope, receive, send)

        async def request(self, scope: Scope, receive: Receive, send: Send) -> None:
            self.seen.append(variable.get())
            variable.set("a request's")
            await super().request(scope, receive, send)

    old, new = Naming("the old app's"), Naming("the new app's")
    swappable = Swappable(old)
    async with serving(swappable) as server:
        await get(server)
        await get(server)
        await swappable.swap(new)
        await get(server)
    assert old.seen == ["the old app's"] * 2
    assert new.seen == ["the new app's"]
