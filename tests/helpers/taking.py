"""
Apps that take over stop signals, as bot frameworks do; by import string. They print what a test has to wait for.
"""

from __future__ import annotations

import asyncio
import ctypes
import signal
from functools import partial
from typing import Any

from tests.helpers.apps import App, Receive, Scope, Send


class Taking(App):
    """
    Takes over SIGTERM at its startup.

    Args:
        how: "by the loop" (add_signal_handler()), "by a function" (signal.signal()), "exiting" and "raising" (functions
            that raise), "removing" (by the loop, removed at the shutdown), "by default" (the default handler), "in C",
            "nothing".
        signum: The signal.
    """

    def __init__(self, how: str, signum: signal.Signals = signal.SIGTERM, **options: Any) -> None:
        super().__init__(**options)
        self.how = how
        self.signum = signum

    def take(self) -> None:
        match self.how:
            case "by the loop" | "removing":
                asyncio.get_running_loop().add_signal_handler(self.signum, self.called_by_loop, self.signum)
            case "nothing":
                pass
            case "by default":
                signal.signal(self.signum, signal.SIG_DFL)
            case "in C":
                libc = ctypes.CDLL(None)
                libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
                libc.signal(self.signum, int(signal.SIG_IGN))
            case _:
                signal.signal(self.signum, self.called)

    def called(self, signum: int, frame: object) -> None:
        print("the app's handler:", signal.Signals(signum).name, flush=True)
        if self.how == "exiting":
            raise SystemExit(7)
        if self.how == "raising":
            raise self.error

    def called_by_loop(self, signum: int) -> None:
        asyncio.get_running_loop()
        self.called(signum, None)

    async def request(self, scope: Scope, receive: Receive, send: Send) -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, self.release.set)
        print("asked", flush=True)
        await super().request(scope, receive, send)
        print("answered", flush=True)

    async def lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.take()
        print("starting", flush=True)
        try:
            await super().lifespan(scope, receive, send)
        finally:
            if self.how == "removing":
                print("removed:", asyncio.get_running_loop().remove_signal_handler(self.signum), flush=True)
            print("lifespan over", flush=True)


def early(how: str) -> Taking:
    """Take over SIGTERM before there is an app, as an import can do it; and then hang."""
    app = Taking(how, startup="hangs")
    app.take()
    app.how = "nothing"
    return app


by_the_loop = partial(Taking, "by the loop")
by_a_function = partial(Taking, "by a function")
exiting = partial(Taking, "exiting")
raising = partial(Taking, "raising")
removing = partial(Taking, "removing")
by_default = partial(Taking, "by default")
in_c = partial(Taking, "in C")
plain = partial(Taking, "nothing")
hanging_by_the_loop = partial(Taking, "by the loop", startup="hangs")
early_by_the_loop = partial(early, "by the loop")
early_by_a_function = partial(early, "by a function")
reloading = partial(Taking, "by a function", signal.SIGHUP)
reloading_by_the_loop = partial(Taking, "by the loop", signal.SIGHUP)
