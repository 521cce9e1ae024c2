"""Makes and loads uvicorn's Config."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import ssl
import sys
import types
from collections.abc import Mapping
from typing import Any

import uvicorn
from uvicorn.config import HTTP_PROTOCOLS, WS_PROTOCOLS
from uvicorn.importer import import_from_string
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from aioserve._errors import StartupError, describe_error
from aioserve._types import Scope

_LOGGER = logging.getLogger("uvicorn.error")
# Options that are not only remembered: they import, set up logging, read files, or call something.
_TLS = ("certfile", "keyfile", "keyfile_password", "ca_certs", "cert_reqs", "ciphers", "version", "context_factory")
_WITH_EFFECTS = frozenset({"factory", "log_config", "log_level", *(f"ssl_{name}" for name in _TLS)})


def make_config(app: Any, options: Mapping[str, Any]) -> uvicorn.Config:
    """
    Make uvicorn's Config: where possible, a copy of one that is already loaded.

    To make and load one takes half as long as all the rest of a start, and most servers of a program differ only in
    their apps.
    """
    environment = _environment(options) if _is_plain_asgi3(app) and _WITH_EFFECTS.isdisjoint(options) else None
    # There are no workers here, so uvicorn need not look for their number in the environment.
    options = {"log_config": None, "workers": 1, **options}
    if environment is not None:
        try:
            template = _template_for(environment, **options)
        except TypeError:
            template = None  # an option cannot be hashed
        if template is not None:
            return template.copy_for(app)
    return uvicorn.Config(app, **options)


def _environment(options: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """
    Return what a loaded Config depends on, besides the app and the options; `None` if a protocol is not imported yet.

    Its import takes long enough for a signal to come, so it belongs into `load_config()`.
    """
    chosen = []
    for option, protocols in (("http", HTTP_PROTOCOLS), ("ws", WS_PROTOCOLS)):
        import_string = protocols.get(options.get(option, "auto"), "")
        if import_string is not None:  # it is None for "none"
            name, _, attribute = import_string.partition(":")
            protocol = getattr(sys.modules.get(name), attribute, None)
            if protocol is None:
                return None
            chosen.append(protocol)
    trusted = os.environ.get("FORWARDED_ALLOW_IPS")
    # The level, since uvicorn wraps the app for "trace". And load(), since monitoring tools may replace it.
    return uvicorn.Config, uvicorn.Config.load, *chosen, trusted, _LOGGER.getEffectiveLevel()


def _is_plain_asgi3(app: Any) -> bool:
    """
    Whether uvicorn takes the app as it is: for ASGI 3, unless the options say otherwise, and not for a factory.

    uvicorn takes for a factory what can be called without arguments, and does not take a class for ASGI 3.
    """
    # By their very types: a proxy can claim to be of another.
    function, bound = (app, 0) if type(app) is types.FunctionType else (type(app).__call__, 1)
    if type(function) is not types.FunctionType or isinstance(app, type):
        return False
    code = function.__code__
    required = code.co_argcount - len(function.__defaults__ or ()) - bound
    return required > 0 and bool(code.co_flags & inspect.CO_COROUTINE)


class _Template:
    """A Config that is loaded, to be copied for one app after another."""

    def __init__(self, config: uvicorn.Config) -> None:
        self._attributes = vars(config)
        self._lists = [name for name, value in self._attributes.items() if isinstance(value, list)]

    def copy_for(self, app: Any) -> uvicorn.Config:
        config = uvicorn.Config.__new__(uvicorn.Config)
        config.__dict__ = attributes = self._attributes.copy()
        for name in self._lists:
            attributes[name] = attributes[name].copy()
        config.app = config.loaded_app = app
        if config.proxy_headers:
            config.loaded_app = _behind_proxies(app, config.forwarded_allow_ips)
        return config


@functools.lru_cache(typed=True)
def _template_for(_environment: tuple[Any, ...], **options: Any) -> _Template | None:
    """Load a Config with a plain app; return `None` if uvicorn wraps the app, or cannot load it, and says why later."""

    async def app(scope: Scope, receive: object, send: object) -> None:
        pass

    try:
        config = uvicorn.Config(app, **options)
        load_config(config)
    except Exception:  # noqa: BLE001
        return None
    loaded = config.loaded_app
    if config.proxy_headers:
        loaded = loaded.app
    return _Template(config) if loaded is app else None


def _behind_proxies(app: Any, trusted: list[str] | str) -> ProxyHeadersMiddleware:
    """Wrap the app as uvicorn does; but the trusted hosts are parsed once for all servers, since that takes a while."""
    middleware = ProxyHeadersMiddleware.__new__(ProxyHeadersMiddleware)
    middleware.app = app
    middleware.trusted_hosts = _trusted_hosts(trusted if isinstance(trusted, str) else tuple(trusted))
    return middleware


@functools.lru_cache
def _trusted_hosts(hosts: str | tuple[str, ...]) -> Any:
    no_app: Any = None
    return ProxyHeadersMiddleware(no_app, hosts if isinstance(hosts, str) else list(hosts)).trusted_hosts


def load_config(config: uvicorn.Config, ssl_context: ssl.SSLContext | None = None) -> None:
    """
    Import the app and all that the Config names, if that is not done, and set a ready `ssl.SSLContext`.

    It takes as long as the import takes, and blocks the loop.

    Raises:
        OSError: A certificate or key file cannot be read.
        StartupError: The app cannot be imported, its factory failed, or what it returned cannot be called.
    """
    if not config.loaded:
        _load(config)
    if ssl_context is not None:
        config.ssl = ssl_context


def _load(config: uvicorn.Config) -> None:
    for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs"):
        path = getattr(config, name)
        if path:
            with open(path, "rb"):  # for the error: ssl's own does not say which file is missing
                pass

    app = config.app if isinstance(config.app, str) else "the app"
    behind_proxies, config.proxy_headers = config.proxy_headers, False  # done below
    try:
        if isinstance(config.app, str):
            import_from_string(config.app)  # before uvicorn does it, and logs what it raises
        config.load()
    except SystemExit as exc:
        reason = exc.__context__ or exc  # uvicorn's own has a context; one of the app's is the reason itself
        raise StartupError(f"cannot load {app}: {describe_error(reason)}") from reason
    except Exception as exc:
        if isinstance(exc, ssl.SSLError) and not hasattr(config, "ssl"):  # TLS comes before the app's import
            names = ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs", "ssl_ciphers")
            given = ", ".join(f"{name}={getattr(config, name)!r}" for name in names if getattr(config, name))
            raise type(exc)(exc.errno, f"{exc.strerror or exc}; with {given}") from exc
        raise StartupError(f"cannot load {app}: {describe_error(exc)}") from exc
    finally:
        config.proxy_headers = behind_proxies

    _check_protocol(config)
    loaded = config.loaded_app
    if behind_proxies:
        config.loaded_app = _behind_proxies(loaded, config.forwarded_allow_ips)
    while type(loaded).__module__.startswith("uvicorn.middleware."):
        loaded = loaded.app
    if inspect.iscoroutine(loaded):
        loaded.close()
        raise StartupError(f"cannot load {app}: its factory is a coroutine function; it must be a plain function")
    if not callable(loaded):
        raise StartupError(f"cannot load {app}: not an ASGI app: {loaded!r}")


_KNOWN_PROTOCOLS = {
    option: {each.rpartition(":")[2] for each in protocols.values() if each}
    for option, protocols in (("http", HTTP_PROTOCOLS), ("ws", WS_PROTOCOLS))
}


def _check_protocol(config: uvicorn.Config) -> None:
    """Refuse a protocol whose connections nobody here could close in order, at the stop."""
    for option, names_known in _KNOWN_PROTOCOLS.items():
        chosen = getattr(config, f"{option}_protocol_class")
        names = {each.__name__ for each in getattr(chosen, "__mro__", ()) if each.__module__.startswith("uvicorn.")}
        if chosen is not None and not names & names_known:
            known = ", ".join(sorted(names_known))
            raise TypeError(
                f"{option}={chosen!r} cannot be served: aioserve has to know the protocol, to close its connections; "
                f"derive the class from one of uvicorn's ({known})"
            )
