"""
What do 1,000 servers in one loop cost?

Timed, in turn, in one process and one loop: starting all, one after the other, and stopping all; of asyncio's own
(bare), a sketch of an ASGI server that has not one error path, aioserve, aiohttp (once with one `Application` for all,
once with one for each), hypercorn and anycorn.

Weighed, in a process for each: the memory of a server, as tracemalloc sees it and as the process grows (RSS). For
uvicorn, that is its objects: a `Config`, loaded, and a `Server` after `startup()`; and the same served in a task.

    python benchmarks/many_servers.py [--rounds 10] [--servers 1000] [--loop asyncio] [--json FILE]
"""

from __future__ import annotations

import gc
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Awaitable, Callable
from typing import Any

import psutil
import uvicorn

from common import children, measuring, peers

NAMES = ("bare", "sketch", "aioserve", "aiohttp", "aiohttp, new app", "hypercorn", "anycorn")
WEIGHED = (*NAMES, "uvicorn's objects", "uvicorn, task")


def uvicorn_objects() -> peers.Start:
    """What `uvicorn.Server.serve()` makes, without its task."""

    async def start() -> peers.Running:
        config = peers.uvicorn_config()
        config.load()
        server = uvicorn.Server(config)
        server.lifespan = config.lifespan_class(config)
        await server.startup()

        async def stop() -> None:
            server.servers[0].close()
            await server.lifespan.shutdown()

        return peers.Running(lambda: 0, stop)

    return start


def all_at(start: peers.Start, servers: int, stopping: list[float]) -> Callable[[], Awaitable[float]]:
    """Return the time of starting one; keep that of stopping one."""

    async def timing() -> float:
        gc.collect()
        begin = time.perf_counter()
        running = [await start() for _ in range(servers)]
        started = time.perf_counter()
        for each in running:
            await each.stop()
        stopping.append((time.perf_counter() - started) / servers)
        return (started - begin) / servers

    return timing


async def times(rounds: int, servers: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Time both."""
    stopping: dict[str, list[float]] = {name: [] for name in NAMES}
    ways = {name: all_at(peers.PEERS[name](), servers, stopping[name]) for name in NAMES}
    starting = await measuring.in_turn(ways, rounds, warm_up=1)
    return starting, {name: took[-rounds:] for name, took in stopping.items()}


async def weigh(name: str, servers: int, *, traced: bool) -> float:
    """Return the KiB of one."""
    start = uvicorn_objects() if name == "uvicorn's objects" else peers.PEERS[name]()
    for _ in range(3):
        first = await start()
        await first.stop()
    gc.collect()
    if traced:
        tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0] if traced else psutil.Process().memory_info().rss
    running = [await start() for _ in range(servers)]
    gc.collect()
    after = tracemalloc.get_traced_memory()[0] if traced else psutil.Process().memory_info().rss
    tracemalloc.stop()
    del running
    return float(after - before) / servers / 1024


def weigh_apart(
    name: str, servers: int, loop: str, interpreter: children.Interpreter = children.THIS
) -> dict[str, float]:
    """Weigh it twice, in a process of its own each time."""
    command = [interpreter.python, __file__, "--servers", str(servers), "--loop", loop, "--weigh", name]
    kinds = {"traced, KiB": "tracemalloc", "RSS, KiB": "rss"}
    weighed = {}
    for title, kind in kinds.items():
        done = subprocess.run([*command, kind], check=True, capture_output=True, text=True, env=interpreter.environment)
        weighed[title] = float(done.stdout)
    return weighed


def main(arguments: Any) -> None:
    """Measure all."""
    report = measuring.Report(__file__, arguments)
    starting, stopping = measuring.run(times(arguments.rounds, arguments.servers), arguments.loop)
    report.times("start each of many", starting, unit="µs")
    report.times("stop each of many", stopping, unit="µs")
    rows = {name: weigh_apart(name, arguments.servers, arguments.loop) for name in WEIGHED}
    for row in rows.values():
        row["x uvicorn's"] = row["traced, KiB"] / rows["uvicorn's objects"]["traced, KiB"]
    report.table("memory of each of many", rows)
    report.write()


if __name__ == "__main__":
    measuring.more_descriptors(12_000)
    parser = measuring.parser(__doc__, rounds=10)
    parser.add_argument("--servers", type=int, default=1000)
    parser.add_argument("--weigh", nargs=2, help="for its own use")
    arguments = parser.parse_args()
    if arguments.weigh:
        name, kind = arguments.weigh
        weighed = measuring.run(weigh(name, arguments.servers, traced=kind == "tracemalloc"), arguments.loop)
        sys.stdout.write(f"{weighed}\n")
        sys.stdout.flush()
        # Nothing is stopped: the loop and its thousand tasks end with the process.
    else:
        main(arguments)
