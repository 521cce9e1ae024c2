"""
The child's side of `serving_process()`: the command line, with a parent.

The parent hands down open descriptors: a file with what to serve and how, a pipe for events, and the lifeline, a pipe
on which it writes only to force. When that ends, so has the parent, whatever it was that ended it; then the child stops
by itself, and leaves for good when its time is over, whatever it is doing.
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
from typing import Any

from aioserve import _program
from aioserve._options import parse
from aioserve._signals import Signals
from aioserve._sockets import Listener


def run(app: str, descriptors: str) -> int:
    """Serve as the parent says, and return the exit code."""
    for_settings, events, lifeline = map(int, descriptors.split(","))
    with open(for_settings) as file:
        told: dict[str, Any] = json.load(file)
    for fd in (events, lifeline, *(fd for fd, _lent in told["listeners"])):
        os.set_inheritable(fd, False)
    sys.path[:] = told["path"]
    orders = Orders()
    threading.Thread(
        target=_watch, args=(lifeline, told["parent"], told["bound"], orders), name="aioserve lifeline", daemon=True
    ).start()

    def tell(event: dict[str, Any]) -> None:
        if event["event"] != "ready":
            orders.over()
        line = memoryview(json.dumps(event).encode() + b"\n")
        try:
            while line:
                line = line[os.write(events, line) :]
        except BrokenPipeError:
            pass  # the parent has gone; the lifeline says so, too

    options = {"log_level": "warning", "stop_on_signals": True, **told["options"]}
    options.setdefault("log_config", _program.log_config(options["log_level"]))
    listeners = [Listener(socket.socket(fileno=fd), lent=lent) for fd, lent in told["listeners"]]
    try:
        settings = parse(app, options)
    except Exception as exc:  # noqa: BLE001 (a configuration of logging raises what it likes)
        tell({"event": "failed", "error": _program.in_json(exc)})
        return _program.NOT_STARTED
    return _program.run(settings, tell, listeners=listeners, begin=orders.begin)


class Orders:
    """Whether the child has been told to stop, by a signal, or has done so."""

    def __init__(self) -> None:
        self._signals: Signals | None = None
        self._over = False

    def begin(self, signals: Signals) -> None:
        """Note who hears of signals."""
        self._signals = signals

    def over(self) -> None:
        """Send no more signals: the server has stopped, and the interpreter is to end in good order."""
        self._over = True

    def stop(self) -> None:
        """Tell the main thread, unless it knows already: a second signal would force."""
        if not self._over and (self._signals is None or not self._signals.count):
            _send_main_thread(signal.SIGTERM)

    def force(self) -> None:
        """Tell the main thread once more; the first time, by SIGTERM, it was the parent."""
        if not self._over:
            _send_main_thread(signal.SIGINT)


def _send_main_thread(signum: int) -> None:
    ident = threading.main_thread().ident
    assert ident is not None
    signal.pthread_kill(ident, signum)


def _watch(lifeline: int, parent: int, bound: float, orders: Orders) -> None:
    # Signals are for the main thread; one that came here would not wake it up.
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    poll = select.poll()
    poll.register(lifeline, select.POLLIN)
    # A fork of the parent's may hold the other end as well, and outlive it.
    try:
        poll.register(os.pidfd_open(parent), select.POLLIN)
    except (AttributeError, OSError):
        pass  # not on this system; or it has gone already, and with it the lifeline
    while os.getppid() == parent and [lifeline] == [fd for fd, _event in poll.poll()] and os.read(lifeline, 1):
        orders.force()
    orders.stop()
    time.sleep(bound)
    os._exit(_program.FORCED)
