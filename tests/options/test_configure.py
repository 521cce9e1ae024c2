"""
A Config that is copied equals the Config that uvicorn would have made, for all apps, options and environments.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import ssl
import subprocess
import sys
from collections.abc import Iterator, MutableMapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from uvicorn.config import HTTP_PROTOCOLS, WS_PROTOCOLS
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.wsproto_impl import WSProtocol

from aioserve import StartupError
from aioserve._options import Options
from aioserve._uvicorn.config import load_config as load
from aioserve._uvicorn.config import make_config as configure
from tests.helpers.apps import App, Receive, Scope, Send, without_lifespan


async def with_a_default(scope: Scope, receive: Receive, send: Send, how: str = "well") -> None:
    """Serve with one argument more than needed."""


async def needs_nothing(scope: Scope | None = None, receive: Receive | None = None, send: Send | None = None) -> None:
    """Be taken for a factory: it can be called without arguments."""


class Asgi2:
    """An app of ASGI 2."""

    def __init__(self, scope: Scope) -> None:
        """Keep nothing."""

    async def __call__(self, receive: Receive, send: Send) -> None:
        """Do nothing."""


class Callable3:
    """An app that is an instance."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Do nothing."""


class Callable3Itself(type):
    """A metaclass whose classes can be called without an instance."""

    async def __call__(cls, scope: Scope, receive: Receive, send: Send) -> None:
        """Do nothing."""


class OfThat(metaclass=Callable3Itself):
    """A class that is called itself; uvicorn expects of every class that its instances are called."""


class NeedsNothing:
    """An app whose instance can be called without arguments."""

    async def __call__(self, *arguments: Any) -> None:
        """Do nothing."""


def factory() -> Any:
    """Make an app, without the option `factory`."""
    return without_lifespan


class Factory:
    """An instance that makes an app."""

    def __call__(self) -> Any:
        """Make it."""
        return without_lifespan


class WithItsOwnCall:
    """An instance whose `__call__` is its own, which Python does not call."""

    def __init__(self) -> None:
        vars(self)["__call__"] = without_lifespan

    def __call__(self) -> Any:
        """Make an app, as a factory does."""
        return with_a_default


APPS: dict[str, Any] = {
    "function": without_lifespan,
    "with a default": with_a_default,
    "instance": Callable3(),
    "FastAPI": FastAPI(),
    "class": Asgi2,
    "class that is called": OfThat,
    "factory": factory,
    "instance that makes one": Factory(),
    "its own call": WithItsOwnCall(),
    "import string": "tests.helpers.apps:without_lifespan",
}
COPIED = ("function", "with a default", "instance", "FastAPI")

OPTIONS: dict[str, Any] = {
    "access_log": False,
    "backlog": 5,
    "date_header": False,
    "forwarded_allow_ips": "10.0.0.1",
    "h11_max_incomplete_event_size": 1000,
    "headers": [("x-from", "test")],
    "http": "h11",
    "interface": "asgi2",
    "lifespan": "off",
    "limit_concurrency": 5,
    "limit_max_requests": 5,
    "limit_max_requests_jitter": 5,
    "log_level": "warning",
    "proxy_headers": False,
    "reset_contextvars": True,
    "root_path": "/root",
    "server_header": False,
    "timeout_keep_alive": 7,
    "use_colors": True,
    "ws": "none",
    "ws_max_queue": 5,
    "ws_max_size": 5,
    "ws_per_message_deflate": False,
    "ws_ping_interval": 5.0,
    "ws_ping_timeout": None,
}
# They change what an app is, the logging of the whole program, and another option's default.
EXCLUDED = {"factory", "log_config", "http2"}


@pytest.fixture(autouse=True)
def logging_stays() -> Iterator[None]:
    """Undo what a Config does to uvicorn's loggers."""
    loggers = [logging.getLogger(f"uvicorn.{name}") for name in ("error", "access", "asgi")]
    before = [(logger.level, logger.propagate, logger.handlers) for logger in loggers]
    yield
    for logger, (level, propagate, handlers) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.propagate, logger.handlers = propagate, handlers


def by_uvicorn(app: Any, options: dict[str, Any]) -> uvicorn.Config:
    config = uvicorn.Config(app, **{"log_config": None, "workers": 1, **options})
    config.load()
    return config


def by_us(app: Any, options: dict[str, Any]) -> uvicorn.Config:
    config = configure(app, options)
    load(config)
    return config


def attributes(config: uvicorn.Config) -> dict[str, Any]:
    """Return all attributes of a Config; an app in middleware is taken apart layer by layer."""
    layers = []
    layer: Any = config.loaded_app
    while type(layer).__module__.startswith("uvicorn.middleware."):
        layers.append((type(layer), {name: public(value) for name, value in vars(layer).items() if name != "app"}))
        layer = layer.app
    return vars(config) | {"loaded_app": (layers, layer)}


def public(value: Any) -> Any:
    """Return the public attributes of an object of uvicorn's, and any other object as it is."""
    if not type(value).__module__.startswith("uvicorn."):
        return value
    return {name: each for name, each in vars(value).items() if not name.startswith("_")}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of some of the protocols
@pytest.mark.parametrize("option", [None, *OPTIONS])
def test_configured_config_equals_the_one_that_uvicorn_makes(option: str | None) -> None:
    """For every kind of app, attribute by attribute, and also the second time."""
    options = {} if option is None else {option: OPTIONS[option]}
    if not options.keys() <= uvicorn.Config.__init__.__annotations__.keys():
        pytest.skip("this uvicorn is older than the option")
    for name, app in [*APPS.items()] * 2:
        assert attributes(by_us(app, options)) == attributes(by_uvicorn(app, options)), name


def test_every_option_of_uvicorn_is_in_the_table_of_options() -> None:
    """So that somebody looks at each new one: whether it does more than to be stored."""
    ours = {"host", "port", "reuse_port", "uds", "uds_mode", "fd", "sockets", "systemd", "ssl", "stop_on_signals"}
    ours |= {"startup_timeout", "shutdown_timeout", "drain_delay", "disconnect_after", "header_timeout"}
    ours |= {"cancel_on_disconnect"}
    of_uvicorn = {name for name in Options.__optional_keys__ - ours if not name.startswith("ssl_")}
    assert of_uvicorn - EXCLUDED == OPTIONS.keys()


@pytest.mark.parametrize("name", APPS)
def test_config_is_copied_for_the_usual_kinds_of_app(name: str) -> None:
    """Otherwise each start would take 1.5 times as long."""
    by_us(without_lifespan, {})
    assert configure(APPS[name], {}).loaded is (name in COPIED)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of some of the protocols
@pytest.mark.parametrize(
    ("option", "names"), [("http", {*HTTP_PROTOCOLS} - {"auto"}), ("ws", {*WS_PROTOCOLS} - {"auto"})]
)
def test_config_with_a_protocol_of_uvicorns_is_copied(option: str, names: set[str]) -> None:
    """And the protocols are not mixed up."""
    for name in names:
        by_us(without_lifespan, {option: name})
    for name in names:
        config = configure(without_lifespan, {option: name})
        assert config.loaded
        assert attributes(config) == attributes(by_uvicorn(without_lifespan, {option: name}))


@pytest.mark.parametrize("app", [needs_nothing, NeedsNothing()], ids=["function", "instance"])
def test_app_that_can_be_called_without_arguments_is_taken_for_a_factory(app: Any) -> None:
    """As by uvicorn; and then it is a factory that is a coroutine function, which is refused."""
    with pytest.raises(TypeError, match="can be called without arguments, which uvicorn takes for a factory"):
        by_us(app, {})
    with pytest.raises(StartupError, match="its factory is a coroutine function"):
        load(uvicorn.Config(app, log_config=None))


def test_forwarded_allow_ips_is_read_from_the_environment_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """It can change while a program runs."""
    for trusted in ("10.0.0.1", "10.0.0.2"):
        monkeypatch.setenv("FORWARDED_ALLOW_IPS", trusted)
        config = by_us(without_lifespan, {})
        assert config.forwarded_allow_ips == trusted
        assert attributes(config) == attributes(by_uvicorn(without_lifespan, {}))


@pytest.mark.parametrize("workers", ["4", "auto"])
def test_web_concurrency_is_ignored(workers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a setting for programs that fork; uvicorn's command line would fail if it were no number."""
    monkeypatch.setenv("WEB_CONCURRENCY", workers)
    for app in (without_lifespan, factory):
        assert by_us(app, {}).workers == 1


def test_certificate_files_are_read_each_time(tls_options: dict[str, Any]) -> None:
    """Renewed certificates are in the same files."""
    first, second = by_us(without_lifespan, tls_options), by_us(without_lifespan, tls_options)
    assert isinstance(first.ssl, ssl.SSLContext)
    assert second.ssl is not first.ssl


CHOSEN: type[asyncio.Protocol]


@pytest.mark.parametrize("option", ["http", "ws"])
def test_protocol_given_as_an_import_string_is_imported_each_time(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module can be reloaded, as in a notebook."""
    for _ in range(2):
        chosen = type("Chosen", (H11Protocol if option == "http" else WSProtocol,), {})
        monkeypatch.setattr(f"{__name__}.CHOSEN", chosen, raising=False)
        config = by_us(without_lifespan, {option: f"{__name__}:CHOSEN"})
        assert getattr(config, f"{option}_protocol_class") is chosen


@pytest.mark.parametrize("option", ["http", "ws"])
def test_protocol_that_is_not_derived_from_one_of_uvicorns_is_refused(option: str) -> None:
    """At the start, and not when it would have to be closed."""
    with pytest.raises(TypeError, match=rf"{option}=<class .*Unknown.> cannot be served: .*; derive the class"):
        by_us(without_lifespan, {option: type("Unknown", (asyncio.Protocol,), {})})


@pytest.mark.parametrize(("option", "other"), [("http", WSProtocol), ("ws", H11Protocol)])
def test_protocol_of_the_other_kind_is_refused(option: str, other: type[Any]) -> None:
    with pytest.raises(TypeError, match=f"{option}=<class .*> cannot be served"):
        by_us(without_lifespan, {option: other})


@pytest.mark.parametrize("option", ["log_level", "log_config"])
def test_logging_is_configured_each_time(option: str, tmp_path: Path) -> None:
    """Other code may have changed it in the meantime."""
    configuration = {
        "version": 1,
        "disable_existing_loggers": False,
        "loggers": {"uvicorn.error": {"level": "CRITICAL"}},
    }
    (tmp_path / "logging.json").write_text(json.dumps(configuration))
    options = {"log_level": {"log_level": "critical"}, "log_config": {"log_config": str(tmp_path / "logging.json")}}
    logger = logging.getLogger("uvicorn.error")
    for _ in range(2):
        logger.setLevel(logging.INFO)
        by_us(without_lifespan, options[option])
        assert logger.level == logging.CRITICAL


@pytest.mark.parametrize(
    "patched",
    ["uvicorn.protocols.http.auto.AutoHTTPProtocol", "uvicorn.protocols.websockets.auto.AutoWebSocketsProtocol"],
)
def test_protocol_behind_auto_is_read_each_time(patched: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some programs replace it, tests above all."""
    by_us(without_lifespan, {})
    monkeypatch.setattr(patched, type("Other", (WSProtocol if "WebSockets" in patched else H11Protocol,), {}))
    assert attributes(by_us(without_lifespan, {})) == attributes(by_uvicorn(without_lifespan, {}))


@pytest.mark.parametrize(("protocols", "other"), [(HTTP_PROTOCOLS, "h11"), (WS_PROTOCOLS, "wsproto")])
def test_table_of_protocols_is_read_each_time(
    protocols: dict[str, Any], other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The options `--http` and `--ws` of this suite rely on it."""
    by_us(without_lifespan, {})
    monkeypatch.setitem(protocols, "auto", protocols[other])
    assert attributes(by_us(without_lifespan, {})) == attributes(by_uvicorn(without_lifespan, {}))


def test_replaced_config_load_is_called_for_every_app(monkeypatch: pytest.MonkeyPatch) -> None:
    """Monitoring agents instrument apps in this way."""
    loading = uvicorn.Config.load

    def load_and_wrap(config: uvicorn.Config) -> None:
        loading(config)
        config.loaded_app = partial(config.loaded_app)

    by_us(without_lifespan, {"proxy_headers": False})
    monkeypatch.setattr(uvicorn.Config, "load", load_and_wrap)
    assert isinstance(by_us(without_lifespan, {"proxy_headers": False}).loaded_app, partial)


def test_signal_during_the_first_config_load_stops_the_start() -> None:
    """The first load imports the protocols, which takes a while."""
    program = """
import asyncio, os, signal, sys
from aioserve import serving, StartupInterruptedError

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "uvicorn.protocols.http.auto":
            os.kill(os.getpid(), signal.SIGTERM)

async def app(scope, receive, send):
    pass

async def main():
    try:
        async with serving(app, lifespan="off", stop_on_signals=True):
            pass
    except StartupInterruptedError as exc:
        print(exc)

sys.meta_path.insert(0, Finder())
asyncio.run(main())
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)  # noqa: S603
    assert done.stdout == "SIGTERM stopped the server before it had started\n"


def test_factory_that_raises_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    """With its own error."""

    def broken() -> Any:
        raise TypeError("the factory's own")

    by_us(without_lifespan, {})
    with pytest.raises(StartupError):
        by_us(broken, {"factory": True})
    (line,) = (record.getMessage() for record in caplog.records)
    assert "the factory's own" in line


def test_level_of_the_logger_is_read_each_time() -> None:
    """At the level "trace", uvicorn wraps the app."""
    logger = logging.getLogger("uvicorn.error")
    for level in (logging.INFO, 5, logging.INFO):
        logger.setLevel(level)
        assert attributes(by_us(without_lifespan, {})) == attributes(by_uvicorn(without_lifespan, {}))


def test_options_that_are_equal_and_of_different_types_are_kept_apart() -> None:
    """`1 == 1.0`, but a Config keeps the very value that it was given."""
    for interval in (1, 1.0):
        assert type(by_us(without_lifespan, {"ws_ping_interval": interval}).ws_ping_interval) is type(interval)


def test_configs_share_no_list() -> None:
    """A program that adds a header to one server's Config adds it to that server only."""
    first, second = by_us(without_lifespan, {}), by_us(without_lifespan, {})
    first.encoded_headers.append((b"x-mine", b"1"))
    first.headers.append(("x-mine", "1"))
    first.root_path = "/mine"
    assert attributes(second) == attributes(by_us(without_lifespan, {})) == attributes(by_uvicorn(without_lifespan, {}))


def test_uvicorn_config_reads_no_other_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Config can be copied as long as the variables that uvicorn reads are unchanged."""
    looked_at = set()

    class Environment(dict[str, str]):
        def __getitem__(self, name: str) -> str:
            looked_at.add(name)
            return super().__getitem__(name)

        def __contains__(self, name: object) -> bool:
            looked_at.add(str(name))
            return super().__contains__(name)

        def get(self, name: str, default: Any = None) -> Any:
            looked_at.add(name)
            return super().get(name, default)

    environment: MutableMapping[str, str] = Environment(os.environ)
    monkeypatch.setattr(os, "environ", environment)
    by_uvicorn(App(), {})
    assert looked_at <= {"FORWARDED_ALLOW_IPS"}, "A variable that changes would change nothing."
