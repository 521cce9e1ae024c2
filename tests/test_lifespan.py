"""
The app's lifespan: what counts as doing without one, what as a failure, and what its handlers see of it.
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
from tests.apps import App, AppError, without_lifespan
from tests.clients import get

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
async def test_an_app_can_do_without_a_lifespan(app: Any) -> None:
    """With "auto" it is served; at the end there is nothing to tell it."""
    async with serving(app) as server:
        assert (await get(server)).text == "hello"


FAILING = ["refuses the scope", "takes it for a request", "and raises something else", "raises before receive"]


@pytest.mark.parametrize("app", [WITHOUT[name] for name in FAILING], ids=FAILING)
async def test_with_on_an_app_must_not_do_without(app: Any) -> None:
    """Every exception is a failure then."""
    with pytest.raises(StartupError, match="the app's lifespan failed to start: "):
        async with serving(app, lifespan="on"):
            raise AssertionError


async def test_with_off_the_app_is_not_asked() -> None:
    """Not even one that would fail."""
    app = App("raises")
    async with serving(app, lifespan="off") as server:
        assert (await get(server)).text == "hello"
    assert app.events == ["GET /", "answered /"]


async def test_handlers_see_the_lifespans_state_and_their_server() -> None:
    """As `request.state`, each request with a copy of its own."""

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
async def test_the_exception_of_a_framework_arrives_as_it_was_raised(where: str) -> None:
    """Starlette sends a message with a traceback and then raises: the object is what counts."""
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
async def test_an_app_that_exits_at_startup_does_not_take_the_program_down(error: BaseException) -> None:
    """It has failed to start, and says how."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        raise error

    with pytest.raises(StartupError) as caught:
        await start(app)
    assert caught.value.__cause__ is error


async def test_a_lifespan_that_returns_quietly_is_no_crash() -> None:
    """It has merely nothing to do at the end."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await without_lifespan(scope, receive, send)
            return
        await receive()
        await send({"type": "lifespan.startup.complete"})

    async with serving(app) as server:
        assert (await get(server)).text == "hello"
        assert server.is_serving()


async def test_a_lifespan_that_asks_for_more_is_let_go_at_once() -> None:
    """After the shutdown there is no further message, so nothing is waited for, and nothing is wrong."""
    app = App(shutdown="receives on")

    async with serving(app, shutdown_timeout=None):
        pass

    assert app.events == ["startup", "shutdown", "lifespan over"]


async def test_two_receives_at_once_both_hear_of_the_shutdown() -> None:
    """And neither counts as asking for more: the clean-up behind them is not cut short."""
    cleaned_up = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        received = await asyncio.gather(receive(), receive())
        for _ in range(10):
            await asyncio.sleep(0)
        cleaned_up.append([message["type"] for message in received])

    async with serving(app):
        pass

    assert cleaned_up == [["lifespan.shutdown", "lifespan.shutdown"]]


async def test_a_receive_that_is_given_up_loses_no_message() -> None:
    """An app may wait for the shutdown with a timeout, again and again."""
    received = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        while True:
            given_up = asyncio.ensure_future(receive())
            done, _ = await asyncio.wait({given_up}, timeout=0)
            if done:
                break
            given_up.cancel()
        received.append(given_up.result()["type"])
        await send({"type": "lifespan.shutdown.complete"})

    async with serving(app):
        for _ in range(10):
            await asyncio.sleep(0)

    assert received == ["lifespan.shutdown"]


async def test_a_shutdown_that_cannot_be_cancelled_holds_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """The block ends within its bound, and the log names what goes on."""
    app = App(shutdown="clings")

    with pytest.raises(ShutdownError, match=r"within .* s \(.*\); it was cancelled, and goes on all the same"):
        async with serving(app, shutdown_timeout=0):
            pass

    assert "the app's lifespan is stuck" in caplog.text
    (stuck,) = (task for task in asyncio.all_tasks() if task.get_name() == "aioserve lifespan")
    app.release.set()
    await asyncio.wait({stuck})


async def test_a_crash_during_the_stop_is_a_failed_shutdown() -> None:
    """The body was over by then."""
    app = App()

    with pytest.raises(ShutdownError) as caught:
        async with serving(app) as server:
            server.close()
            app.crash.set()

    assert caught.value.__cause__ is app.error


async def test_the_lifespan_shares_the_context_of_the_starter() -> None:
    """It and the handlers see the context variables of the task that started the server, and can change none."""

    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="nothing")
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((scope["type"], variable.get()))
        variable.set("changed by the app")
        if scope["type"] == "http":
            await without_lifespan(scope, receive, send)
            return
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()

    variable.set("the starter's")
    async with serving(app) as server:
        await get(server)

    # Before it had reset_contextvars to ask for it, uvicorn gave each request an empty context.
    inherited = "reset_contextvars" in inspect.signature(uvicorn.Config).parameters
    assert seen == [("lifespan", "the starter's"), ("http", "the starter's" if inherited else "nothing")]
    assert variable.get() == "the starter's"
