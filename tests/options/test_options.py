"""
Invalid options are refused before anything starts; each option of uvicorn is passed on, or refused with a reason.
"""

from __future__ import annotations

import inspect
import math
import ssl
from typing import Any

import pytest
import uvicorn

from aioserve import Options, _options, serving, start
from aioserve._settings import parse
from tests.helpers.apps import App
from tests.helpers.clients import get

OURS = {
    "host",
    "port",
    "reuse_port",
    "uds",
    "uds_mode",
    "fd",
    "sockets",
    "systemd",
    "ssl",
    "lifespan",
    "header_timeout",
    "cancel_on_disconnect",
    "startup_timeout",
    "shutdown_timeout",
    "drain_delay",
    "disconnect_after",
    "stop_on_signals",
    "factory",
}
BY_UVICORN = set(inspect.signature(uvicorn.Config).parameters) - {"app"}

BAD: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "misspelt": (App, {"prot": 8000}, TypeError, "no option 'prot'; did you mean 'port'?"),
    "unheard of": (
        App,
        {"zzz": "red"},
        TypeError,
        r"^there is no option 'zzz'; help\(aioserve\.serving\) lists all options$",
    ),
    "refused": (App, {"workers": 4}, TypeError, "'workers' .* no worker processes"),
    "renamed": (
        App,
        {"timeout_graceful_shutdown": 3},
        TypeError,
        "^there is no option 'timeout_graceful_shutdown'; aioserve calls the same option 'shutdown_timeout'$",
    ),
    "port too high": (App, {"port": 70000}, ValueError, "port must be from 0 to 65535, not 70000"),
    "port negative": (App, {"port": -1}, ValueError, "-1"),
    "port a string": (App, {"port": "8000"}, TypeError, "port must be an int, not '8000'"),
    "port a bool": (App, {"port": True}, TypeError, "port must be an int, not True"),
    "host empty": (App, {"host": ""}, ValueError, "None is every interface"),
    "host a number": (App, {"host": 127}, TypeError, "not 127"),
    "host bytes": (App, {"host": b"127.0.0.1"}, TypeError, "not b'127.0.0.1'"),
    "hosts none": (App, {"host": []}, ValueError, "empty sequence"),
    "hosts a number": (App, {"host": ["127.0.0.1", 5]}, TypeError, "not 5"),
    "host with a port": (App, {"host": "127.0.0.1:8000"}, ValueError, "bare name or address, not '127.0.0.1:8000'"),
    "host in brackets": (App, {"host": "[::1]"}, ValueError, "bare name or address, not '.::1.'"),
    "host a url": (App, {"host": "http://localhost"}, ValueError, "bare name or address, not 'http://localhost'"),
    "uds bytes": (App, {"uds": b"x"}, TypeError, "uds must be a path, .* not b'x'"),
    "uds empty": (App, {"uds": ""}, ValueError, "uds must be the path of a file, not ''"),
    "uds abstract": (App, {"uds": "\0x"}, ValueError, "uds must be the path of a file"),
    "mode without uds": (App, {"uds_mode": 0o600}, TypeError, "uds_mode requires uds"),
    "mode a string": (App, {"uds": "x", "uds_mode": "660"}, TypeError, "int like 0o660, not '660'"),
    "mode in decimal": (App, {"uds": "x", "uds_mode": 660}, ValueError, "not 0o1224"),
    "mode negative": (App, {"uds": "x", "uds_mode": -1}, ValueError, "not -0o1"),
    "reuse_port a number": (App, {"reuse_port": 1}, TypeError, "reuse_port must be bool, not 1"),
    "fd a string": (App, {"fd": "3"}, TypeError, "number of a descriptor, not '3'"),
    "fd a bool": (App, {"fd": True}, TypeError, "not True"),
    "fd negative": (App, {"fd": -1}, ValueError, "from 0 on, not -1"),
    "systemd a number": (App, {"systemd": 3}, TypeError, "systemd must be True, False or the name .* not 3"),
    "systemd empty": (App, {"systemd": ""}, ValueError, "not ''; True is for all"),
    "systemd and sockets": (App, {"systemd": True, "sockets": [1]}, TypeError, "must be a sequence of sockets"),
    "sockets none": (App, {"sockets": []}, ValueError, "sockets is an empty sequence"),
    "sockets something else": (App, {"sockets": [1]}, TypeError, "must be a sequence of sockets, not .1."),
    "ssl something else": (App, {"ssl": True}, TypeError, "ssl must be an ssl.SSLContext, not True"),
    "ssl for clients": (App, {"ssl": ssl.create_default_context()}, ValueError, "a context for clients"),
    "ssl twice": (
        App,
        {"ssl": ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), "ssl_certfile": "x"},
        TypeError,
        "pass either ssl or ssl_certfile, not both",
    ),
    "host with a null": (App, {"host": "local\0host"}, ValueError, "null"),
    "timeout negative": (
        App,
        {"shutdown_timeout": -1},
        ValueError,
        "shutdown_timeout must be 0 or more seconds, not -1",
    ),
    "timeout no number": (App, {"startup_timeout": "60"}, TypeError, "number of seconds or None, not '60'"),
    "drain without end": (App, {"drain_delay": None}, ValueError, "drain_delay must be a limited number"),
    "patience negative": (
        App,
        {"disconnect_after": -1},
        ValueError,
        "disconnect_after must be 0 or more seconds, not -1",
    ),
    "timeout nan": (App, {"startup_timeout": math.nan}, ValueError, "nan"),
    "timeout a bool": (App, {"startup_timeout": True}, TypeError, "True"),
    "lifespan": (App, {"lifespan": "of"}, ValueError, "lifespan must be one of 'auto', 'on', 'off', not 'of'"),
    "interface": (App, {"interface": "asgi4"}, ValueError, "interface must be one of"),
    "log level": (App, {"log_level": "loud"}, ValueError, "log_level must be one of"),
    "protocol": (App, {"http": "h12"}, ValueError, "http must be one of"),
    "a string for a number": (App, {"backlog": "5"}, TypeError, "backlog must be int, not '5'"),
    "no requests at all": (App, {"limit_max_requests": 0}, ValueError, "limit_max_requests must be 1 or more.*not 0"),
    "more than a kernel takes": (App, {"backlog": 10**400}, ValueError, "backlog must be 1 or more"),
    "capitals": (App, {"lifespan": "ON"}, ValueError, "lifespan must be one of 'auto', 'on', 'off', not 'ON'"),
    "no lifespan mode": (App, {"lifespan": None}, TypeError, "lifespan must be one of 'auto', 'on', 'off', not None"),
    "no protocol": (App, {"http": int}, TypeError, "http must be one of .*not <class 'int'>"),
    "a bool for a number": (
        App,
        {"limit_concurrency": True},
        TypeError,
        "limit_concurrency must be int or None, not True",
    ),
    "a number for a bool": (App, {"factory": 1}, TypeError, "factory must be bool, not 1"),
    "a number for a string": (App, {"root_path": 1}, TypeError, "root_path must be str, not 1"),
    "key without certificate": (App, {"ssl_keyfile": "key.pem"}, TypeError, "ssl_keyfile requires ssl_certfile"),
    "app none": (lambda: None, {}, TypeError, "^not an ASGI app: None$"),
    "app no import string": (
        lambda: "tests.helpers.apps",
        {},
        ValueError,
        "package.module:attribute.*'tests.helpers.apps' does not",
    ),
}


@pytest.mark.parametrize(("app", "options", "error", "text"), BAD.values(), ids=BAD)
async def test_invalid_option_is_refused_before_anything_starts(
    app: Any, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    """The error names the option and the value, and says what to do."""
    made = app()
    with pytest.raises(error, match=text):
        async with serving(made, **options):
            raise AssertionError
    if isinstance(made, App):
        assert made.events == []


def test_options_are_those_of_uvicorn_without_the_refused_ones() -> None:
    """A new uvicorn may have new options: they have to be added, or refused with a reason."""
    known = set(Options.__optional_keys__)
    assert BY_UVICORN - known - set(_options.REFUSED) == set(_options.RENAMED)
    if tuple(map(int, uvicorn.__version__.split(".")[:2])) >= (0, 54):  # older ones lack some
        assert known - BY_UVICORN == OURS - BY_UVICORN
        assert set(_options.REFUSED) <= BY_UVICORN


@pytest.mark.parametrize("name", sorted(_options.REFUSED))
async def test_refused_option_names_its_reason(name: str) -> None:
    """The error names the option and says why."""
    with pytest.raises(TypeError, match=f"option '{name}' .*: {_options.REFUSED[name][:20]}"):
        options: Any = {name: 1}
        await start(App(), **options)


async def test_option_that_the_installed_uvicorn_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the installed version."""
    monkeypatch.setattr(_options, "config_parameters", lambda: {"host", "port"})
    with pytest.raises(TypeError, match=f"'root_path' needs a newer uvicorn than the {uvicorn.__version__}"):
        await start(App(), root_path="/api")


async def test_timeout_of_none_or_infinity_is_no_limit() -> None:
    """Both mean to wait as long as it takes."""
    for timeout in (None, math.inf, 10**400):
        async with serving(App(), startup_timeout=timeout, shutdown_timeout=timeout) as server:
            assert (await get(server)).text == "hello"


async def test_options_of_uvicorn_are_passed_to_it() -> None:
    """Here: an additional header, and no server header."""
    async with serving(App(), headers=[("x-from", "aioserve")], server_header=False, date_header=False) as server:
        response = await get(server)
    assert response.headers["x-from"] == "aioserve"
    assert "server" not in response.headers
    assert "date" not in response.headers


async def test_import_string_is_imported_and_factory_called() -> None:
    """As on uvicorn's command line."""
    async with serving("tests.helpers.apps:factory", factory=True) as server:
        assert (await get(server)).text == "hello"
    async with serving("tests.helpers.apps:without_lifespan") as server:
        assert (await get(server)).text == "hello"


async def test_uvicorn_config_is_served_as_it_is() -> None:
    """A program that has a `uvicorn.Config` only changes the line that runs it."""
    app = App()
    config = uvicorn.Config(app, host="127.0.0.2", port=0, headers=[("x-from", "config")], log_config=None)
    async with serving(config) as server:
        assert server.host == "127.0.0.2"
        assert server.uvicorn.config is config
        assert (await get(server)).headers["x-from"] == "config"


async def test_uvicorn_config_can_be_served_twice() -> None:
    """It is loaded once; each server runs the lifespan again."""
    app = App()
    config = uvicorn.Config(app, port=0, log_config=None)
    for _ in range(2):
        async with serving(config) as server:
            assert (await get(server)).text == "hello"
    assert app.events.count("startup") == 2


@pytest.mark.parametrize("name", ["host", "port", "lifespan", "factory", "root_path"])
async def test_option_that_a_uvicorn_config_has_cannot_be_given_beside_it(name: str) -> None:
    """There would be two values for it."""
    options: Any = {name: "x"}
    with pytest.raises(TypeError, match=f"{name} cannot be given together with a uvicorn.Config"):
        await start(uvicorn.Config(App(), log_config=None), **options)


async def test_timeout_graceful_shutdown_of_a_config_is_the_shutdown_timeout() -> None:
    """Where it is None, `shutdown_timeout` has its own default."""
    config = uvicorn.Config(App(), port=0, log_config=None, timeout_graceful_shutdown=3)
    assert parse(config, {}).shutdown_timeout == 3
    with pytest.raises(
        TypeError, match="pass either shutdown_timeout or the Config's timeout_graceful_shutdown, not both"
    ):
        parse(config, {"shutdown_timeout": 5})

    config = uvicorn.Config(App(), port=0, log_config=None)
    assert parse(config, {}).shutdown_timeout == 10.0
    assert parse(config, {"shutdown_timeout": 5}).shutdown_timeout == 5


async def test_settings_of_a_config_that_cannot_be_used_are_ignored_with_one_warning() -> None:
    """The program goes on."""
    config = uvicorn.Config("tests.helpers.apps:without_lifespan", port=0, log_config=None, workers=2)
    config.reload = True  # passed to the constructor, it would read the directories
    with pytest.warns(UserWarning, match=r"ignored reload and workers of the uvicorn\.Config") as warned:
        async with serving(config) as server:
            assert (await get(server)).text == "hello"
    (ours,) = (each for each in warned if "uvicorn.Config" in str(each.message))  # uvicorn may warn as well
    assert ours.filename == __file__
