"""
How soon comes the first byte of the first response?

Timed, in turn, in one process and one loop, on a server that has just started, with a connection that is the first:

- from connecting to the first byte
- from nothing to the first byte: starting included

The client is a bare socket in the same loop. The servers: a bare protocol of asyncio's that says hello, aioserve,
aiohttp, hypercorn, h2corn and uvicorn in a task, which share that loop; not granian, which does not say when it
listens. aioserve and uvicorn have the same HTTP implementation.

    python benchmarks/first_byte.py [--rounds 200] [--http httptools] [--loop asyncio] [--json FILE]
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from common import measuring, peers
from common.clients import GET

NAMES = ("bare", "aioserve", "aiohttp", "aiohttp, new app", "hypercorn", "anycorn", "h2corn", "uvicorn, task")


async def first_byte(port: int) -> None:
    """Connect, ask, and wait for the first byte."""
    loop = asyncio.get_running_loop()
    with socket.socket() as client:
        client.setblocking(False)
        await loop.sock_connect(client, (peers.HOST, port))
        await loop.sock_sendall(client, GET)
        assert await loop.sock_recv(client, 1) == b"H"
        # The connection is closed from here, so that no stop has to wait for anything.


def once(start: peers.Start, took: list[float]) -> Callable[[], Awaitable[float]]:
    """Return the time from connecting; keep the time from the start."""

    async def timing() -> float:
        begin = time.perf_counter()
        running = await start()
        port = running.port()
        started = time.perf_counter()
        await first_byte(port)
        end = time.perf_counter()
        took.append(end - begin)
        await running.stop()
        return end - started

    return timing


async def main(rounds: int, http: str, names: Sequence[str]) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Measure both."""
    makes: dict[str, Callable[[], peers.Start]] = {
        **peers.PEERS,
        "aioserve": partial(peers.aioserve, http=http),
        "uvicorn, task": partial(peers.uvicorn_task, http=http),
    }
    from_nothing: dict[str, list[float]] = {name: [] for name in names}
    ways = {name: once(makes[name](), from_nothing[name]) for name in names}
    figures = await measuring.in_turn(ways, rounds, every={"uvicorn, task": 5})
    return figures, {name: took[-len(figures[name]) :] for name, took in from_nothing.items()}


if __name__ == "__main__":
    parser = measuring.parser(__doc__, rounds=200)
    parser.add_argument("--http", choices=["h11", "httptools", "zttp"], default="httptools", help="default: httptools")
    arguments = parser.parse_args()
    report = measuring.Report(__file__, arguments)
    # On uvloop, anycorn raises where a client has gone (0.20).
    names = [name for name in NAMES if (name, arguments.loop) != ("anycorn", "uvloop")]
    figures, from_nothing = measuring.run(main(arguments.rounds, arguments.http, names), arguments.loop)
    report.times("first byte, from connecting", figures)
    report.times("first byte, from nothing", from_nothing)
    report.write()
