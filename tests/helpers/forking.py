"""
Forks: an app whose handlers fork children that live on, and the sockets that a forked child has.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from tests.helpers.apps import App, Receive, Scope, Send
from tests.helpers.programs import Program

# Where a process with threads forks, Python 3.12 and later warn; -W takes the beginning of a message as it is.
ALLOWED = ("-W", "ignore:This process:DeprecationWarning")


def live_on() -> None:
    """Live on in a child, in a group of its own, until it is killed."""
    os.setsid()
    signal.alarm(120)  # the test that is to kill it may have been killed
    print("forked", os.getpid(), flush=True)
    while True:
        signal.pause()


def fork() -> None:
    if not os.fork():
        live_on()


class Forking(App):
    """Each of these paths forks a child in another way."""

    pool: ProcessPoolExecutor

    async def request(self, scope: Scope, receive: Receive, send: Send) -> None:
        context = multiprocessing.get_context("fork")
        match scope["path"]:
            case "/fork":
                fork()
            case "/thread":
                await asyncio.to_thread(fork)
            case "/process":
                context.Process(target=live_on, daemon=True).start()
            case "/pool":
                self.pool = ProcessPoolExecutor(1, context)
                self.pool.submit(live_on)
        await super().request(scope, receive, send)


app = Forking()


@contextlib.contextmanager
def forked(program: Program) -> Iterator[int]:
    """Wait for a child that `live_on()` has announced, and kill it in the end."""
    child = int(program.wait_for("forked").split()[1])
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)


def in_child(act: Callable[[], Any]) -> Any:
    """Fork a child, and return what a function returns there."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, json.dumps(act()).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return json.loads(answer)


def open_at(address: Any) -> int:
    """Count the sockets of this process that are bound to an address: listening ones and accepted connections."""
    count = 0
    for number in map(int, os.listdir("/dev/fd")):
        try:
            sock = socket.socket(fileno=number)
        except OSError:
            continue  # not a socket, or only there to read the list
        try:
            name = sock.getsockname()
            # A Unix socket was bound in another directory, before it had its place.
            bound_as = os.path.basename(name) if isinstance(name, str) else name
            count += bound_as == (os.path.basename(address) if isinstance(address, str) else address)
        finally:
            sock.detach()
    return count


def in_thread(act: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """Begin to call a function in a thread; return the thread, and a list for the result."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(act()))
    thread.start()
    return thread, results
