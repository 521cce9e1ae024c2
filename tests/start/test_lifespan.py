"""
The app's lifespan: what counts as having none, what as a failure, and what the handlers see of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
from collections.abc import AsyncIterator
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request
from starlette.applications import Starlette

from aioserve import ServerCrashedError, ShutdownError, StartupError, serving, start
from tests.helpers.apps import App, AppError, without_lifespan
from tests.helpers.clients import get

pytestmark = pytest.mark.usefixtures("short_grace")


async def refuses_the_scope(scope: Any, receive: Any, send: Any) -> None:
    assert scope["type"] == "http"
    await without_lifespan(scope, receive, send)


async def swallows_the_refusal(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "http":
        await without_lifespan(scope, receive, send)
        return
    with contextlib.suppress(RuntimeError):
        await without_lifespan(scope, receive, send)


async def changes_the_refusal(scope: Any, receive: Any, send: Any) -> None:
    try:
        await without_lifespan(scope, receive, send)
    except RuntimeError as exc:
        raise AppError("something else") from exc


WITHOUT = {
    "refuses the scope": refuses_the_scope,
    "takes it for a request": without_lifespan,
    "and swallows our refusal": swallows_the_refusal,
    "and raises something else": changes_the_refusal,
    "returns without a word": App("returns"),
    "raises before receive": App("raises early"),
}


@pytest.mark.parametrize("app", WITHOUT.values(), ids=WITHOUT)
async def test_app_without_a_lifespan_is_served_with_lifespan_auto(app: Any) -> None:
    """No shutdown is sent to it."""
    async with serving(app) as server:
        assert (await get(server)).text == "hello"


FAILING = ["refuses the scope", "takes it for a request", "and raises something else", "raises before receive"]


@pytest.mark.parametrize("app", [WITHOUT[name] for name in FAILING], ids=FAILING)
async def test_app_without_a_lifespan_fails_to_start_with_lifespan_on(app: Any) -> None:
    """Every exception is a failure then."""
    with pytest.raises(StartupError, match="the app's lifespan failed to start: "):
        async with serving(app, lifespan="on"):
            raise AssertionError


async def test_lifespan_off_does_not_call_the_apps_lifespan() -> None:
    """Not even one that would fail."""
    app = App("raises")
    async with serving(app, lifespan="off") as server:
        assert (await get(server)).text == "hello"
    assert app.events == ["GET /", "answered /"]


async def test_handlers_get_the_state_of_the_lifespan_and_their_server() -> None:
    """In `request.state`; each request has its own copy."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, str]]:
        yield {"database": "connected"}

    app = FastAPI(lifespan=lifespan)

    @app.get("/")
    async def look(request: Request) -> dict[str, str]:
        return {"database": request.state.database, "server": request.state.aioserve.url}

    async with serving(app) as server:
        assert (await get(server)).json() == {"database": "connected", "server": server.url}
        assert server.state == {"database": "connected", "aioserve": server}


@pytest.mark.parametrize("where", ["startup", "serving", "shutdown"])
async def test_exception_in_a_frameworks_lifespan_is_the_cause_of_the_error(where: str) -> None:
    """Starlette sends a message with a traceback and then raises: the very exception object is the cause."""
    error, crash = AppError("no database"), asyncio.Event()

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async def fail() -> None:
            await crash.wait()
            raise error

        if where == "startup":
            raise error
        if where == "shutdown":
            yield
            raise error
        async with asyncio.TaskGroup() as group:
            group.create_task(fail())
            yield

    expected = {"startup": StartupError, "serving": ServerCrashedError, "shutdown": ShutdownError}[where]
    with pytest.raises(expected) as caught:
        async with serving(Starlette(lifespan=lifespan)) as server:
            crash.set()
            if where == "serving":
                await server.wait_closed()

    cause = caught.value.__cause__
    assert (cause.exceptions[0] if isinstance(cause, ExceptionGroup) else cause) is error


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()], ids=repr)
async def test_app_that_raises_system_exit_at_startup_does_not_end_the_program(error: BaseException) -> None:
    """It has failed to start, and the error has the exception as its cause."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        raise error

    with pytest.raises(StartupError) as caught:
        await start(app)
    assert caught.value.__cause__ is error


async def test_lifespan_that_returns_after_the_startup_is_no_crash() -> None:
    """It only has nothing to do at the end."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await without_lifespan(scope, receive, send)
            return
        await receive()
        await send({"type": "lifespan.startup.complete"})

    async with serving(app) as server:
        assert (await get(server)).text == "hello"
        assert server.is_serving()


async def test_handlers_have_the_context_variables_of_the_starter_and_of_the_lifespan() -> None:
    """A handler changes them neither for the next one nor for the task that has started the server."""

    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="nothing")
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((scope["type"], variable.get()))
        variable.set(f"set by the {scope['type']}")
        if scope["type"] == "http":
            await without_lifespan(scope, receive, send)
            return
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()

    variable.set("the starter's")
    async with serving(app) as server:
        await get(server)
        await get(server)

    # Before uvicorn had the option reset_contextvars, it gave each request an empty context.
    inherited = "reset_contextvars" in inspect.signature(uvicorn.Config).parameters
    request = ("http", "set by the lifespan" if inherited else "nothing")
    assert seen == [("lifespan", "the starter's"), request, request]
    assert variable.get() == "the starter's"
