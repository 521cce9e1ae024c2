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
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.config import HTTP_PROTOCOLS, WS_PROTOCOLS
from uvicorn.importer import ImportFromStringError, import_from_string
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from aioserve._errors import StartupError, describe_error

if TYPE_CHECKING:
    from aioserve._types import Scope

_LOGGER = logging.getLogger("uvicorn.error")
# Options that are not only remembered: they import, set up logging, read files, or call something.
_TLS = ("certfile", "keyfile", "keyfile_password", "ca_certs", "cert_reqs", "ciphers", "version", "context_factory")
WITH_EFFECTS: frozenset[str] = frozenset(
    {"factory", "http2", "log_config", "log_level", *(f"ssl_{name}" for name in _TLS)}
)


def make_config(app: Any, options: Mapping[str, Any]) -> uvicorn.Config:
    """
    Make uvicorn's Config: where possible, a copy of one that is already loaded.

    To make and load one takes half as long as all the rest of a start, and most servers of a program differ only in
    their apps.

    Raises:
        TypeError: The app is not one; an import string is imported later.
    """
    is_plain = _is_plain_asgi3(app)
    if (not is_plain or "factory" in options) and not isinstance(app, str):
        from aioserve._uvicorn.apps import mistake  # only for what is not as usual

        wrong = mistake(app, factory=options.get("factory", False), interface=options.get("interface", "auto"))
        if wrong:
            raise TypeError(wrong)
    environment = _environment(options) if is_plain and WITH_EFFECTS.isdisjoint(options) else None
    # There are no workers here, so uvicorn need not look for their number in the environment.
    options = {"log_config": None, "workers": 1, **options}
    if options.get("http2"):
        options["http"] = "zttp"
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
    Whether uvicorn takes the app as it is: for ASGI 3, unless the options say otherwise, and not for a factory. It is
    `False` also for what takes other arguments, and for a router of FastAPI's, which is no app.

    uvicorn takes for a factory what can be called without arguments, and does not take a class for ASGI 3.
    """
    # By their very types: a proxy can claim to be of another.
    function, bound = (app, 0) if type(app) is types.FunctionType else (type(app).__call__, 1)
    if type(function) is not types.FunctionType or isinstance(app, type) or type(app).__name__ == "APIRouter":
        return False
    code = function.__code__
    most = code.co_argcount - bound
    required = most - len(function.__defaults__ or ())
    takes_three = required <= 3 and (most >= 3 or code.co_flags & inspect.CO_VARARGS)
    return required > 0 and bool(takes_three and code.co_flags & inspect.CO_COROUTINE)


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


def load_config(config: uvicorn.Config, ssl_context: ssl.SSLContext | None = None, app_dir: str | None = None) -> None:
    """
    Import the app and all that the Config names, if that is not done, and set a ready `ssl.SSLContext`.

    It takes as long as the import takes, and blocks the loop. If there is no such module, the error names the directory
    in which the command line looks for the app.

    Raises:
        OSError: A certificate or key file cannot be read.
        StartupError: The app cannot be imported, its factory failed, or what it returned cannot be called.
    """
    if not config.loaded:
        _load(config, app_dir)
    if ssl_context is not None:
        config.ssl = ssl_context
        if protocols := getattr(config.http_protocol_class, "alpn_protocols", None):  # HTTP/2's
            ssl_context.set_alpn_protocols(protocols)


def _load(config: uvicorn.Config, app_dir: str | None) -> None:
    for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs"):
        path = getattr(config, name)
        if path:
            with open(path, "rb"):  # for the error: ssl's own does not say which file is missing
                pass

    app = config.app if isinstance(config.app, str) else "the app"
    interface = config.interface
    behind_proxies, config.proxy_headers = config.proxy_headers, False  # done below
    try:
        if getattr(config, "http2", False):
            import_from_string("uvicorn.protocols.http.auto_zttp_impl:AutoZttpProtocol")  # before the app's own code
        if isinstance(config.app, str):
            imported = _import(config.app, app_dir)  # before uvicorn does it, and logs what it raises
            _check_app(app, imported, factory=config.factory, interface=interface)
        elif config.factory:
            _check_app(app, config.app, factory=True, interface=interface)
        config.load()
    except StartupError:
        raise
    except SystemExit as exc:
        reason = exc.__context__ or exc  # uvicorn's own has a context; one of the app's is the reason itself
        raise StartupError(f"cannot load {app}: {describe_error(reason)}") from reason
    except Exception as exc:
        if isinstance(exc, ssl.SSLError) and not hasattr(config, "ssl"):  # TLS comes before the app's import
            names = ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs", "ssl_ciphers")
            given = ", ".join(f"{name}={getattr(config, name)!r}" for name in names if getattr(config, name))
            raise type(exc)(exc.errno, f"{exc.strerror or exc}; with {given}") from exc
        for option in ("http", "ws") if isinstance(exc, ModuleNotFoundError) else ():
            chosen = getattr(config, option)
            package = str(chosen).partition("-")[0]  # "websockets-sansio" is of websockets
            if package == str(getattr(exc, "name", "")).partition(".")[0]:
                what = "http2=True" if option == "http" and getattr(config, "http2", False) else f"{option}={chosen!r}"
                raise StartupError(f"{what} needs {package}, which is not installed") from exc
        raise StartupError(f"cannot load {app}: {describe_error(exc)}") from exc
    finally:
        config.proxy_headers = behind_proxies

    _check_protocol(config)
    loaded: Any = config.loaded_app
    if behind_proxies:
        config.loaded_app = _behind_proxies(loaded, config.forwarded_allow_ips)
    if type(loaded).__module__ == "uvicorn.middleware.message_logger":
        loaded = loaded.app
    is_asgi2 = config.interface == "asgi2" and type(loaded).__module__ == "uvicorn.middleware.asgi2"
    while type(loaded).__module__.startswith("uvicorn.middleware."):
        loaded = loaded.app
    if inspect.iscoroutine(loaded) and loaded is not config.app:
        loaded.close()
        raise StartupError(f"cannot load {app}: its factory is a coroutine function; it must be a plain function")
    _check_app(app, loaded, factory=False, interface=interface if is_asgi2 else config.interface)


def _import(app: str, app_dir: str | None) -> Any:
    try:
        return import_from_string(app)
    except Exception as exc:
        error = exc.__context__ if isinstance(exc, ImportFromStringError) else exc
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is None or not f"{app.partition(':')[0]}.".startswith(f"{missing}."):
            raise
        raise StartupError(f"cannot load {app}: {_where_it_is_not(missing, app_dir)}") from exc


def _where_it_is_not(missing: str, app_dir: str | None) -> str:
    parent = missing.rpartition(".")[0]
    if parent:
        folders = getattr(sys.modules.get(parent), "__path__", None)
        if folders is None:
            return f"{parent} is not a package"
        return f"there is no module {missing} in {next(iter(folders), parent)}"
    if app_dir is not None and not os.path.isdir(app_dir):
        return f"there is no directory {app_dir}; give another one to --app-dir"
    if app_dir is not None:
        return f"there is no module {missing} in {app_dir}; give another directory to --app-dir"
    return f"there is no module {missing} in sys.path, which begins with {os.path.abspath(sys.path[0])}"


def _check_app(name: str, app: Any, *, factory: bool, interface: str) -> None:
    from aioserve._uvicorn.apps import mistake  # only for an app that is imported, or not as usual

    wrong = mistake(app, factory=factory, interface=interface)
    if wrong:
        raise StartupError(f"cannot load {name}: {wrong}")


_KNOWN_PROTOCOLS = {
    option: {each.rpartition(":")[2] for each in protocols.values() if each}
    for option, protocols in (("http", HTTP_PROTOCOLS), ("ws", WS_PROTOCOLS))
}
_KNOWN_PROTOCOLS["http"] |= {"AutoZttpProtocol", "ZttpH2Protocol"}


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
