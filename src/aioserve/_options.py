"""
Which options exist, which are refused, and why.

Everything that can be known to be wrong before anything starts is found here, and said with the value and what to do.
"""

# No annotations from the future: a TypedDict compiles each, if it is a string, which would take a third of our import.

import asyncio
import functools
import inspect
import os
import signal
import socket
import types
import typing
import warnings
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from configparser import RawConfigParser
from ssl import PROTOCOL_TLS_CLIENT, SSLContext
from typing import IO, Any, Literal, NamedTuple, TypeAlias, TypedDict

import uvicorn

from aioserve._engine import configure
from aioserve._sockets import (
    Host,
    at_path,
    check_lent,
    on_addresses,
    on_descriptors,
    on_lent,
    on_systemds,
)

if typing.TYPE_CHECKING:
    from aioserve._sockets import Listen

Scope: TypeAlias = dict[str, Any]
Message: TypeAlias = dict[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Any]]
Send: TypeAlias = Callable[[Any], Awaitable[None]]

App: TypeAlias = Callable[..., Any] | str | uvicorn.Config
"""
What can be served: an ASGI callable, an import string, or a ready `uvicorn.Config`.

Frameworks type the messages of ASGI each in their own way; what fits all of them is a loose type.
"""


class Options(TypedDict, total=False):
    """
    The keyword arguments of `serving()`, `start()` and `serve()`: first our own, then those that go on to uvicorn.

    Use it to type a wrapper of your own: ``def my_serving(app, **options: Unpack[Options])``.
    """

    host: str | Sequence[str] | None
    port: int
    reuse_port: bool
    uds: str | os.PathLike[str] | None
    uds_mode: int
    fd: int | None
    sockets: Sequence[socket.socket] | None
    systemd: bool | str | None
    ssl: SSLContext | None
    lifespan: Literal["auto", "on", "off"]
    startup_timeout: float | None
    shutdown_timeout: float | None
    drain_delay: float
    disconnect_after: float | None
    stop_on_signals: bool | Collection[int]
    factory: bool

    # uvicorn's, as `uvicorn.Config` describes them; a test holds them to its signature.
    access_log: bool
    backlog: int
    date_header: bool
    forwarded_allow_ips: list[str] | str | None
    h11_max_incomplete_event_size: int | None
    headers: list[tuple[str, str]] | None
    http: type[asyncio.Protocol] | str
    interface: Literal["auto", "asgi3", "asgi2", "wsgi"]
    limit_concurrency: int | None
    limit_max_requests: int | None
    limit_max_requests_jitter: int
    log_config: dict[str, Any] | str | os.PathLike[str] | RawConfigParser | IO[Any] | None
    log_level: str | int | None
    proxy_headers: bool
    reset_contextvars: bool
    root_path: str
    server_header: bool
    ssl_ca_certs: str | os.PathLike[str] | None
    ssl_cert_reqs: int
    ssl_certfile: str | os.PathLike[str] | None
    ssl_ciphers: str | None
    ssl_context_factory: Callable[[uvicorn.Config, Callable[[], SSLContext]], SSLContext] | None
    ssl_keyfile: str | os.PathLike[str] | None
    ssl_keyfile_password: str | None
    ssl_version: int
    timeout_keep_alive: int
    use_colors: bool | None
    ws: type[asyncio.Protocol] | str
    ws_max_queue: int
    ws_max_size: int
    ws_per_message_deflate: bool
    ws_ping_interval: float | None
    ws_ping_timeout: float | None


WHERE = ("host", "port", "reuse_port", "uds", "uds_mode", "fd", "sockets", "systemd")
_HOST = "127.0.0.1"
_ON_A_FREE_PORT = functools.partial(on_addresses, _HOST, 0, reuse_port=False)
_UDS_MODE = 0o600
_OURS = frozenset(
    {*WHERE, "ssl", "startup_timeout", "shutdown_timeout", "drain_delay", "disconnect_after", "stop_on_signals"}
)

# Of what uvicorn.Config can say, this makes no sense in somebody else's loop.
REFUSED = {
    "callback_notify": "nothing ticks here to call it; run a task of your own",
    "env_file": "it would change the environment of your whole program; load it yourself before",
    "http2": "uvicorn's is experimental: in a stop, new streams get a 503, and the GOAWAY comes only at the very end",
    "loop": "the server runs in the loop that is running already",
    "reload": "reloading restarts the process, and this one is yours",
    "reload_delay": "reloading restarts the process, and this one is yours",
    "reload_dirs": "reloading restarts the process, and this one is yours",
    "reload_excludes": "reloading restarts the process, and this one is yours",
    "reload_includes": "reloading restarts the process, and this one is yours",
    "timeout_graceful_shutdown": "use shutdown_timeout",
    "timeout_notify": "nothing ticks here to call callback_notify; run a task of your own",
    "timeout_worker_healthcheck": "there are no worker processes: the server runs inside this one",
    "workers": "there are no worker processes: the server runs inside this one",
}

# What uvicorn would answer with a bare KeyError, or an import error.
_CHOICES = {
    "lifespan": ("auto", "on", "off"),
    "interface": ("auto", "asgi3", "asgi2", "wsgi"),
    "log_level": ("critical", "error", "warning", "info", "debug", "trace"),
    "http": ("auto", "h11", "httptools", "zttp"),
    "ws": ("auto", "none", "websockets", "websockets-sansio", "wsproto"),
}

_COUNTS = ("backlog", "limit_concurrency", "limit_max_requests")


class Settings(NamedTuple):
    """What was asked for, checked."""

    config: uvicorn.Config
    listen: "Listen"
    """Where, has been said."""
    notify_systemd: tuple[str, ...]
    """Of which states: "READY=1", "STOPPING=1"."""
    ssl: SSLContext | None
    access_log: bool
    startup_timeout: float | None
    shutdown_timeout: float | None
    drain_delay: float
    disconnect_after: float | None
    stop_on_signals: tuple[int, ...]


def parse(app: App, options: Mapping[str, Any]) -> Settings:
    """
    Check the app and the options, and return them as settings.

    Raises:
        TypeError: The app is none, or an option is unknown, refused, of the wrong type, or in conflict with another.
        ValueError: An option's value is out of range.
    """
    for name in options:
        _check_name(name)
    return _from_config(app, options) if isinstance(app, uvicorn.Config) else _from_options(app, options)


def check(options: Mapping[str, Any]) -> None:
    """Check the names of the options, and the values that can be judged one by one."""
    for name in options:
        _check_name(name)
    _check_values(options)


def check_timeout(name: str, value: object) -> float | None:
    """Return a timeout in seconds, `None` for no limit; an infinite one is no limit as well."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number of seconds or None, not {value!r}")
    if not value >= 0:  # nor is nan
        raise ValueError(f"{name} must be 0 or more seconds, not {value!r}; None is no limit")
    return None if value >= _FOREVER else value


def _from_options(app: App, options: Mapping[str, Any]) -> Settings:
    if not isinstance(app, str) and not callable(app):
        raise TypeError(
            f'app must be an ASGI callable, an import string like "package.module:attribute" or a uvicorn.Config, '
            f"not {app!r}"
        )
    if isinstance(app, str) and not all(app.partition(":")):
        raise ValueError(f'an import string must look like "package.module:attribute", and {app!r} does not')

    listen = _how_to_listen(options)
    ssl = _check_ssl(options)
    _check_values(options)
    timeouts = _timeouts(options)
    signals = _check_signals(options.get("stop_on_signals", False))

    # uvicorn's access_log=False takes the handlers from its logger, for every server of the process. Ours is told
    # connection by connection; so uvicorn is not told at all. Likewise, only what is asked for touches logging.
    access_log = options.get("access_log", True)
    passed = {name: value for name, value in options.items() if name not in _OURS and name != "access_log"}
    return Settings(
        config=configure(app, passed),
        listen=listen,
        notify_systemd=_notify_systemd(options.get("systemd")),
        ssl=ssl,
        access_log=access_log,
        stop_on_signals=signals,
        **timeouts,
    )


def _from_config(config: uvicorn.Config, options: Mapping[str, Any]) -> Settings:
    allowed = {*_TIMEOUTS, "stop_on_signals"}
    again = [name for name in options if name not in allowed and not (name == "uds_mode" and config.uds is not None)]
    if again:
        instead = "set it there" if again[0] in _config_parameters() else "give the app in its place"
        raise TypeError(f"{again[0]} cannot be given together with a uvicorn.Config; {instead}")
    timeouts = _timeouts(options)
    if config.timeout_graceful_shutdown is not None:
        if "shutdown_timeout" in options:
            raise TypeError("shutdown_timeout is in conflict with the Config's timeout_graceful_shutdown; give one")
        timeouts["shutdown_timeout"] = check_timeout("timeout_graceful_shutdown", config.timeout_graceful_shutdown)

    if getattr(config, "http2", False):
        raise TypeError(f"a uvicorn.Config with http2 cannot be served: {REFUSED['http2']}")
    said: dict[str, Any] = {"host": config.host, "port": config.port}  # uvicorn, too, looks at these in the end
    if config.fd is not None:
        said = {"fd": config.fd}
    elif config.uds is not None:
        said = {"uds": config.uds, "uds_mode": options.get("uds_mode", _UDS_MODE)}
    senseless = {
        "reload": config.reload,
        "workers": config.workers > 1,
        "callback_notify": config.callback_notify is not None,
    }
    if any(senseless.values()):
        ignored = " and ".join(name for name, is_said in senseless.items() if is_said)
        _warn(f"ignored {ignored} of the uvicorn.Config, which cannot apply inside a running program")
    return Settings(
        config=config,
        listen=_how_to_listen(said),
        notify_systemd=(),
        ssl=None,
        access_log=config.access_log,
        stop_on_signals=_check_signals(options.get("stop_on_signals", False)),
        **timeouts,
    )


# Seconds, some thirty years: what a loop's timer can still be set to.
_FOREVER = 1e9

_TIMEOUTS: dict[str, float | None] = {
    "startup_timeout": 60.0,
    "shutdown_timeout": 10.0,
    "drain_delay": 0.0,
    "disconnect_after": None,
}


def _timeouts(options: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: check_timeout(name, options[name]) for name in _TIMEOUTS if name in options}
    timeouts = _TIMEOUTS | given
    if timeouts["drain_delay"] is None:
        raise ValueError(
            f"drain_delay must be a limited number of seconds, not {options['drain_delay']!r}; it always passes"
        )
    return timeouts


def _warn(message: str) -> None:
    """Warn, and point to the user's line."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_code.co_filename.startswith(os.path.dirname(__file__)):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def _check_name(name: str) -> None:
    if name in REFUSED:
        raise TypeError(f"option {name!r} is not for a server inside a running program: {REFUSED[name]}")
    if name not in Options.__optional_keys__:
        import difflib  # for those who mistype only

        near = difflib.get_close_matches(name, Options.__optional_keys__, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise TypeError(f"there is no option {name!r}{hint}")


def _check_host(host: object) -> Host:
    if host is None:
        return None
    if isinstance(host, str):
        _check_one_host(host)
        return host
    if not isinstance(host, Sequence) or isinstance(host, (bytes, bytearray)):
        raise TypeError(f"host must be a name, an address, a sequence of them or None, not {host!r}")
    if not host:
        raise ValueError("host is an empty sequence; None is every interface")
    for each in host:
        _check_one_host(each)
    return host


def _check_one_host(host: object) -> None:
    if not isinstance(host, str):
        raise TypeError(f"host must be a name or an address, not {host!r}")
    if not host:
        raise ValueError("host is empty; None is every interface, '127.0.0.1' this machine only")
    if "\0" in host:
        raise ValueError(f"host {host!r} has a null character in it")
    if "/" in host or "[" in host or host.count(":") == 1:
        raise ValueError(f"host must be a bare name or address, not {host!r}; the port is an option of its own")


def _check_port(port: object) -> int:
    if isinstance(port, bool) or not isinstance(port, int):
        raise TypeError(f"port must be an int, not {port!r}")
    if not 0 <= port <= 65535:
        raise ValueError(f"port must be from 0 to 65535, and {port} is not; 0 takes a free one")
    return port


def _how_to_listen(options: Mapping[str, Any]) -> "Listen":
    """Return where to listen: one kind of thing only, and before that what systemd hands down, if it is to be asked."""
    if options.keys().isdisjoint(WHERE):
        return _ON_A_FREE_PORT
    tcp = [name for name in ("host", "port") if name in options]
    if _check_flag("reuse_port", options.get("reuse_port", False)):
        if not hasattr(socket, "SO_REUSEPORT"):
            raise ValueError("reuse_port is not to be had on this system")
        tcp.append("reuse_port")
    others = [name for name in ("uds", "fd", "sockets") if options.get(name) is not None]
    said = others + tcp
    if len(others) > 1 or (others and tcp):
        raise TypeError(
            f"{said[0]} and {said[1]} are in conflict: a server listens on one kind of thing; give one of them"
        )
    if "uds_mode" in options and "uds" not in others:
        raise TypeError("uds_mode needs uds with it")

    listen: Listen
    if "uds" in others:
        mode = _check_uds_mode(options.get("uds_mode", _UDS_MODE))
        listen = functools.partial(at_path, _check_uds(options["uds"]), mode)
    elif "fd" in others:
        listen = functools.partial(on_descriptors, [_check_fd(options["fd"])])
    elif "sockets" in others:
        listen = functools.partial(on_lent, _check_sockets(options["sockets"]))
    else:
        host, port = _check_host(options.get("host", _HOST)), _check_port(options.get("port", 0))
        listen = functools.partial(on_addresses, host, port, reuse_port="reuse_port" in tcp)

    systemd = options.get("systemd", False)
    if systemd is False or systemd is None:
        return listen
    if systemd is not True and not isinstance(systemd, str):
        raise TypeError(f"systemd must be True, False or the name of a socket, not {systemd!r}")
    if systemd is not True and (not systemd or ":" in systemd):
        raise ValueError(f"systemd must be the name of a socket, without colons, not {systemd!r}; True is for all")
    if "fd" in others or "sockets" in others:
        raise TypeError(
            f"systemd and {said[0]} are in conflict: a server listens on one kind of thing; give one of them"
        )
    return functools.partial(on_systemds, None if systemd is True else systemd, listen if said else None)


def _notify_systemd(systemd: object) -> tuple[str, ...]:
    # A stop of one of several servers, which are told apart by name, is not yet the service's.
    return ("READY=1", "STOPPING=1") if systemd is True else ("READY=1",) if systemd else ()


def _check_flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be bool, not {value!r}")
    return value


def _check_uds(path: object) -> str:
    if isinstance(path, os.PathLike):
        path = os.fspath(path)
    if not isinstance(path, str):
        raise TypeError(f"uds must be a path, as a string or an os.PathLike of one, not {path!r}")
    if not path or "\0" in path:
        raise ValueError(f"uds must be the path of a file, not {path!r}; other sockets can be lent by sockets or fd")
    return path


def _check_uds_mode(mode: object) -> int:
    if isinstance(mode, bool) or not isinstance(mode, int):
        raise TypeError(f"uds_mode must be an int like 0o660, not {mode!r}")
    if not 0 <= mode <= 0o777:
        raise ValueError(f"uds_mode must be from 0 to 0o777, and {mode} is {mode:#o}")
    return mode


def _check_fd(fd: object) -> int:
    if isinstance(fd, bool) or not isinstance(fd, int):
        raise TypeError(f"fd must be the number of a descriptor, not {fd!r}")
    if not 0 <= fd < 2**31:
        raise ValueError(f"fd must be the number of a descriptor, from 0 on, not {fd}")
    return fd


def _check_sockets(sockets: object) -> Sequence[socket.socket]:
    if not isinstance(sockets, Sequence) or not all(isinstance(sock, socket.socket) for sock in sockets):
        raise TypeError(f"sockets must be a sequence of sockets, not {sockets!r}")
    if not sockets:
        raise ValueError("sockets is an empty sequence")
    for sock in sockets:
        check_lent(sock, repr(sock))
    return sockets


def _check_ssl(options: Mapping[str, Any]) -> SSLContext | None:
    context = options.get("ssl")
    if context is None:
        return None
    if not isinstance(context, SSLContext):
        raise TypeError(f"ssl must be an ssl.SSLContext, not {context!r}")
    if context.protocol == PROTOCOL_TLS_CLIENT:
        raise ValueError(
            "ssl is a context for clients; make it with ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)"
        )
    for name in options:
        if name.startswith("ssl_"):
            raise TypeError(f"ssl and {name} are in conflict: a ready context has all in it; give one of them")
    return context


# What no program can handle; and what a fault of its own would raise again and again, since Python's handlers only run
# once the instruction at fault is over.
_NOT_TO_HANDLE = {
    getattr(signal, name)
    for name in ("SIGKILL", "SIGSTOP", "SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL")
    if hasattr(signal, name)
}


def _check_signals(signals: object) -> tuple[int, ...]:
    if isinstance(signals, bool):
        return (signal.SIGINT, signal.SIGTERM) if signals else ()
    if not isinstance(signals, Collection) or isinstance(signals, (str, bytes, bytearray, Mapping)):
        raise TypeError(f"stop_on_signals must be True, False, or a sequence of signals, not {signals!r}")
    for each in signals:
        if isinstance(each, bool) or not isinstance(each, int):
            raise TypeError(f"stop_on_signals takes signals, like signal.SIGTERM, and not {each!r}")
        if each not in signal.valid_signals():
            raise ValueError(f"stop_on_signals: there is no signal {each!r}")
        if each in _NOT_TO_HANDLE:
            raise ValueError(f"stop_on_signals: {signal.Signals(each).name} is not for a program to handle")
    return tuple(dict.fromkeys(signals))


def _check_values(options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        if name not in _OURS:  # which are checked elsewhere
            _check_value(name, value)
    if options.get("ssl_keyfile") and not (options.get("ssl_certfile") or options.get("ssl_context_factory")):
        raise TypeError("ssl_keyfile needs ssl_certfile with it")


def _check_value(name: str, value: Any) -> None:
    expected = _simple_types().get(name)
    if expected is not None and (not isinstance(value, expected) or (type(value) is bool and bool not in expected)):
        said = " or ".join("None" if each is type(None) else each.__name__ for each in expected)
        raise TypeError(f"{name} must be {said}, not {value!r}")
    if name not in _config_parameters():
        raise TypeError(f"option {name!r} needs a newer uvicorn than the {uvicorn.__version__} that is installed")
    if name in _CHOICES:
        _check_choice(name, value)
    if name in _COUNTS and value is not None and not 1 <= value < 2**31:
        raise ValueError(f"{name} must be 1 or more, and no more than 2147483647, not {value!r}")


def _check_choice(name: str, value: object) -> None:
    choices = _CHOICES[name]
    if name == "log_level" and not isinstance(value, str):
        return
    if name in ("http", "ws") and (isinstance(value, type) and issubclass(value, asyncio.BaseProtocol)):
        return
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {', '.join(map(repr, choices))}, not {value!r}")
    if value not in choices and not (name in ("http", "ws") and ":" in value):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, not {value!r}")


@functools.cache
def _simple_types() -> dict[str, tuple[type, ...]]:
    """The options whose type is made of bool, int, float, str and None alone, with these."""
    found = {}
    for name, hint in typing.get_type_hints(Options).items():
        parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        if all(part in (bool, int, float, str, type(None)) for part in parts):
            found[name] = (*parts, int) if float in parts else parts
    return found


@functools.cache
def _config_parameters() -> frozenset[str]:
    code = uvicorn.Config.__init__.__code__
    return frozenset(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])
