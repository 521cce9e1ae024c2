"""
Apps for child processes, which a test can only name; they print what a test has to wait for.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import signal
import sys
import threading
import time

from aioserve._lifespan import Lifespan
from tests.apps import App, Receive, Scope, Send


class Talking(App):
    """Prints when it has started and when it has ended, and knows some more paths."""

    async def lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        print("starting", os.getpid(), flush=True)
        try:
            await super().lifespan(scope, receive, send)
        finally:
            print("lifespan over", flush=True)

    async def request(self, scope: Scope, receive: Receive, send: Send) -> None:
        match scope["path"]:
            case "/block":
                print("blocking", flush=True)
                while True:
                    time.sleep(60)  # noqa: ASYNC251 (that is what is wrong with it)
            case "/thread":
                threading.Thread(target=threading.Event().wait).start()
            case "/leave":
                os.setpgid(0, os.getpgid(os.getppid()))
            case "/crash":
                self.crash.set()
            case "/exit":
                os._exit(7)
            case "/fork":
                if not (pid := os.fork()):
                    signal.pause()
                print("forked", pid, flush=True)
        await super().request(scope, receive, send)


class Dying(Talking):
    """Its lifespan dies as soon as it serves."""

    async def lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        asyncio.get_running_loop().call_later(0, self.crash.set)
        await super().lifespan(scope, receive, send)


async def path(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with what it finds in its interpreter."""
    body = repr((sys.path, os.getcwd(), sys.warnoptions, sys.stdin.read())).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


class Late(App):
    """Has something to do at the interpreter's exit."""

    async def lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        atexit.register(time.sleep, 1.2)  # longer than what a process is given anyway
        await super().lifespan(scope, receive, send)


def clinging_in_a_hurry() -> App:
    """Make an app that does not shut down, and shorten the time that it would be given here."""
    Lifespan.grace = 0.05
    return Talking(shutdown="clings")


talking = Talking()
late = Late()
dying = Dying()
failing = App(startup="raises")
hanging = Talking(startup="hangs")
