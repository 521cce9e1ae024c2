"""
How many requests are lost when a server is restarted under load?

200 clients in another process, which share no loop with the server; 100 restarts on one lent socket, each after every
client was answered twice, on average:

- fresh: a new connection for each request
- drained: kept-alive connections, with a `drain_delay` in which each client asks again, and is told to go
- kept-alive: the same without it; what is lost is HTTP/1.1's own race, a request that crosses the close on its way

Printed, and written as JSON: what the clients counted. "unanswered" failed with not a byte of an answer, and could be
sent again; "broken" with a part of one. All but the last are to be 0.

    python benchmarks/restarts.py [--rounds 100] [--clients 200]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import sys
import time
from collections import Counter
from typing import Any

from aioserve import serving
from common import children, clients, peers

QUESTIONS: dict[str, dict[str, Any]] = {
    "fresh": {},
    "drained": {"drain_delay": 0.3},
    "kept-alive": {},
}


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


async def restart(name: str, rounds: int, count: int) -> dict[str, int]:
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
                counted: dict[str, int] = await asyncio.to_thread(load.ask, "end")
    return counted


async def be_the_load(port: int, name: str, count: int) -> None:
    """Send requests from so many clients until we are asked, then reply with what became of these."""
    counts: Counter[str] = Counter(answered=0, unanswered=0, broken=0)
    ended = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        for _ in range(count):
            group.create_task(client(port, clients.GET_ONCE if name == "fresh" else clients.GET, counts, ended))
        async for _ in children.questions():
            ended.set()
            break
    children.reply(counts)


async def client(port: int, request: bytes, counts: Counter[str], ended: asyncio.Event) -> None:
    """Send one request after the other, on one connection until an answer says that it closes, or none comes."""
    writer = None
    while not ended.is_set():
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
            if b"connection: close" not in head.lower():
                continue
        writer.transport.abort()
        writer = None
    if writer is not None:
        writer.transport.abort()


async def main(rounds: int, count: int) -> int:
    """Ask all three; return how many requests were lost that should not have been."""
    results = {}
    for name in QUESTIONS:
        began = time.perf_counter()
        results[name] = await restart(name, rounds, count)
        print(f"{name:12}", results[name], f"{time.perf_counter() - began:.1f} s", file=sys.stderr)
    print(json.dumps(results))
    return sum(counts["broken"] + counts["unanswered"] * (name != "kept-alive") for name, counts in results.items())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Restart a server under load.")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--load", nargs=2, metavar=("PORT", "NAME"), help="for its own use")
    arguments = parser.parse_args()
    if arguments.load:
        asyncio.run(be_the_load(int(arguments.load[0]), arguments.load[1], arguments.clients))
    else:
        sys.exit(asyncio.run(main(arguments.rounds, arguments.clients)) != 0)
