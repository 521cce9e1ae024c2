"""
What parent and child say to each other, and how it is written as JSON.

The parent gives the child a `Handover` when it starts it. The child answers with events, one JSON object per line:
"ready" when it serves, or "failed" if it could not start; and "stopped" when a server that was ready has stopped. The
command line reports the same events to its user. Where systemd watches the parent, the child says "alive" in between.
"""

from __future__ import annotations

import inspect
import json
import os
import ssl
import traceback
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

from aioserve import _errors, _limits
from aioserve._options import LISTEN_OPTIONS, check_names, check_values
from aioserve._report import Report, UnfinishedHandler
from aioserve._server import Server

Event: TypeAlias = dict[str, Any]

_FOR_PARENT = LISTEN_OPTIONS | {"stop_on_signals", "startup_timeout"}  # options that are only for the parent
_HANDLERS = ("disconnected", "cancelled")  # the fields of a report that are handlers


class Handover(NamedTuple):
    """What the child has to know before it starts."""

    options: dict[str, Any]
    listeners: list[tuple[int, bool, str | None, int]]  # of each socket: its descriptor, and as `Listener` takes it
    path: list[str]  # the parent's `sys.path`
    parent: int  # the parent's process id
    stop_timeout: float  # how long the child may take to stop when its parent has died
    alive_interval: float | None  # how often, in seconds, it says that its loop is not blocked


def options_for_child(app: object, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options for the child; raise a `TypeError` if they, or the app, cannot be passed to a process."""
    if not isinstance(app, str):
        if inspect.iscoroutine(app):
            app.close()  # or Python would warn that nobody has awaited it
        raise TypeError(
            f'an app for another process must be an import string like "package.module:attribute", not {app!r}; '
            "the child process imports it"
        )
    if app.partition(":")[0] == "__main__":
        raise TypeError(f"{app!r} cannot be passed to another process, which has another __main__; name the module")
    check_names(options)
    check_values(options)
    passed: dict[str, Any] = {"startup_timeout": None}
    for name, value in options.items():
        if name in _FOR_PARENT:
            continue
        passed[name] = os.fspath(value) if isinstance(value, os.PathLike) else value
        try:
            json.dumps(passed[name])
        except (TypeError, ValueError):
            raise TypeError(
                f"{name}={value!r} cannot be passed to another process: it is an object of this one; "
                "pass a file name or an import string, if the option takes one"
            ) from None
    return passed


def ready(server: Server) -> Event:
    host, port = getattr(server, "host", None), getattr(server, "port", None)  # not on a Unix socket
    return {"event": "ready", "url": server.url, "urls": server.urls, "host": host, "port": port}


def failed(error: BaseException) -> Event:
    return {"event": "failed", "error": encode_error(error)}


def stopped(report: Report | None, error: BaseException | None) -> Event:
    return {"event": "stopped", "report": report and encode_report(report), "error": error and encode_error(error)}


def encode_error(error: BaseException) -> dict[str, Any]:
    system_error = error if isinstance(error, OSError) else OSError()
    return {
        "type": type(error).__name__,
        "message": str(system_error.strerror or _errors.message_of(error)),
        "errno": system_error.errno,
        "filename": system_error.filename,
        "traceback": _app_traceback(error.__cause__) if isinstance(error, _errors.ServingError) else "",
    }


def decode_error(encoded: Mapping[str, Any]) -> BaseException:
    """Return an error of the same class; a `ServingError` if its class is unknown."""
    error: BaseException
    if encoded["errno"] is not None:
        kind = ssl.SSLError if encoded["type"].startswith("SSL") else OSError
        error = kind(encoded["errno"], encoded["message"], *([encoded["filename"]] if encoded["filename"] else []))
    else:
        kinds = {"TypeError": TypeError, "ValueError": ValueError, **vars(_errors)}
        error = kinds.get(encoded["type"], _errors.ServingError)(encoded["message"])
    if encoded["traceback"]:
        error.add_note(f"In the child process:\n{encoded['traceback'].rstrip()}")
    return error


def encode_report(report: Report) -> dict[str, Any]:
    return {**vars(report), **{name: [vars(each) for each in getattr(report, name)] for name in _HANDLERS}}


def decode_report(encoded: Mapping[str, Any]) -> Report:
    def handler(fields: Mapping[str, Any]) -> UnfinishedHandler:
        client = fields["client"] and tuple(fields["client"])
        return UnfinishedHandler(**{**fields, "client": client, "where": tuple(fields["where"])})

    return Report(**{**encoded, **{name: tuple(map(handler, encoded[name])) for name in _HANDLERS}})


def _app_traceback(error: BaseException | None) -> str:
    """Return the traceback without our own frames; nothing if no frame is left."""
    frame = None if error is None else error.__traceback__
    ours = ("aioserve", "uvicorn", "importlib", "__main__")
    while frame is not None and frame.tb_frame.f_globals.get("__name__", "").partition(".")[0] in ours:
        frame = frame.tb_next
    if error is None or frame is None:
        return ""
    return "".join(traceback.format_exception(type(error), error, frame))[-_limits.TRACEBACK_CHARACTERS :]
