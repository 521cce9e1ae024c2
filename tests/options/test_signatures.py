"""
What editors, `help()` and tracebacks show: each option with its default, its description, and the names users import.
"""

from __future__ import annotations

import asyncio
import inspect
import pickle
import pydoc
import subprocess
import sys
import typing
from functools import partial
from typing import Any

import pytest
import uvicorn

import aioserve
from aioserve import Options, _options, serve, serving, serving_process, start, start_in_thread
from aioserve._functions import describe
from aioserve._settings import parse
from tests.helpers.apps import App, without_lifespan

FUNCTIONS = [serving, start, serve, start_in_thread, serving_process]
NAMES = [each.__name__ for each in FUNCTIONS]


@pytest.mark.parametrize("function", FUNCTIONS, ids=NAMES)
def test_signature_has_every_option_with_its_default(function: Any) -> None:
    """The app can be given by its position, and each option that the installed uvicorn has by its name."""
    app, *options = inspect.signature(function).parameters.values()
    assert app.name == "app"
    assert app.kind is app.POSITIONAL_OR_KEYWORD
    if function is serve:
        assert options.pop(0).name == "task_status"
    assert {each.kind for each in options} == {inspect.Parameter.KEYWORD_ONLY}
    there = _options.config_parameters() | _options.OWN_OPTIONS
    assert [each.name for each in options] == [name for name in Options.__annotations__ if name in there]
    defaults = {each.name: each.default for each in options}
    assert defaults["host"] == "127.0.0.1"
    assert defaults["shutdown_timeout"] == 10
    assert defaults["ws_max_size"] == inspect.signature(uvicorn.Config).parameters["ws_max_size"].default


def test_defaults_of_the_signature_are_those_that_apply() -> None:
    """Each is a valid value, and makes the same settings as no value does."""
    defaults = {name: each.default for name, each in inspect.signature(serving).parameters.items() if name != "app"}
    for name, default in defaults.items():
        if name == "uds_mode":
            continue  # it requires uds
        given, without = parse(without_lifespan, {name: default}), parse(without_lifespan, {})
        assert (given.startup_timeout, given.shutdown_timeout, given.drain_delay, given.disconnect_after) == (
            without.startup_timeout,
            without.shutdown_timeout,
            without.drain_delay,
            without.disconnect_after,
        )
        assert vars(given.config) | {"loaded_app": 0} == vars(without.config) | {"loaded_app": 0} or not (
            given.config.loaded and without.config.loaded
        )


def test_signature_behaves_as_any_other() -> None:
    """It can be bound, replaced, printed, pickled, and taken of a partial function."""
    signature = inspect.signature(serving)
    assert signature.bind(App, port=8000).arguments == {"app": App, "port": 8000}
    with pytest.raises(TypeError, match="unexpected keyword argument 'prot'"):
        signature.bind(App, prot=8000)
    text = str(signature)
    assert text.startswith("(app: 'App', *, host: str | collections.abc.Sequence[str] | None = '127.0.0.1', port: int ")
    assert "uds_mode: int = 0o600" in text
    assert pickle.loads(pickle.dumps(signature)) == signature  # noqa: S301
    assert signature.replace(return_annotation=int).return_annotation is int
    assert "port" in inspect.signature(partial(serve, App)).parameters
    assert not hasattr(signature, "nothing")


def test_signature_is_made_when_it_is_looked_at() -> None:
    """An import does not wait for it."""
    program = """
import inspect
made = []
inspect_signature = inspect.signature

def signature(function, **kwargs):
    if str(getattr(function, "__module__", "")).startswith("aioserve"):  # Python's own modules look at others
        made.append(function)
    return inspect_signature(function, **kwargs)

inspect.signature = signature
from aioserve import serving, start, serve, start_in_thread, serving_process
print(len(made), len(inspect.signature(start_in_thread).parameters) > 40)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)  # noqa: S603
    assert done.stdout == "0 True\n"


@pytest.mark.parametrize("function", FUNCTIONS, ids=NAMES)
def test_help_describes_every_option(function: Any) -> None:
    """In the words of `serving()`, which has the only description."""
    text = pydoc.plain(pydoc.render_doc(function))
    assert f"function {function.__name__} in module aioserve" in text
    for line in (
        "    host: A name or an address to listen on.",
        "    shutdown_timeout: How long requests in flight may take to finish",
        "    options: The other options of `uvicorn.Config`, under their names.",
    ):
        assert line in text
    assert "app: As in" not in text
    assert "options: As in" not in text
    assert (function is serving_process) == ("Those that are objects of this process" in text)


def test_functions_are_still_what_they_were() -> None:
    """To asyncio, to `inspect` and to pickle."""
    assert inspect.iscoroutinefunction(start)
    assert inspect.iscoroutinefunction(serve)
    assert inspect.getsource(serving).startswith("@with_options()\ndef serving(")
    assert pickle.loads(pickle.dumps(serving)) is serving  # noqa: S301
    assert typing.get_type_hints(start)["return"] is aioserve.Server


@pytest.mark.parametrize("name", [name for name in aioserve.__all__ if name not in ("App", "Options")])
def test_public_names_are_shown_as_users_import_them(name: str) -> None:
    """And not by the module in which they happen to be."""
    found = getattr(aioserve, name)
    assert (found.__module__, found.__qualname__) == ("aioserve", name)
    assert pickle.loads(pickle.dumps(found)) is found  # noqa: S301
    if isinstance(found, type):
        assert repr(found) == f"<class 'aioserve.{name}'>"
        typing.get_type_hints(found)


def test_exceptions_are_shown_and_pickled_as_users_import_them() -> None:
    """Also in a program that imports nothing but `serving`."""
    program = """
import asyncio
from aioserve import serving

async def main():
    async with serving("nowhere:app"):
        pass

asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)  # noqa: S603
    assert done.stderr.splitlines()[-1].startswith("aioserve.StartupError: cannot load nowhere:app: ")
    error = pickle.loads(pickle.dumps(aioserve.StartupTimeoutError("too long")))  # noqa: S301
    assert type(error) is aioserve.StartupTimeoutError
    assert str(error) == "too long"


def test_hints_of_a_class_can_name_other_classes() -> None:
    """Which are looked for in the package, since they show as its own; here, in a program that has only this one."""
    program = "import typing; from aioserve import Report; print(typing.get_type_hints(Report)['cancelled'])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)  # noqa: S603
    assert done.stdout == "tuple[aioserve.UnfinishedHandler, ...]\n"


def test_source_of_a_class_is_not_that_of_another_place() -> None:
    """Python looks for it in the package's own file; there is none rather than a wrong one."""
    with pytest.raises(OSError, match=r"source code not available|could not find class definition"):
        inspect.getsource(aioserve.StartupError)


def test_version_is_that_of_the_installed_package() -> None:
    """It is looked up when it is asked for."""
    from importlib.metadata import version

    assert aioserve.__version__ == version("aioserve-asgi")
    assert "__version__" in dir(aioserve)


# The wrong handle.


async def test_with_in_place_of_async_with_says_what_to_write() -> None:
    """In place of Python's own message, which knows nothing of the function."""
    context: Any = serving(App())
    with pytest.raises(TypeError) as caught:
        with context:
            raise AssertionError
    assert str(caught.value) == (
        "`with serving(app)` does not work; write `async with serving(app) as server:`, "
        "or `with start_in_thread(app) as server:`"
    )
    context = serving_process("package.module:app")
    with pytest.raises(TypeError) as caught:
        with context:
            raise AssertionError
    assert str(caught.value) == (
        "`with serving_process(app)` does not work; write `async with serving_process(app) as server:`"
    )


async def test_await_in_place_of_async_with_says_what_to_write() -> None:
    """Also in `async with await serving(app)`, and as a task."""
    context: Any = serving(App())
    message = (
        "`await serving(app)` does not work; write `async with serving(app) as server:`, or `server = await start(app)`"
    )
    with pytest.raises(TypeError) as caught:
        await context
    assert str(caught.value) == message
    with pytest.raises(TypeError) as caught:
        await asyncio.gather(context)
    assert str(caught.value) == message
    context = serving_process("package.module:app")
    with pytest.raises(TypeError) as caught:
        await context
    assert str(caught.value) == (
        "`await serving_process(app)` does not work; write `async with serving_process(app) as server:`"
    )


async def test_block_that_is_entered_twice_says_what_to_write() -> None:
    """Each block needs a call."""
    context = serving(without_lifespan)
    async with context:
        pass
    with pytest.raises(RuntimeError) as caught:
        async with context:
            raise AssertionError
    assert str(caught.value) == (
        "<aioserve.serving(tests.helpers.apps:without_lifespan)> was entered before; call serving() for each block"
    )


@pytest.mark.parametrize(
    ("app", "shown"),
    [
        (without_lifespan, "tests.helpers.apps:without_lifespan"),
        (App("raises"), "tests.helpers.apps:App object"),
        ("package.module:app", "'package.module:app'"),
        (uvicorn.Config("package.module:app", log_config=None), "'package.module:app'"),
        (sys, "module sys"),
    ],
)
def test_repr_of_a_block_names_the_app(app: Any, shown: str) -> None:
    """By its module and name, by its class, or as it was given."""
    assert repr(serving(app)) == f"<aioserve.serving({shown})>"
    assert repr(serving_process(app)) == f"<aioserve.serving_process({shown})>"


@pytest.mark.parametrize("option", sorted({*_options.OWN_OPTIONS, "factory", "lifespan", "http2"}))
def test_each_option_has_a_first_sentence_for_the_help_of_the_command_line(option: str) -> None:
    """It is described in one place."""
    described = describe(aioserve.serving, option)
    assert 20 < len(described) < 100
    assert "`" not in described
    assert described.endswith(".")


def test_option_that_is_not_described_has_no_sentence() -> None:
    """As under ``-OO``."""
    assert describe(aioserve.serving, "colour") == ""
