"""
The child process of `serving_process()`: the command line, controlled by a parent.

The child inherits the listening sockets and three other descriptors: a file with the `Handover`, a pipe for its events,
and the lifeline, a pipe to which the parent writes one byte to force a stop. When the lifeline ends, the parent has
died, however that happened. Then the child stops, and exits after a limited time, whatever it is doing.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from functools import partial

from aioserve._net import unix
from aioserve._net.listeners import Listener
from aioserve._process import messages, program
from aioserve._settings import parse
from aioserve._signals import Signals
from aioserve._uvicorn.logs import log_config

assert sys.platform != "win32"  # where it is refused: this is for type checkers


def run(app: str, descriptors: str) -> int:
    """Serve as the parent says, and return the exit code."""
    handover_file, events, lifeline = map(int, descriptors.split(","))
    with open(handover_file) as file:
        handover = messages.Handover(**json.load(file))
    for fd in (events, lifeline, *(fd for fd, *_ in handover.listeners)):
        os.set_inheritable(fd, False)
    sys.path[:] = handover.path
    signals = program.stop_signals()
    ended = threading.Event()
    watching = (lifeline, handover, signals, ended)
    threading.Thread(target=_watch_parent, args=watching, name="aioserve lifeline", daemon=True).start()

    def send(event: messages.Event) -> None:
        if event["event"] in ("failed", "stopped"):
            ended.set()
        # The pipe is broken if the parent has died, but then the lifeline has ended, too.
        with suppress(BrokenPipeError), open(events, "wb", closefd=False) as pipe:
            pipe.write(json.dumps(event).encode() + b"\n")

    options = {"log_level": "warning", "stop_on_signals": True, **handover.options}
    options.setdefault("log_config", log_config(options["log_level"]))
    listeners = [
        Listener(socket.socket(fileno=fd) if path is None else unix.create_socket(fd), lent=lent, path=path, mode=mode)
        for fd, lent, path, mode in handover.listeners
    ]
    try:
        settings = parse(app, options)
    except Exception as exc:  # noqa: BLE001 (a logging configuration can raise anything)
        send(messages.failed(exc))
        return program.NOT_STARTED
    if handover.alive_interval is not None:
        settings = settings.replace(watchdog=(handover.alive_interval, partial(send, {"event": "alive"})))
    return program.run(settings, send, listeners=listeners, signals=signals)


def _watch_parent(lifeline: int, handover: messages.Handover, signals: Signals, ended: threading.Event) -> None:
    """Send the main thread a signal when the parent forces a stop, or dies."""

    def send(signum: int) -> None:
        ident = threading.main_thread().ident
        if not ended.is_set() and ident is not None:  # so that the interpreter's exit is not disturbed
            signal.pthread_kill(ident, signum)

    # The main thread is to get the signals; one that this thread got would not wake it.
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    poll = select.poll()
    poll.register(lifeline, select.POLLIN)
    # A fork of the parent may keep the lifeline open after the parent's death.
    if sys.platform == "linux":
        with suppress(AttributeError, OSError):  # no pidfds, or it has died, which the lifeline tells as well
            poll.register(os.pidfd_open(handover.parent), select.POLLIN)
    while os.getppid() == handover.parent and [lifeline] == [fd for fd, _ in poll.poll()]:
        if not os.read(lifeline, 1):
            break
        send(signal.SIGINT)  # the second signal, after the parent's SIGTERM
    if not signals.count:  # a second one would force
        send(signal.SIGTERM)
    time.sleep(handover.stop_timeout)
    os._exit(program.FORCED)
