"""
A program that is nothing but a server: what the command line runs, here or as the child of another program.

Beyond `asyncio.run(serve(..., stop_on_signals=True))` it talks: in exit codes, and in events, which are dictionaries
that can become JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import importlib.util
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import uvicorn

from aioserve._errors import ServingError, StartupInterruptedError
from aioserve._serving import start_as
from aioserve._signals import Signals, name_of

if TYPE_CHECKING:
    from types import TracebackType

    from aioserve._options import Settings
    from aioserve._server import Server
    from aioserve._shutdown import Report
    from aioserve._sockets import Listener

# Exit codes.
GRACEFUL = 0
FORCED = 1
NOT_STARTED = 3

# Longer ones say the same over and over.
_TRACEBACK_LIMIT = 100_000

Tell = Callable[[dict[str, Any]], None]


def run(
    settings: Settings,
    tell: Tell,
    *,
    loop: str = "auto",
    listeners: Sequence[Listener] | None = None,
    begin: Callable[[Signals], None] | None = None,
) -> int:
    """
    Serve until a signal comes, and return the exit code.

    Args:
        settings: With the signals.
        tell: Called with each event: "ready" or "failed", then "stopped".
        loop: "asyncio", "uvloop", or "auto": uvloop's if it is there.
        listeners: What listens already, if anything does.
        begin: Called before anything starts, with the signals as they are heard of.
    """
    with asyncio.Runner(loop_factory=_loop_factory(loop)) as runner:
        return runner.run(_serve(settings, tell, listeners, begin))


async def _serve(
    settings: Settings, tell: Tell, listeners: Sequence[Listener] | None, begin: Callable[[Signals], None] | None
) -> int:
    signals = Signals(settings.stop_on_signals)
    if begin is not None:
        begin(signals)
    try:
        return await _serve_until_told(settings, tell, listeners, signals)
    finally:
        for signum in settings.stop_on_signals:
            signal.signal(signum, _leave)  # on top of ours, so that there is no moment without either
        signals.release()


def _leave(signum: int, _frame: object) -> None:
    """Handle a signal when the server has stopped, and the interpreter is on its way to the end."""
    waiting_for = [each for each in threading.enumerate() if not each.daemon and each is not threading.main_thread()]
    if waiting_for:
        names = ", ".join(each.name for each in waiting_for)
        with contextlib.suppress(OSError):
            os.write(2, f"aioserve: {name_of(signum)}: not waiting for what still runs: {names}\n".encode())
        os._exit(FORCED)


async def _serve_until_told(
    settings: Settings, tell: Tell, listeners: Sequence[Listener] | None, signals: Signals
) -> int:
    try:
        server = await start_as(settings, signals, listeners)
    except StartupInterruptedError as exc:
        tell({"event": "failed", "error": in_json(exc)})
        return GRACEFUL
    except (OSError, ServingError) as exc:
        tell({"event": "failed", "error": in_json(exc)})
        return NOT_STARTED
    server._engine.on_crash = lambda: None  # it is told below, and need not be logged
    tell({"event": "ready", **_where(server)})

    error: BaseException | None = None
    try:
        await server.wait_closed()
    except ServingError as exc:
        error = exc
    report = server.report
    tell(
        {
            "event": "stopped",
            "report": None if report is None else _report_in_json(report),
            "error": None if error is None else in_json(error),
        }
    )
    return FORCED if error is not None or report is None or was_forced(report) else GRACEFUL


def log_config(level: str | int | None) -> dict[str, Any]:
    """Return the logging of uvicorn's command line, but for two things: all of it on the standard error, and ours."""
    config = copy.deepcopy(uvicorn.config.LOGGING_CONFIG)
    config["handlers"]["access"]["stream"] = "ext://sys.stderr"
    for formatter in config["formatters"].values():
        formatter["use_colors"] = sys.stderr is not None and sys.stderr.isatty()  # not what the standard output is
    if level is None or level == "trace":
        level = "info" if level is None else "debug"
    config["loggers"]["aioserve"] = {
        "handlers": ["default"],
        "level": level.upper() if isinstance(level, str) else level,
    }
    return config


def was_forced(report: Report) -> bool:
    """Whether anything had to be."""
    return bool(report.aborted or report.persuaded or report.cancelled or report.lifespan_stuck)


def in_json(error: BaseException) -> dict[str, Any]:
    """Say what went wrong in words that JSON has."""
    by_system = error if isinstance(error, OSError) else OSError()
    return {
        "type": type(error).__name__,
        "message": str(by_system.strerror or error),
        "errno": by_system.errno,
        "filename": by_system.filename,
        "traceback": "".join(_traceback(error.__cause__ if isinstance(error, ServingError) else None))[
            -_TRACEBACK_LIMIT:
        ],
    }


def _where(server: Server) -> dict[str, Any]:
    return {"url": server.url, "urls": server.urls, "host": server.host, "port": server.port}


def _report_in_json(report: Report) -> dict[str, Any]:
    handlers = {name: [each._asdict() for each in getattr(report, name)] for name in ("persuaded", "cancelled")}
    return {**report._asdict(), **handlers}


def _traceback(error: BaseException | None) -> list[str]:
    """Return the app's own traceback, less what is ours; nothing, where the app's code has no part in it."""
    if error is None:
        return []
    begin = error.__traceback__
    while begin is not None and _is_no_apps(begin):
        begin = begin.tb_next
    if begin is None:
        return []
    return traceback.format_exception(type(error), error, begin)


def _is_no_apps(frame: TracebackType) -> bool:
    module = frame.tb_frame.f_globals.get("__name__", "")
    return module.partition(".")[0] in ("aioserve", "uvicorn", "importlib", "__main__")


def _loop_factory(loop: str) -> Callable[[], asyncio.AbstractEventLoop] | None:
    if loop == "asyncio" or (loop == "auto" and importlib.util.find_spec("uvloop") is None):
        return asyncio.new_event_loop
    import uvloop

    return uvloop.new_event_loop
