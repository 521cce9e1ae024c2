"""
How many requests are lost when a server is restarted under load?

200 clients in another process, which share no loop with the server; 100 restarts on one lent socket, each after every
client was answered twice, on average:

- fresh: a new connection for each request
- drained: kept-alive connections, with a `drain_delay` in which each client asks again, and is told to go
- kept-alive: the same without it; what is lost is HTTP/1.1's own race, a request that crosses the close on its way
- overlapping: a new connection for each request, and two servers with `reuse_port`, of which the next one starts, which
  takes its app half a second, while the last one serves (a tenth of the restarts)

Printed: what the clients counted. "unanswered" failed with not a byte of an answer, and could be sent again; "broken"
with a part of one: all but those of "kept-alive" are to be 0. "longest" is the longest time from connecting to an
answer, in milliseconds.

    python benchmarks/restarts.py [--rounds 100] [--clients 200] [--json FILE]
"""

from __future__ import annotations

import asyncio
import socket
import sys
import time
from typing import Any

from aioserve import serving, start
from common import children, clients, measuring, peers

QUESTIONS: dict[str, dict[str, Any]] = {
    "fresh": {},
    "drained": {"drain_delay": 0.3},
    "kept-alive": {},
    "overlapping": {"reuse_port": True},
}
STARTUP = 0.5


class Counting:
    """The peers' app, which tells when it has answered so many requests."""

    def __init__(self) -> None:
        self.left = 0
        self.enough = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await peers.app(scope, receive, send)
            return
        await asyncio.sleep(0)  # so that a stop can find a request in flight
        await peers.app(scope, receive, send)
        self.left -= 1
        if self.left <= 0:
            self.enough.set()


class SlowStartup(Counting):
    """Takes its time."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await asyncio.sleep(STARTUP)
        await super().__call__(scope, receive, send)


async def overlap(rounds: int, count: int) -> dict[str, float]:
    """Restart as often, with the next server on the port before the last one stops."""
    async with await start(peers.app, port=0, access_log=False, **QUESTIONS["overlapping"]) as server:
        port = server.port or 0
        with children.Child(__file__, "--load", str(port), "fresh", "--clients", str(count)) as load:
            for _ in range(rounds):
                app = SlowStartup()
                app.left = count
                following = await start(app, port=port, access_log=False, **QUESTIONS["overlapping"])
                await server.aclose()
                await app.enough.wait()
                server = following
            counted: dict[str, float] = await asyncio.to_thread(load.ask, "end")
            await server.aclose()
    return counted


async def restart(name: str, rounds: int, count: int) -> dict[str, float]:
    """Restart the server so often under the load of so many clients; return what these have counted."""
    app = Counting()
    with socket.socket() as lent:
        lent.bind((peers.HOST, 0))
        lent.listen(peers.BACKLOG)
        with children.Child(__file__, "--load", str(lent.getsockname()[1]), name, "--clients", str(count)) as load:
            for _ in range(rounds):
                app.left = 2 * count
                app.enough.clear()
                async with serving(app, sockets=[lent], access_log=False, **QUESTIONS[name]):
                    await app.enough.wait()
            async with serving(app, sockets=[lent], access_log=False):
                counted: dict[str, float] = await asyncio.to_thread(load.ask, "end")
    return counted


async def be_the_load(port: int, name: str, count: int) -> None:
    """Send requests from so many clients until we are asked, then reply with what became of these."""
    counts: dict[str, float] = {"answered": 0, "unanswered": 0, "broken": 0, "longest": 0.0}
    ended = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        for _ in range(count):
            group.create_task(client(port, clients.GET_ONCE if name == "fresh" else clients.GET, counts, ended))
        async for _ in children.questions():
            ended.set()
            break
    children.reply(counts)


async def client(port: int, request: bytes, counts: dict[str, float], ended: asyncio.Event) -> None:
    """Send one request after the other, on one connection until an answer says that it closes, or none comes."""
    writer = None
    while not ended.is_set():
        began = time.perf_counter()
        if writer is None:
            reader, writer = await asyncio.open_connection(peers.HOST, port)
        head = b""
        try:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), head
            await reader.readexactly(5)
        except (asyncio.IncompleteReadError, ConnectionError) as exc:
            counts["broken" if head or getattr(exc, "partial", b"") else "unanswered"] += 1
        else:
            counts["answered"] += 1
            counts["longest"] = max(counts["longest"], (time.perf_counter() - began) * 1000)
            if b"connection: close" not in head.lower():
                continue
        writer.transport.abort()
        writer = None
    if writer is not None:
        writer.transport.abort()


async def main(report: measuring.Report, rounds: int, count: int) -> bool:
    """Ask all; return whether requests were lost that should not have been."""
    results = {}
    for name in QUESTIONS:
        if name == "overlapping":
            results[name] = await overlap(max(1, rounds // 10), count)
        else:
            results[name] = await restart(name, rounds, count)
    report.table(f"{rounds} restarts under {count} clients", results)
    return any(counts["broken"] or (counts["unanswered"] and name != "kept-alive") for name, counts in results.items())


if __name__ == "__main__":
    parser = measuring.parser(__doc__, rounds=100)
    parser.add_argument("--clients", type=int, default=200, help="default: 200")
    parser.add_argument("--load", nargs=2, metavar=("PORT", "NAME"), help="for its own use")
    arguments = parser.parse_args()
    if arguments.load:
        asyncio.run(be_the_load(int(arguments.load[0]), arguments.load[1], arguments.clients))
    else:
        report = measuring.Report(__file__, arguments)
        lost = measuring.run(main(report, arguments.rounds, arguments.clients), arguments.loop)
        report.write()
        sys.exit(lost)
