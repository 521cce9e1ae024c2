"""
Apps for child processes, by import string; they print what a test has to wait for.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import signal
import sys
import threading
import time

from aioserve import _limits
from tests.helpers.apps import App, AppError, Receive, Scope, Send


class Talking(App):
    """Prints when it starts and when it has ended, and has some more paths."""

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
                    time.sleep(60)  # noqa: ASYNC251 (it is to block the loop)
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
    """An app whose lifespan raises as soon as it is served."""

    async def lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        asyncio.get_running_loop().call_later(0, self.crash.set)
        await super().lifespan(scope, receive, send)


async def path(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with the settings of the interpreter."""
    body = repr((sys.path, os.getcwd(), sys.warnoptions, sys.stdin.read())).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


class Late(App):
    """An app that registers an exit hook, which takes a while."""

    async def lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        atexit.register(time.sleep, 1.2)  # longer than a child may take to exit if its `shutdown_timeout` is shorter
        await super().lifespan(scope, receive, send)


async def failing_at_length(scope: Scope, receive: Receive, send: Send) -> None:
    """Fail to start with a message that is a traceback, and return."""
    await receive()
    message = 'Traceback (most recent call last):\n  File "app.py", line 1\nNameError: no name\n'
    await send({"type": "lifespan.startup.failed", "message": message})


async def raising_at_length(scope: Scope, receive: Receive, send: Send) -> None:
    """Fail to start with an exception whose message has several lines."""
    await receive()
    raise AppError("2 validation errors\nname\n  Field required")


def clinging_in_a_hurry() -> App:
    """Make an app that does not shut down, and shorten the time that its shutdown gets."""
    _limits.LIFESPAN_GRACE = 0.05
    return Talking(shutdown="clings")


talking = Talking()
late = Late()
dying = Dying()
failing = App(startup="raises")
hanging = Talking(startup="hangs")
