"""
What the caller of `Swappable.swap()` sees: failures, order, and when a swap is refused.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from aioserve import (
    ShutdownError,
    StartupError,
    StartupTimeoutError,
    Swappable,
    serving,
)
from tests.conftest import LOOPS
from tests.helpers.apps import App, AppError, Receive, Scope, Send, without_lifespan
from tests.helpers.clients import connect, get
from tests.helpers.swapping import WHOLE_LIFE, Named, in_a_thread, swapping, switched
from tests.helpers.turns import turns

pytestmark = pytest.mark.usefixtures("short_grace")


@pytest.mark.parametrize("startup", ["raises", "fails", "fails quietly"])
async def test_swap_to_an_app_that_fails_to_start_keeps_the_old_app(startup: str) -> None:
    """The error is that of `serving()`, with the app's own as its cause."""
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


async def test_swap_to_an_app_that_exceeds_the_startup_timeout_keeps_the_old_app() -> None:
    """The startup of the new app has been cancelled."""
    second = Named("other", "hangs")
    swappable = Swappable(Named("first"))
    async with serving(swappable) as server:
        with pytest.raises(StartupTimeoutError, match=r"within startup_timeout=0\.05 seconds"):
            await swappable.swap(second, startup_timeout=0.05)
        assert (await get(server)).text == "first"
        assert second.life == ["startup", "lifespan over"]


async def test_swap_to_an_app_that_dies_right_after_its_startup_keeps_the_old_app() -> None:
    """The switch to the new app is never made."""
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
async def test_old_app_that_fails_to_shut_down_is_an_error_of_the_swap(shutdown: str) -> None:
    """But the new app is already there, and stays."""
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


async def test_old_app_that_dies_while_it_finishes_is_an_error_of_the_swap() -> None:
    """The server does not depend on it any more."""
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
        with pytest.raises(ShutdownError, match="the app's lifespan died before it was told to shut down") as caught:
            swap.result()
        assert caught.value.__cause__ is first.error
        assert (await get(server)).text == "other"


async def test_concurrent_swaps_wait_for_each_other() -> None:
    """Each app is served for a moment, in the order of the calls."""
    apps = [Named(f"app {number}") for number in range(5)]
    swappable = Swappable(apps[0])
    async with serving(swappable) as server:
        async with asyncio.TaskGroup() as group:
            for app in apps[1:]:
                group.create_task(swappable.swap(app))
        assert (await get(server)).text == "app 4"
        assert [app.life for app in apps] == [WHOLE_LIFE] * 4 + [["startup"]]


async def test_request_cannot_swap_the_app_that_answers_it() -> None:
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
        "swap() in a request or the lifespan of a swappable app would wait for itself; call it in a separate task"
    ]


@pytest.mark.parametrize("which", ["the running app's", "the new app's"])
async def test_lifespan_of_a_swappable_app_cannot_swap_it(which: str) -> None:
    """It would wait for itself."""
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


async def test_swap_is_refused_before_the_startup_and_from_the_shutdown_on() -> None:
    """The new app is not called."""
    second = Named("other")
    swappable = Swappable(Named("first", shutdown="hangs"))
    with pytest.raises(RuntimeError, match="works between the server's startup and its shutdown"):
        await swappable.swap(second)
    with pytest.raises(ShutdownError):
        async with serving(swappable, shutdown_timeout=0.05) as server:
            server.close()
            await turns()
            with pytest.raises(RuntimeError, match="works between the server's startup and its shutdown"):
                await swappable.swap(second)
    with pytest.raises(RuntimeError, match="works between the server's startup and its shutdown"):
        await swappable.swap(second)
    assert second.events == []


async def off() -> tuple[Any, dict[str, Any], Swappable]:
    swappable = Swappable(without_lifespan)
    return swappable, {"lifespan": "off"}, swappable


async def mounted() -> tuple[Any, dict[str, Any], Swappable]:
    swappable = Swappable(without_lifespan)
    return Starlette(routes=[Mount("/", swappable)]), {}, swappable


@pytest.mark.parametrize("make", [off, mounted], ids=lambda each: each.__name__)
async def test_swappable_without_the_servers_lifespan_cannot_be_swapped(make: Callable[[], Any]) -> None:
    """The first app is called as it is; there is no lifespan that could end another app's."""
    app, options, swappable = await make()
    async with serving(app, **options) as server:
        assert (await get(server)).text == "hello"
        with pytest.raises(
            RuntimeError, match=r'not with lifespan="off", and not where the Swappable is mounted in another app'
        ):
            await swappable.swap(Named("other"))
        assert (await get(server)).text == "hello"


async def test_swap_in_another_loop_is_refused() -> None:
    """The error says so."""
    swappable = Swappable(Named("first"))

    def elsewhere() -> None:
        with pytest.raises(RuntimeError, match=r"call swap\(\) in the event loop that the server runs in"):
            asyncio.run(swappable.swap(Named("other")))

    async with serving(swappable) as server:
        await in_a_thread(elsewhere)
        assert (await get(server)).text == "first"


async def test_invalid_argument_of_a_swap_is_refused() -> None:
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


@pytest.mark.parametrize("loop_name", [name for name in LOOPS if name in ("asyncio", "eager")])
async def test_lifespan_of_a_new_app_that_swaps_in_its_first_step_is_refused(loop_name: str) -> None:
    """Also with eager tasks."""
    swappable = Swappable(App())

    async def swapping(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await swappable.swap(App())

    async with serving(swappable):
        with pytest.raises(StartupError, match="would wait for itself"):
            await swappable.swap(swapping)
