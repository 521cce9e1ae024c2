"""
How long does it take to start and stop a server with nothing to do?

Timed, in turn, in one process and one loop, after a warm-up; whoever has its turn does it ten times in a row (uvicorn's
ways, once), of which the median counts, since the first finds the processor's caches full of the last one's things:

- bare: a server of asyncio's own, opened and closed; nobody can be faster
- sketch: the least that an ASGI server is, without one error path
- aioserve: `async with serving(app): pass`, with the app's lifespan; and in a thread, by `start_in_thread()`
- aiohttp (an `AppRunner` and a `TCPSite`; once with one `Application` for all, once with one for each), hypercorn,
  anycorn, h2corn, granian and websockets (which knows no lifespan) in the same loop, as `common/peers.py` has them
- uvicorn, task: `uvicorn.Server.serve()` in a task, `started` looked at on every loop turn, `should_exit` set
- uvicorn, thread: `uvicorn.Server.run()` in a thread, `started` polled every millisecond, `should_exit` set, joined
- uvicorn, fork and spawn: the same in a process of `multiprocessing`, from a process that does nothing else; connected
  to every 10 ms until it accepts, terminated, joined

And cold: a new interpreter that imports, starts, stops and ends; bare, aioserve, aiohttp and uvicorn in a thread.

    python benchmarks/start_stop.py [--rounds 200] [--loop asyncio] [--json FILE]
"""

from __future__ import annotations

import asyncio
import multiprocessing
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from common import children, measuring, peers

PROCESSES = ("fork", "spawn")

COLD = {
    "bare": """
import asyncio

async def main():
    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    server.close()
    await server.wait_closed()

asyncio.run(main())
""",
    "aioserve": """
import asyncio
from aioserve import serving
{app}
async def main():
    async with serving(app):
        pass

asyncio.run(main())
""",
    "aiohttp": """
import asyncio
from aiohttp import web

async def main():
    runner = web.AppRunner(web.Application(), access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    await runner.cleanup()

asyncio.run(main())
""",
    "uvicorn, thread": """
import threading, time
import uvicorn
{app}
server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, loop="asyncio"))
thread = threading.Thread(target=server.run)
thread.start()
while not server.started:
    time.sleep(0.001)
server.should_exit = True
thread.join()
""",
}

APP = """
async def app(scope, receive, send):
    await receive()
    await send({"type": "lifespan.startup.complete"})
    await receive()
    await send({"type": "lifespan.shutdown.complete"})
"""


IN_A_ROW = 10


def in_a_row(way: Callable[[], Awaitable[None]]) -> Callable[[], Awaitable[float]]:
    """Return the median of ten."""
    timing = measuring.timed(way)

    async def median() -> float:
        return statistics.median([await timing() for _ in range(IN_A_ROW)])

    return median


def cycle(start: peers.Start) -> Callable[[], Awaitable[None]]:
    """Start and stop another."""

    async def start_and_stop() -> None:
        running = await start()
        await running.stop()

    return start_and_stop


def in_process(child: children.Child) -> Callable[[], Awaitable[float]]:
    """Let a child do it with a process of its own."""

    async def timing() -> float:
        took: float = child.ask("again")
        return took

    return timing


def run_uvicorn(port: int, loop: str) -> None:
    """What the process does."""
    import uvicorn

    uvicorn.Server(peers.uvicorn_config(port=port, loop=loop)).run()


async def be_the_parent(method: str, loop: str) -> None:
    """Start and stop a process, each time when told to."""
    context = multiprocessing.get_context(method)
    async for _ in children.questions():
        with socket.socket() as free:
            free.bind((peers.HOST, 0))
            port = free.getsockname()[1]
        before = time.perf_counter()
        process = context.Process(target=run_uvicorn, args=(port, loop))  # type: ignore[attr-defined]
        process.start()
        while True:
            try:
                socket.create_connection((peers.HOST, port)).close()
            except ConnectionRefusedError:
                time.sleep(0.01)
            else:
                break
        process.terminate()
        process.join()
        children.reply(time.perf_counter() - before)


def cold(program: str, interpreter: children.Interpreter = children.THIS) -> Callable[[], Coroutine[Any, Any, float]]:
    """Run it in a new interpreter."""

    async def run() -> None:
        command = [interpreter.python, "-c", program.replace("{app}", APP)]
        subprocess.run(command, check=True, env=interpreter.environment)  # noqa: ASYNC221

    return measuring.timed(run)


async def main(rounds: int, processes: dict[str, children.Child]) -> tuple[dict[str, list[float]], ...]:
    """Measure both, warm and cold."""
    ways: dict[str, Callable[[], Awaitable[float]]] = {}
    for name, make in peers.PEERS.items():
        ways[name] = (measuring.timed if name.startswith("uvicorn") else in_a_row)(cycle(make()))
    ways.update({f"uvicorn, {method}": in_process(child) for method, child in processes.items()})
    # The slow ones take thousands of times longer, and tell as much in fewer rounds.
    every = {name: 19 for name in ways if name.startswith("uvicorn")}
    warm = await measuring.in_turn(ways, rounds, every=every)
    cold_ways = {name: cold(program) for name, program in COLD.items()}
    return warm, await measuring.in_turn(cold_ways, max(rounds // 10, min(rounds, 5)), warm_up=1)


if __name__ == "__main__":
    parser = measuring.parser(__doc__, rounds=200)
    parser.add_argument("--parent", choices=PROCESSES, help="for its own use")
    arguments = parser.parse_args()
    if arguments.parent:
        asyncio.run(be_the_parent(arguments.parent, arguments.loop))
        sys.exit()

    # granian keeps a descriptor of each.
    measuring.more_descriptors(12_000)
    report = measuring.Report(__file__, arguments)
    parents = [children.Child(__file__, "--parent", method, "--loop", arguments.loop) for method in PROCESSES]
    with parents[0] as fork, parents[1] as spawn:
        warm, new = measuring.run(main(arguments.rounds, {"fork": fork, "spawn": spawn}), arguments.loop)
    report.times("start and stop", warm)
    report.times("start and stop, cold", new)
    report.write()
