"""
Runs a server as a whole program: for the command line, and in the child process of `serving_process()`.

Other than `asyncio.run(serve(..., stop_on_signals=True))`, it reports events and returns an exit code.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import operator
import os
import signal
import threading
from collections.abc import Callable, Sequence

from aioserve._errors import ServingError, StartupError, StartupInterruptedError, describe_error
from aioserve._net.listeners import Listener
from aioserve._net.loops import choose_acceptor
from aioserve._process import messages
from aioserve._serving import start_with
from aioserve._settings import Settings
from aioserve._signals import SIGHUP, STOP_SIGNALS, Signals, signal_name

_KNOWN_LOOPS = ("auto", "asyncio", "uvloop")
_LOOP_PACKAGES = ("uvloop", "zuvloop", "rloop", "winloop")

# Exit codes.
GRACEFUL = 0
FORCED = 1
NOT_STARTED = 3


def run(
    settings: Settings,
    on_event: Callable[[messages.Event], None],
    *,
    loop: str = "auto",
    listeners: Sequence[Listener] | None = None,
    signals: Signals | None = None,
) -> int:
    """
    Serve until a signal comes, and return the exit code; call `on_event` with "ready" or "failed", then "stopped".

    A caller can pass listeners that are open already, and the signals, if it needs to know whether one has come.
    """
    signals = signals or stop_signals()

    async def serve() -> int:
        signals.install()
        try:
            try:
                server = await start_with(settings, signals, listeners)
            except (OSError, ValueError, ServingError) as exc:
                on_event(messages.failed(exc))
                return GRACEFUL if isinstance(exc, StartupInterruptedError) else NOT_STARTED
            server._engine.on_crash = lambda: True  # the event below reports it, so the engine need not log it
            on_event(messages.ready(server))

            with contextlib.suppress(ServingError):
                await server.wait_closed()
            report, error = server.report, server._engine.error
            on_event(messages.stopped(report, error))
            return FORCED if error is not None or report is None or report.was_forced else GRACEFUL
        finally:
            for signum in signals.wanted:
                signal.signal(signum, _exit)  # while our handlers are still there, so that there always is one
            signals.release()

    with contextlib.ExitStack() as stack:
        try:
            runner = stack.enter_context(asyncio.Runner(loop_factory=_loop_factory(loop)))
            if loop not in _KNOWN_LOOPS:
                runner.run(choose_acceptor(tls=settings.config.is_ssl))
        except Exception as exc:  # noqa: BLE001 (anything can be in a factory)
            on_event(messages.failed(StartupError(f"--loop {loop}: {_why_no_loop(exc)}")))
            return NOT_STARTED
        return runner.run(serve())


def stop_signals() -> Signals:
    """Return the stop signals of a process that is ours: SIGHUP as well, unless it is ignored, as by nohup."""
    wanted = [*STOP_SIGNALS]
    if SIGHUP is not None and signal.getsignal(SIGHUP) == signal.SIG_DFL:
        wanted.append(signal.Signals(SIGHUP))
    return Signals(wanted, owns_process=True)


def _exit(signum: int, _frame: object) -> None:
    """Handle a signal that comes when the server has stopped: exit at once if threads delay the exit."""
    if signum == SIGHUP:
        return  # the terminal that has closed sends it again
    threads = [each for each in threading.enumerate() if not each.daemon and each is not threading.main_thread()]
    if threads:
        names = ", ".join(each.name for each in threads)
        with contextlib.suppress(OSError):
            os.write(2, f"aioserve: {signal_name(signum)}: exiting without waiting for threads: {names}\n".encode())
        os._exit(FORCED)


def _loop_factory(loop: str) -> Callable[[], asyncio.AbstractEventLoop]:
    """Return what makes the loop: by its name, or as uvicorn takes it, `module:factory`."""
    if loop == "asyncio" or (loop == "auto" and importlib.util.find_spec("uvloop") is None):
        return asyncio.new_event_loop
    package = "uvloop" if loop == "auto" else loop
    module, _, name = (f"{package}:new_event_loop" if package in _LOOP_PACKAGES else package).partition(":")
    if not module or not name:
        raise LookupError(f"choose auto, asyncio, {', '.join(_LOOP_PACKAGES)}, or a factory like module:factory")
    factory: Callable[[], asyncio.AbstractEventLoop] = operator.attrgetter(name)(importlib.import_module(module))
    return factory


def _why_no_loop(error: Exception) -> str:
    match error:
        case LookupError():
            return str(error)
        case ModuleNotFoundError():
            return f"there is no module {error.name}" + (f"; pip install {error.name}" * (error.name in _LOOP_PACKAGES))
        case RuntimeError():
            return str(error)
    return describe_error(error)
