"""
How long does it take to start and stop a server with nothing to do?

Timed, in turn, in one process and one loop, after a warm-up:

- bare: `asyncio.start_server()` opened and closed; nobody can be faster
- aioserve: `async with serving(app): pass`, with the app's lifespan
- task: `uvicorn.Server.serve()` as a task, `started` looked at on every loop turn, `should_exit` set
- thread: `uvicorn.Server.run()` in a thread, `started` polled every millisecond, `should_exit` set, the thread joined

Printed: the median of each as a ratio to the bare one, then in milliseconds.

    python benchmarks/start_stop.py [--rounds 50]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import platform
import statistics
import threading
import time
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from typing import Any

import uvicorn

from aioserve import serving


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Do what the lifespan protocol asks for, and no more."""
    assert scope["type"] == "lifespan"
    await receive()
    await send({"type": "lifespan.startup.complete"})
    await receive()
    await send({"type": "lifespan.shutdown.complete"})


def config() -> uvicorn.Config:
    """Make what both of uvicorn's ways are given; ours defaults to the same."""
    return uvicorn.Config(app, port=0, log_config=None)


async def bare() -> None:
    """Open and close a socket, with asyncio's streams behind it."""
    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    server.close()
    await server.wait_closed()


async def aioserve() -> None:
    """Enter and leave the block."""
    async with serving(app):
        pass


async def task() -> None:
    """Run uvicorn as a task, as patiently as a loop allows; without its signal handlers, which are not asked about."""
    server = uvicorn.Server(config())
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]
    running = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0)
    server.should_exit = True
    await running


async def thread() -> None:
    """Run uvicorn in a thread, as the popular snippet does."""
    server = uvicorn.Server(config())
    running = threading.Thread(target=server.run)
    running.start()
    while not server.started:
        time.sleep(0.001)  # noqa: ASYNC251 (the snippet's way)
    server.should_exit = True
    running.join()


WAYS: dict[str, Callable[[], Awaitable[None]]] = {
    "bare": bare,
    "aioserve": aioserve,
    "task": task,
    "thread": thread,
}
# The slow ones take hundreds of times longer, and tell as much in fewer rounds.
EVERY = {"bare": 1, "aioserve": 1, "task": 10, "thread": 10}


async def measure(rounds: int) -> dict[str, float]:
    """Return the median of each way, in milliseconds."""
    took: dict[str, list[float]] = {name: [] for name in WAYS}
    for number in range(-10, rounds):
        for name, way in WAYS.items():
            if number % EVERY[name]:
                continue
            before = time.perf_counter()
            await way()
            if number >= 0:
                took[name].append((time.perf_counter() - before) * 1000)
    return {name: statistics.median(each) for name, each in took.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Time the start and stop of an idle server.")
    parser.add_argument("--rounds", type=int, default=200, help="how often to time each; default: 200")
    medians = asyncio.run(measure(parser.parse_args().rounds))

    packages = ", ".join(f"{name} {version(name)}" for name in ("aioserve-asgi", "uvicorn", "anyio"))
    print(f"Python {platform.python_version()}, {packages}, {platform.platform(terse=True)}")
    for name, median in medians.items():
        print(f"{name:9} {median / medians['bare']:9.1f} x bare {median:9.3f} ms")
