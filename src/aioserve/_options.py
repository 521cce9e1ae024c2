"""Which options exist, which are refused, and why."""

# Without annotations from the future: a TypedDict compiles each that is a string, which would take long at the import.

import asyncio
import functools
import inspect
import os
import re
import signal
import socket
import sys
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from configparser import RawConfigParser
from ssl import PROTOCOL_TLS_CLIENT, SSLContext
from typing import IO, Any, Literal, TypeAlias, TypedDict

import uvicorn

from aioserve._limits import check_timeout
from aioserve._net.listeners import check_socket

App: TypeAlias = Callable[..., Any] | str | uvicorn.Config
"""What can be served: an ASGI callable, an import string, or a `uvicorn.Config`. (Frameworks type ASGI differently.)"""


class Options(TypedDict, total=False):
    """
    The keyword arguments of `serving()`, `start()` and `serve()`: first aioserve's own, then those passed to uvicorn.

    Use it to type a wrapper of yours: ``def my_serving(app, **options: Unpack[Options])``.
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
    header_timeout: float | None
    cancel_on_disconnect: bool
    stop_on_signals: bool | Collection[int]
    factory: bool

    # uvicorn's, as `uvicorn.Config` describes them; a test compares them with its signature.
    access_log: bool
    backlog: int
    date_header: bool
    forwarded_allow_ips: list[str] | str | None
    h11_max_incomplete_event_size: int | None
    headers: list[tuple[str, str]] | None
    http: type[asyncio.Protocol] | str
    http2: bool
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


TIMEOUTS: dict[str, float | None] = {
    "startup_timeout": 60.0,
    "shutdown_timeout": 10.0,
    "drain_delay": 0.0,
    "disconnect_after": None,
    "header_timeout": 60.0,
}
"""Each with its default, in seconds."""

DEFAULTS: dict[str, Any] = {
    "host": "127.0.0.1",
    "port": 0,
    "reuse_port": False,
    "uds": None,
    "uds_mode": 0o600,
    "fd": None,
    "sockets": None,
    "systemd": False,
    "ssl": None,
    **TIMEOUTS,
    "cancel_on_disconnect": False,
    "stop_on_signals": False,
    "log_config": None,
}
"""Those of aioserve's own options, and of an option for which uvicorn has another one."""

LISTEN_OPTIONS = frozenset({"host", "port", "reuse_port", "uds", "uds_mode", "fd", "sockets", "systemd"})

OWN_OPTIONS = frozenset({*LISTEN_OPTIONS, *TIMEOUTS, "ssl", "cancel_on_disconnect", "stop_on_signals"})
"""Those that are not passed to `uvicorn.Config`."""

_RELOAD = "aioserve does not restart processes; use uvicorn --reload, or watchfiles"
_WORKERS = "aioserve has no worker processes; use uvicorn --workers"

# Options of uvicorn.Config that make no sense in a loop that is running already.
REFUSED = {
    "callback_notify": "aioserve has no tick that calls it; run a task of your own",
    "env_file": "aioserve does not change the environment; load the file before the start",
    "loop": "the server runs in the loop that is running already; choose one with asyncio.Runner(loop_factory=...)",
    "timeout_notify": "aioserve has no tick that calls callback_notify; run a task of your own",
} | dict.fromkeys(("reload", "reload_delay", "reload_dirs", "reload_excludes", "reload_includes"), _RELOAD)
REFUSED |= dict.fromkeys(("timeout_worker_healthcheck", "workers"), _WORKERS)

RENAMED = {"timeout_graceful_shutdown": "shutdown_timeout"}

# What other servers and libraries call an option, and the option that is meant, in braces.
_MEANT = (
    dict.fromkeys(("timeout", "timeouts"), "{startup_timeout} or {shutdown_timeout}")
    | dict.fromkeys(("graceful_timeout", "grace", "grace_period", "shutdown_grace"), "{shutdown_timeout}")
    | dict.fromkeys(("bind", "listen"), "{host} and {port}, or {uds}")
    | dict.fromkeys(("address", "addr", "hostname", "interfaces", "ip"), "{host}")
    | dict.fromkeys(("unix_socket", "unix", "unix_path", "socket_path", "path"), "{uds}")
    | dict.fromkeys(("install_signal_handlers", "handle_signals", "signals"), "{stop_on_signals}")
    | dict.fromkeys(("ssl_context", "sslcontext", "tls"), "{ssl}")
    | dict.fromkeys(("certfile", "cert"), "{ssl_certfile}")
    | dict.fromkeys(("keyfile", "key"), "{ssl_keyfile}")
    | dict.fromkeys(("keep_alive", "keepalive", "keep_alive_timeout", "keepalive_timeout"), "{timeout_keep_alive}")
    | {"debug": "{log_level}='debug' for the logs, and the framework's own option for pages with tracebacks"}
)

# What uvicorn would answer with a bare KeyError, or an import error.
_CHOICES = {
    "lifespan": ("auto", "on", "off"),
    "interface": ("auto", "asgi3", "asgi2", "wsgi"),
    "log_level": ("critical", "error", "warning", "info", "debug", "trace"),
    "http": ("auto", "h11", "httptools", "zttp"),
    "ws": ("auto", "none", "websockets", "websockets-sansio", "wsproto"),
}

_MAX_INT = 2**31 - 1

# Type, minimum, maximum, and the message for values outside.
_RANGES = {
    "port": ("an int", 0, 65535, "port must be from 0 to 65535, not {0}; 0 takes a free one"),
    "uds_mode": ("an int like 0o660", 0, 0o777, "uds_mode must be from 0 to 0o777, not {0:#o}"),
    "fd": ("the number of a descriptor", 0, _MAX_INT, "fd must be the number of a descriptor, from 0 on, not {0}"),
} | {
    name: ("int", 1, _MAX_INT, f"{name} must be 1 or more, and no more than {_MAX_INT}, not {{0}}")
    for name in ("backlog", "limit_concurrency", "limit_max_requests")
}
_NO_RANGE = ("", 0, 0, "")

_MAY_BE_NONE = frozenset({"host", "uds", "sockets", "systemd", "ssl"})
_NOT_ON_WINDOWS = ("uds", "uds_mode", "fd", "systemd", "reuse_port")
_COMBINED = LISTEN_OPTIONS | {"ssl", "ssl_keyfile", "http2"}

# Signals that no program can handle; and those of a fault, which would come again and again, since Python runs its
# handlers only when the faulty instruction is over.
_FAULTS = ("SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL")
_NOT_TO_HANDLE = {getattr(signal, name, None) for name in ("SIGKILL", "SIGSTOP", *_FAULTS)}


def check_names(options: Mapping[str, Any]) -> None:
    """Raise a `TypeError` where an option is unknown or refused."""
    for name in [each for each in options if each not in Options.__optional_keys__]:
        if name in RENAMED:
            raise TypeError(f"there is no option {name!r}; aioserve calls the same option {RENAMED[name]!r}")
        if name in REFUSED:
            raise TypeError(f"option {name!r} is not supported: {REFUSED[name]}")
        meant = option_meant(name)
        if meant:
            raise TypeError(f"there is no option {name!r}; use {meant}")
        import difflib  # only for a misspelt option

        near = difflib.get_close_matches(name, Options.__optional_keys__, 1)
        hint = f"did you mean {near[0]!r}?" if near else "help(aioserve.serving) lists all options"
        raise TypeError(f"there is no option {name!r}; {hint}")


def option_meant(name: str, spell: Callable[[str], str] = str) -> str:
    """Return the option that is meant by a name that others use, spelt by the function; "" for any other name."""
    return re.sub(r"{(\w+)}", lambda found: spell(found[1]), _MEANT.get(name, ""))


def check_values(options: Mapping[str, Any]) -> None:
    """Check which options exclude or require each other, and the values one by one."""
    if not options.keys().isdisjoint(_COMBINED):
        _check_combinations(options)
    parameters = config_parameters()
    for name, value in options.items():
        if name not in parameters and name not in OWN_OPTIONS:
            raise TypeError(f"option {name!r} needs a newer uvicorn than the {uvicorn.__version__} that is installed")
        if value is not None or name not in _MAY_BE_NONE:
            _CHECKS.get(name, _check_type_and_range)(name, value)


def _check_combinations(options: Mapping[str, Any]) -> None:
    if sys.platform == "win32":
        for name in _NOT_ON_WINDOWS:
            if options.get(name) is not None and options[name] is not False:
                raise ValueError(f"{name} is not supported on Windows")
    if options.get("reuse_port") is True and not hasattr(socket, "SO_REUSEPORT"):
        raise ValueError("reuse_port is not supported on this platform")
    if "uds_mode" in options and options.get("uds") is None:
        raise TypeError("uds_mode requires uds")
    if options.get("ssl") is not None:
        for name in options:
            if name.startswith("ssl_"):
                raise TypeError(f"pass either ssl or {name}, not both: a ready context has everything in it")
    http = options.get("http", "auto")
    if options.get("http2") is True and http not in ("auto", "zttp"):
        raise TypeError(f"http2 requires http='zttp', which is then the default, not {http!r}")
    if options.get("ssl_keyfile") and not (options.get("ssl_certfile") or options.get("ssl_context_factory")):
        raise TypeError("ssl_keyfile requires ssl_certfile")


def _check_timeout(name: str, value: object) -> None:
    seconds = check_timeout(name, value)
    if seconds is None and name == "drain_delay":
        raise ValueError(f"drain_delay must be a limited number of seconds, not {value!r}")
    if seconds == 0 and name == "header_timeout":
        raise ValueError(f"header_timeout must be more than 0 seconds, not {value!r}; None means no limit")


def _check_type_and_range(name: str, value: Any) -> None:
    expected = _simple_types().get(name)
    like, lowest, highest, message = _RANGES.get(name, _NO_RANGE)
    if expected is not None and (not isinstance(value, expected) or (type(value) is bool and bool not in expected)):
        if like in ("", "int"):
            like = " or ".join("None" if each is type(None) else each.__name__ for each in expected)
        raise TypeError(f"{name} must be {like}, not {value!r}")
    if message and value is not None and not lowest <= value <= highest:
        raise ValueError(message.format(value))


def _check_choice(name: str, value: object) -> None:
    choices = _CHOICES[name]
    if name == "log_level" and not isinstance(value, str):
        _check_type_and_range(name, value)
        return
    if name in ("http", "ws") and (isinstance(value, type) and issubclass(value, asyncio.BaseProtocol)):
        return
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {', '.join(map(repr, choices))}, not {value!r}")
    if value not in choices and not (name in ("http", "ws") and ":" in value):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, not {value!r}")


def _check_host(_name: str, host: object) -> None:
    hosts = [host] if isinstance(host, str) else host
    if not isinstance(hosts, Sequence) or isinstance(hosts, (bytes, bytearray)):
        raise TypeError(f"host must be a name, an address, a sequence of them or None, not {host!r}")
    if not hosts:
        raise ValueError("host is an empty sequence; None is every interface")
    for each in hosts:
        if not isinstance(each, str):
            raise TypeError(f"host must be a name or an address, not {each!r}")
        if not each:
            raise ValueError("host is empty; None is every interface, '127.0.0.1' this machine only")
        if "\0" in each:
            raise ValueError(f"host {each!r} contains a null character")
        if "/" in each or "[" in each or each.count(":") == 1:
            raise ValueError(f"host must be a bare name or address, not {each!r}; the port is an option of its own")


def _check_uds(_name: str, path: object) -> None:
    if isinstance(path, os.PathLike):
        path = os.fspath(path)
    if not isinstance(path, str):
        raise TypeError(f"uds must be a path, as a string or an os.PathLike of one, not {path!r}")
    if not path or "\0" in path:
        raise ValueError(f"uds must be the path of a file, not {path!r}; pass other sockets as sockets or fd")


def _check_sockets(_name: str, sockets: object) -> None:
    if not isinstance(sockets, Sequence) or not all(isinstance(sock, socket.socket) for sock in sockets):
        raise TypeError(f"sockets must be a sequence of sockets, not {sockets!r}")
    if not sockets:
        raise ValueError("sockets is an empty sequence")
    for sock in sockets:
        check_socket(sock, repr(sock))


def _check_systemd(_name: str, systemd: object) -> None:
    if isinstance(systemd, bool):
        return
    if not isinstance(systemd, str):
        raise TypeError(f"systemd must be True, False or the name of a socket, not {systemd!r}")
    if not systemd or ":" in systemd:
        raise ValueError(f"systemd must be the name of a socket, without colons, not {systemd!r}; True is for all")


def _check_ssl(_name: str, context: object) -> None:
    if not isinstance(context, SSLContext):
        raise TypeError(f"ssl must be an ssl.SSLContext, not {context!r}")
    if context.protocol == PROTOCOL_TLS_CLIENT:
        raise ValueError(
            "ssl is a context for clients; make it with ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)"
        )


def _check_signals(_name: str, signals: object) -> None:
    if isinstance(signals, bool):
        return
    if not isinstance(signals, Collection) or isinstance(signals, (str, bytes, bytearray, Mapping)):
        raise TypeError(f"stop_on_signals must be True, False, or a sequence of signals, not {signals!r}")
    for each in signals:
        if isinstance(each, bool) or not isinstance(each, int):
            raise TypeError(f"stop_on_signals takes signals, like signal.SIGTERM, and not {each!r}")
        if each not in signal.valid_signals():
            raise ValueError(f"stop_on_signals: there is no signal {each!r}")
        if each in _NOT_TO_HANDLE:
            raise ValueError(f"stop_on_signals: a program cannot handle {signal.Signals(each).name}")


_CHECKS: dict[str, Callable[[str, Any], None]] = {
    **dict.fromkeys(TIMEOUTS, _check_timeout),
    **dict.fromkeys(_CHOICES, _check_choice),
    "host": _check_host,
    "uds": _check_uds,
    "sockets": _check_sockets,
    "systemd": _check_systemd,
    "ssl": _check_ssl,
    "stop_on_signals": _check_signals,
}


@functools.cache
def _simple_types() -> dict[str, tuple[type, ...]]:
    """The options whose type consists of bool, int, float, str and None, with these."""
    found = {}
    for name, hint in typing.get_type_hints(Options).items():
        parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        if all(part in (bool, int, float, str, type(None)) for part in parts):
            found[name] = (*parts, int) if float in parts else parts
    return found


@functools.cache
def config_parameters() -> frozenset[str]:
    """Return the options that the installed uvicorn has."""
    code = uvicorn.Config.__init__.__code__
    return frozenset(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])


def uvicorn_defaults() -> dict[str, Any]:
    """Return the options that the installed uvicorn has, with its defaults."""
    return {name: each.default for name, each in inspect.signature(uvicorn.Config).parameters.items()}
