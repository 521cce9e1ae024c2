"""
A program with a server in a thread, and one request that ends only when the server stops.

    python -m tests.helpers.threaded LOOP END [FOLLOWED_BY]

END is a function of this file. It is called when the server has started, and the request is in flight.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import sys
import threading
import time
from typing import Any

from aioserve import StartupError, ThreadServer, _limits, start_in_thread
from tests.conftest import LOOPS
from tests.helpers.apps import App, Receive, Scope, Send

holding = threading.Event()
starting = threading.Event()


class Printing(App):
    """Prints what happens; "/wait" is answered when a stop has begun, with the help of the loop's threads."""

    async def lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.startup == "hangs":
            print("starting", flush=True)
            starting.set()
        try:
            await super().lifespan(scope, receive, send)
        finally:
            print("lifespan over", flush=True)

    async def request(self, scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.to_thread(int)
        print("asked", scope["path"], flush=True)
        holding.set()
        if scope["path"] == "/wait":
            await scope["state"]["aioserve"].stopping.wait()
            await asyncio.to_thread(int)
        elif scope["path"] in ("/hold", "/cling"):
            await scope["state"]["aioserve"].stopping.wait()
            print("stopping", flush=True)
        try:
            await super().request(scope, receive, send)
        except asyncio.CancelledError:
            print("cancelled", flush=True)
            raise


def blocks_the_loop() -> None:
    """Let the loop be blocked for ever; the program ends."""

    def block() -> None:
        print("blocked", flush=True)
        time.sleep(1_000)

    _limits.CANCELLED_HANDLERS = _limits.LIFESPAN_GRACE = _limits.THREAD_EXIT = 0.05
    server = start_in_thread(Printing(), shutdown_timeout=0.1)
    server._server._loop.call_soon_threadsafe(block)


def start(startup: str = "completes", shutdown: str = "completes") -> ThreadServer:
    return start_in_thread(Printing(startup, shutdown), shutdown_timeout=None)


def started(*, shutdown: str = "completes") -> ThreadServer:
    """Start a server, and wait for a request to it."""
    server = start(shutdown=shutdown)
    print(server.url, flush=True)
    holding.wait()
    return server


def falls_off_the_end() -> None:
    started()


def exits() -> None:
    started()
    sys.exit(3)


def raises() -> None:
    started()
    raise LookupError("the program's own")


def fails_to_shut_down() -> None:
    started(shutdown="raises")


def sleeps_in_its_block() -> None:
    with started():
        print("in the block", flush=True)
        time.sleep(60)


def waits_until_it_closes() -> None:
    with started() as server:
        print("in the block", flush=True)
        server.wait_closed()


def stops() -> None:
    started().stop()


def hangs_in_its_startup() -> None:
    start("hangs")


def ends_while_another_thread_starts_one() -> None:
    def hang() -> None:
        try:
            start("hangs")
        except StartupError as exc:
            print(f"{type(exc).__name__}: {exc}", flush=True)

    threading.Thread(target=hang).start()
    starting.wait()


def forks() -> None:
    """End a child before its parent; it has a server of its own."""
    server = started()
    child = os.fork()
    if child == 0:
        with start() as own:
            assert own.url != server.url
        start_in_thread(App())
        print("the child ends", flush=True)
        return
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    print("the parent ends", flush=True)


def forgets_it_in_a_process() -> None:
    process = multiprocessing.get_context("fork").Process(target=started)
    process.start()
    process.join()
    print("exit code", process.exitcode, flush=True)


def use_loop(name: str) -> None:
    """Let threads have a loop, as the policy of a program would."""
    events: Any = asyncio.events
    events.new_event_loop = LOOPS[name].get("loop_factory", events.new_event_loop)


if __name__ == "__main__":
    logging.basicConfig(format="%(name)s: %(message)s")
    use_loop(sys.argv[1])
    globals()[sys.argv[2]]()
