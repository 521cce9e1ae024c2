"""From an app and its options to checked settings."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache, partial
from ssl import SSLContext
from typing import Any, Self

import uvicorn

from aioserve import _options
from aioserve._limits import check_timeout
from aioserve._net import listeners
from aioserve._options import TIMEOUTS, App
from aioserve._signals import STOP_SIGNALS
from aioserve._uvicorn.config import WITH_EFFECTS, make_config
from aioserve._uvicorn.logs import warn_if_unseen

_HOST = _options.DEFAULTS["host"]
_UDS_MODE = _options.DEFAULTS["uds_mode"]
_OF_ONE_SERVER = ("READY=1",)
_NOT_PASSED = _options.OWN_OPTIONS | {"access_log"}
_CHECKED_EACH_TIME = _options.LISTEN_OPTIONS | WITH_EFFECTS | {"ssl", "stop_on_signals"}  # not to be remembered


class Settings:
    """What `parse()` returns: a plain class, since a NamedTuple takes half a millisecond at the import."""

    config: uvicorn.Config
    bind: listeners.Bind
    ssl: SSLContext | None
    access_log: bool
    startup_timeout: float | None
    shutdown_timeout: float | None
    drain_delay: float
    disconnect_after: float | None
    header_timeout: float | None
    stop_on_signals: tuple[int, ...]
    cancel_on_disconnect: bool = False
    app_dir: str | None = None
    """Where the command line looks for the app."""
    systemd_states: tuple[str, ...] = ()
    """What systemd is told: "READY=1", "STOPPING=1"."""
    started_hint: str = ""
    """What the log line of the start says behind the URLs."""
    watchdog: tuple[float, Callable[[], None]] | None = None
    """What to call from the loop, and each how many seconds, so that systemd sees that the loop is not blocked."""

    def __init__(self, **settings: Any) -> None:
        assert settings.keys() <= type(self).__annotations__.keys(), settings
        vars(self).update(settings)

    def replace(self, **settings: Any) -> Self:
        return type(self)(**(vars(self) | settings))

    def notify_systemd(self, state: str) -> None:
        if state in self.systemd_states:
            from aioserve._net.systemd import notify  # imported already, since its sockets were asked for

            notify(state)

    def as_service(self) -> Settings:
        """Return the settings of a server that is all of its service, even if it asked for a socket with a name."""
        return self.replace(**_notifications(True)) if self.systemd_states == _OF_ONE_SERVER else self


def parse(app: App, options: Mapping[str, Any]) -> Settings:
    """
    Check the app and the options, and return them as settings.

    Raises:
        TypeError: The app cannot be served, or an option is unknown, refused, of the wrong type, or cannot be combined
            with another.
        ValueError: An option's value is out of range.
    """
    return _from_config(app, options) if isinstance(app, uvicorn.Config) else _from_options(app, options)


def _from_options(app: App, options: Mapping[str, Any]) -> Settings:
    passed, others = _check(options)
    if isinstance(app, str):
        _check_import_string(app)
    settings = Settings(config=make_config(app, passed), **others)
    if options.get("log_level") is not None or options.get("access_log"):
        warn_if_unseen(level=options.get("log_level"), access_log=options.get("access_log", False))
    return settings.replace(**_notifications(options["systemd"])) if options.get("systemd") else settings


def _check(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    if _CHECKED_EACH_TIME.isdisjoint(options):
        try:
            return _checked_once(**options)
        except TypeError:
            pass  # an option cannot be hashed, or has the wrong type, and then it is raised again
    return _checked(**options)


def _checked(**options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Check the options; return those for `uvicorn.Config`, and the settings beside `config`."""
    _options.check_names(options)
    _options.check_values(options)
    # uvicorn's access_log=False removes the handlers of its logger, for every server of the process. So it is not
    # passed on; each connection is told instead. Likewise, logging is set up only where an option asks for it.
    passed = {name: value for name, value in options.items() if name not in _NOT_PASSED}
    return passed, {
        "bind": _how_to_bind(options),
        "ssl": options.get("ssl"),
        "access_log": options.get("access_log", True),
        "stop_on_signals": _signals(options),
        "cancel_on_disconnect": options.get("cancel_on_disconnect", False),
        **_timeouts(options),
    }


_checked_once = lru_cache(typed=True)(_checked)  # most servers of a program have the same options


def _check_import_string(app: str) -> None:
    if not all(app.partition(":")):
        raise ValueError(f'an import string must look like "package.module:attribute", and {app!r} does not')
    file, _, attribute = app.partition(":")
    if file.endswith(".py"):
        module = file.removesuffix(".py").replace(os.sep, ".")
        raise ValueError(f'an import string names a module, and {app!r} names a file; write "{module}:{attribute}"')


def _from_config(config: uvicorn.Config, options: Mapping[str, Any]) -> Settings:
    _options.check_names(options)
    where: dict[str, Any] = {"host": config.host, "port": config.port}  # the order is uvicorn's
    if options.get("sockets") is not None:
        where = {"sockets": options["sockets"]}
    elif config.fd is not None:
        where = {"fd": config.fd}
    elif config.uds is not None:
        where = {"uds": config.uds, "uds_mode": options.get("uds_mode", _UDS_MODE)}
    allowed = {*TIMEOUTS, "cancel_on_disconnect", "stop_on_signals", "sockets"}
    again = [name for name in options if name not in allowed and not (name == "uds_mode" and "uds" in where)]
    if again:
        instead = "set it there" if again[0] in _options.config_parameters() else "pass the app instead of the Config"
        raise TypeError(f"{again[0]} cannot be given together with a uvicorn.Config; {instead}")
    timeouts: dict[str, Any] = _timeouts(options)
    if config.timeout_graceful_shutdown is not None:
        if "shutdown_timeout" in options:
            raise TypeError("pass either shutdown_timeout or the Config's timeout_graceful_shutdown, not both")
        timeout = check_timeout("timeout_graceful_shutdown", config.timeout_graceful_shutdown)
        timeouts = timeouts | {"shutdown_timeout": timeout}

    if getattr(config, "http2", False):
        where |= {"http2": True, "http": config.http}
    _options.check_values({**where, **{name: options[name] for name in allowed & options.keys()}})
    refused = {"reload": config.reload, "workers": config.workers > 1, "callback_notify": config.callback_notify}
    ignored = " and ".join(name for name, is_set in refused.items() if is_set)
    if ignored:
        _warn(f"ignored {ignored} of the uvicorn.Config, which cannot apply inside a running program")
    return Settings(
        config=config,
        bind=_how_to_bind(where),
        ssl=None,
        access_log=config.access_log,
        stop_on_signals=_signals(options),
        cancel_on_disconnect=options.get("cancel_on_disconnect", False),
        **timeouts,
    )


def _how_to_bind(options: Mapping[str, Any]) -> listeners.Bind:
    systemd = options.get("systemd") or False
    uds, fd, sockets = (options.get(name) for name in ("uds", "fd", "sockets"))
    lent: list[listeners.Bind] = []
    if fd is not None:
        lent.append(partial(listeners.duplicate_descriptors, [fd]))
    if sockets is not None:
        lent.append(partial(listeners.duplicate_sockets, sockets))

    own: list[listeners.Bind] = []
    wants_tcp = "host" in options or "port" in options or options.get("reuse_port", False)
    if wants_tcp or not (uds is not None or lent or systemd):
        host, port, shared = options.get("host", _HOST), options.get("port", 0), options.get("reuse_port", False)
        hint = {"hint_if_busy": "systemd's socket or another process listens there"} if systemd else {}
        own.append(partial(listeners.bind_addresses, host, port, reuse_port=shared, **hint))
    if uds is not None:
        own.append(partial(listeners.prepare_path, os.fspath(uds), options.get("uds_mode", _UDS_MODE)))
    if systemd:
        return partial(listeners.bind_with_systemd, None if systemd is True else systemd, lent, own)
    kinds = [*own, *lent]
    return kinds[0] if len(kinds) == 1 else partial(listeners.bind_all, kinds)


def _notifications(systemd: bool | str) -> dict[str, Any]:
    """Return the settings for what systemd is told; with logging set up, which is done with the Config."""
    # The stop of one of several servers, which are told apart by name, is not that of the service.
    from aioserve._net.systemd import warn_of_watchdog, watchdog  # only where it is needed

    if systemd is not True:
        warn_of_watchdog()
        return {"systemd_states": _OF_ONE_SERVER}
    return {"systemd_states": ("READY=1", "STOPPING=1"), "watchdog": watchdog()}


def _timeouts(options: Mapping[str, Any]) -> dict[str, Any]:
    return TIMEOUTS | {name: check_timeout(name, options[name]) for name in TIMEOUTS if name in options}


def _signals(options: Mapping[str, Any]) -> tuple[int, ...]:
    signals: bool | Collection[int] = options.get("stop_on_signals", False)
    if isinstance(signals, bool):
        return STOP_SIGNALS if signals else ()
    return tuple(dict.fromkeys(signals))


def _warn(message: str) -> None:
    """Warn, and point to the user's line."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_code.co_filename.startswith(os.path.dirname(__file__)):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
