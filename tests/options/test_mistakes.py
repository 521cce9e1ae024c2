"""
The usual mistakes are told at the start, each in one line that says what to change.
"""

from __future__ import annotations

import asyncio
import gc
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import APIRouter, FastAPI
from starlette.routing import Router
from uvicorn.config import HTTP_PROTOCOLS, WS_PROTOCOLS

import tests.helpers.mistakes
from aioserve import StartupError, serving, serving_process, start
from tests.helpers import mistakes
from tests.helpers.apps import App, without_lifespan
from tests.helpers.clients import get

HERE = "tests.helpers.mistakes"
NO_APP = "is not an ASGI app, which takes the three arguments scope, receive and send"
AS_ASGI2 = "is not an `async def` function, so that uvicorn takes it for ASGI 2: pass interface='asgi3'"
WSGI = "is a WSGI app: pass a2wsgi.WSGIMiddleware(app), or interface='wsgi'"
NO_FACTORY = "is an app, not a function that makes one: leave out factory=True (--factory)"
A_CLASS = "is a class, not an app: pass an instance, or add factory=True (--factory)"

OPTIONS = {
    "timeout": "use startup_timeout or shutdown_timeout",
    "graceful_timeout": "use shutdown_timeout",
    "bind": "use host and port, or uds",
    "address": "use host",
    "unix_socket": "use uds",
    "ssl_context": "use ssl",
    "certfile": "use ssl_certfile",
    "keyfile": "use ssl_keyfile",
    "keep_alive": "use timeout_keep_alive",
    "install_signal_handlers": "use stop_on_signals",
    "debug": "use log_level='debug' for the logs, and the framework's own option for pages with tracebacks",
    "timeout_graceful_shutdown": "aioserve calls the same option 'shutdown_timeout'",
    "shutdown_timout": "did you mean 'shutdown_timeout'?",
    "zzz": "help(aioserve.serving) lists all options",
}

APPS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "WSGI function": (mistakes.wsgi, {}, f"{HERE}:wsgi {WSGI}"),
    "WSGI object": (mistakes.Wsgi(), {}, f"{HERE}:Wsgi object {WSGI}"),
    "sync function": (mistakes.no_coroutine, {}, f"{HERE}:no_coroutine {AS_ASGI2}"),
    "method": (mistakes.Application().method, {}, f"{HERE}:Application.method {AS_ASGI2}"),
    "partial": (partial(without_lifespan), {}, f"functools:partial object {AS_ASGI2}"),
    "endpoint": (mistakes.endpoint, {}, f"{HERE}:endpoint {NO_APP}"),
    "five arguments": (mistakes.five, {}, f"{HERE}:five {NO_APP}"),
    "app with factory": (without_lifespan, {"factory": True}, f"tests.helpers.apps:without_lifespan {NO_FACTORY}"),
    "framework with factory": (FastAPI(), {"factory": True}, f"fastapi.applications:FastAPI object {NO_FACTORY}"),
    "factory with arguments": (
        mistakes.five,
        {"factory": True},
        f"{HERE}:five takes arguments, and a factory is called without: pass functools.partial({HERE}:five, ...)",
    ),
    "class": (mistakes.Application, {}, f"{HERE}:Application {A_CLASS}"),
    "framework's class": (FastAPI, {}, f"fastapi.applications:FastAPI {A_CLASS}"),
    "WSGI class": (mistakes.Wsgi, {}, f"{HERE}:Wsgi {A_CLASS}"),
    "router": (
        APIRouter(),
        {},
        (
            "fastapi.routing:APIRouter object is a router, not an app: call `app.include_router(router)` on a "
            "FastAPI app, and pass that app"
        ),
    ),
    "module": (asyncio, {}, "module asyncio is not an app: pass the app in the module"),
    "async factory": (
        mistakes.make_app,
        {},
        (
            f"{HERE}:make_app is a coroutine function, not an app: pass `await make_app()`, "
            "or make the app in a plain `def`"
        ),
    ),
    "arguments with defaults": (
        mistakes.with_defaults,
        {},
        (
            f"{HERE}:with_defaults can be called without arguments, which uvicorn takes for a factory: "
            "give scope no default"
        ),
    ),
}


@pytest.mark.parametrize(("name", "hint"), OPTIONS.items(), ids=OPTIONS)
async def test_option_of_another_name_is_told_with_the_option_that_is_meant(name: str, hint: str) -> None:
    """Before any spelling distance is looked at."""
    options: Any = {name: 5}
    with pytest.raises(TypeError) as caught:
        await start(App(), **options)
    assert str(caught.value) == f"there is no option {name!r}; {hint}"


async def test_option_loop_is_refused_with_where_a_loop_is_chosen() -> None:
    """It is an option of the command line only."""
    options: Any = {"loop": "uvloop"}
    with pytest.raises(TypeError) as caught:
        await start(App(), **options)
    assert str(caught.value) == (
        "option 'loop' is not supported: the server runs in the loop that is running already; "
        "choose one with asyncio.Runner(loop_factory=...)"
    )


@pytest.mark.parametrize(("app", "options", "message"), APPS.values(), ids=APPS)
async def test_app_that_cannot_work_is_refused_with_what_to_change(
    app: Any, options: dict[str, Any], message: str
) -> None:
    """Before anything starts; uvicorn would answer each request with an error."""
    with pytest.raises(TypeError) as caught:
        await start(app, **options)
    assert str(caught.value) == message


async def test_module_that_has_an_app_is_told_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is called "app" or "application"."""
    monkeypatch.setattr(mistakes, "application", without_lifespan, raising=False)
    with pytest.raises(TypeError) as caught:
        await start(tests.helpers.mistakes)  # type: ignore[arg-type]
    assert str(caught.value) == f"module {HERE} is not an app: pass {HERE}.application"


async def test_coroutine_is_refused_and_closed() -> None:
    """So Python does not warn that it was never awaited."""
    made: Any = mistakes.make_app
    with pytest.raises(TypeError) as caught:
        await start(made())
    assert str(caught.value) == "a coroutine is not an app: write `await make_app()`, not `make_app()`"
    called: Any = without_lifespan
    with pytest.raises(TypeError) as caught:
        await start(called(None, None, None))
    assert str(caught.value) == "a coroutine is not an app: write `without_lifespan`, not `without_lifespan()`"
    with pytest.raises(TypeError, match="an app for another process must be an import string"):
        async with serving_process(made()):
            raise AssertionError
    gc.collect()  # a warning would be an error now


@pytest.mark.parametrize(
    ("app", "options", "message"),
    [
        (f"{HERE}:wsgi", {}, f"{HERE}:wsgi {WSGI}"),
        (f"{HERE}:Application", {}, f"{HERE}:Application {A_CLASS}"),
        ("tests.helpers:mistakes", {}, f"module {HERE} is not an app: pass the app in the module"),
        ("tests.helpers.apps:without_lifespan", {"factory": True}, f"tests.helpers.apps:without_lifespan {NO_FACTORY}"),
        (f"{HERE}:make_wsgi", {"factory": True}, f"{HERE}:Wsgi object {WSGI}"),
        (f"{HERE}:make_wsgi", {}, f"{HERE}:Wsgi object {WSGI}"),
    ],
)
async def test_app_that_is_imported_or_made_is_looked_at_as_well(
    app: str, options: dict[str, Any], message: str
) -> None:
    """When it is there."""
    with pytest.raises(StartupError) as caught:
        await start(app, **options)
    assert str(caught.value) == f"cannot load {app}: {message}"


async def test_app_of_a_uvicorn_config_is_looked_at_as_well() -> None:
    """But a class, which uvicorn calls, is served."""
    with pytest.raises(StartupError) as caught:
        await start(uvicorn.Config(mistakes.Wsgi(), log_config=None))
    assert str(caught.value) == f"cannot load the app: {HERE}:Wsgi object {WSGI}"
    async with serving(uvicorn.Config(mistakes.Application, port=0, log_config=None)) as server:
        assert (await get(server)).status_code == 200


@pytest.mark.parametrize(
    ("app", "options"),
    [
        (mistakes.Application(), {}),
        (mistakes.Application, {"factory": True}),
        (mistakes.Asgi2, {}),
        (mistakes.asgi2, {}),
        (mistakes.AwaitedClass, {}),
        (mistakes.make_asgi2, {}),
        (f"{HERE}:Asgi2", {}),
        (f"{HERE}:asgi2", {}),
        (f"{HERE}:make_asgi2", {"factory": True}),
        (mistakes.no_coroutine, {"interface": "asgi3"}),
        (mistakes.Application().method, {"interface": "asgi3"}),
        (partial(without_lifespan), {"interface": "asgi3"}),
    ],
)
async def test_every_kind_of_app_that_uvicorn_serves_is_served(app: Any, options: dict[str, Any]) -> None:
    """ASGI 2 and 3, by functions, objects and classes, and factories."""
    async with serving(app, **options) as server:
        assert (await get(server)).status_code == 200


async def test_router_of_starlette_is_an_app() -> None:
    """It answers, here that it has no route."""
    async with serving(Router()) as server:
        assert (await get(server)).status_code == 404


@pytest.mark.parametrize(
    ("app", "reason"),
    [
        ("nowhere:app", f"there is no module nowhere in sys.path, which begins with {Path(sys.path[0]).absolute()}"),
        ("tests.nowhere:app", f"there is no module tests.nowhere in {Path(__file__).parents[1]}"),
        (f"{HERE}.nowhere:app", f"{HERE} is not a package"),
    ],
)
async def test_missing_module_is_told_with_where_it_was_looked_for(app: str, reason: str) -> None:
    """The command line names its `--app-dir` as well."""
    with pytest.raises(StartupError) as caught:
        await start(app)
    assert str(caught.value) == f"cannot load {app}: {reason}"


async def test_file_in_place_of_a_module_is_told() -> None:
    """A shell completes it so."""
    with pytest.raises(ValueError, match="names a file") as caught:
        await start("package/module.py:app")
    assert str(caught.value) == (
        "an import string names a module, and 'package/module.py:app' names a file; write \"package.module:app\""
    )


@pytest.mark.parametrize(
    ("option", "protocol"), [("http", "httptools"), ("ws", "wsproto"), ("ws", "websockets-sansio")]
)
async def test_protocol_whose_package_is_missing_is_named_with_its_option(
    option: str, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the app is not blamed for it."""
    package = protocol.partition("-")[0]
    protocols: dict[str, Any] = {**HTTP_PROTOCOLS, **WS_PROTOCOLS}
    monkeypatch.delitem(sys.modules, protocols[protocol].partition(":")[0], raising=False)
    for name in [each for each in sys.modules if each.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    options: Any = {option: protocol}
    with pytest.raises(StartupError, match=f"^{option}='{protocol}' needs {package}, which is not installed$"):
        await start(App(), headers=[("a", "b")], **options)


async def test_module_that_the_app_lacks_is_not_taken_for_a_protocols(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody has asked for that protocol."""
    (tmp_path / "lacking.py").write_text("import zttp")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "zttp", None)
    with pytest.raises(StartupError, match=r"^cannot load lacking:app: ModuleNotFoundError: "):
        await start("lacking:app")


def needs_settings(settings: dict[str, str]) -> App:
    return App()


async def test_factory_with_an_argument_is_not_taken_for_an_app() -> None:
    """ASGI 2 apps have one argument as well, the scope."""
    name = f"{__name__}:needs_settings"
    message = f"{name} takes arguments, and a factory is called without: pass functools.partial({name}, ...)"
    with pytest.raises((StartupError, TypeError), match=f"{re.escape(message)}$"):
        await start(needs_settings, factory=True)
