"""
A server that is restarted again and again, while clients in another process send requests.
"""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx

from aioserve import StartupError, serving, serving_process, start

LOAD = Path(__file__).parent / "load.py"


def lost(counts: dict[str, int]) -> dict[str, int]:
    """Return those of the counts that tell of lost requests, or of clients that waited long, without zeros."""
    return {name: counts[name] for name in ("unanswered", "broken", "unconnected", "stalled") if counts[name]}


class Counting:
    """An app that sets an event when it has answered a number of requests."""

    def __init__(self) -> None:
        self.left = 0
        self.enough = asyncio.Event()

    async def answers(self, number: int) -> None:
        """Wait until so many more requests are answered."""
        self.left = number
        self.enough.clear()
        await self.enough.wait()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            return
        await asyncio.sleep(0)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
        await send({"type": "http.response.body", "body": b"hello"})
        self.left -= 1
        if self.left <= 0:
            self.enough.set()


@asynccontextmanager
async def load(address: object, clients: int, kind: str, certificate: str | None) -> AsyncIterator[dict[str, int]]:
    """Let clients in another process send requests during the block; afterwards, what is yielded has their counts."""
    command = [sys.executable, str(LOAD), str(address), str(clients), kind, *([certificate] if certificate else [])]
    counts: dict[str, int] = {}
    with (
        ThreadPoolExecutor(1) as executor,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process,  # noqa: ASYNC220, S603
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        yield counts
        process.stdin.close()
        counts.update(json.loads(await asyncio.get_running_loop().run_in_executor(executor, process.stdout.read)))
    assert process.returncode == 0


async def restart_under_load(
    *, restarts: int, clients: int, kind: str, where: str = "lent", certificate: str | None = None, **options: Any
) -> dict[str, int]:
    """
    Restart the server, each time after two answers for each client, on average; return what the clients counted.

    It is on a socket that outlives it ("lent"), on a port, or at the path of a Unix socket.
    """
    app = Counting()
    with socket.socket() as lent, TemporaryDirectory() as directory:
        lent.bind(("127.0.0.1", 0))
        port = lent.getsockname()[1]
        if where == "lent":
            lent.listen(2048)
            options, address = {"sockets": [lent], **options}, port
        elif where == "port":
            lent.close()
            options, address = {"port": port, **options}, port
        else:
            address = f"{directory}/app.sock"
            options = {"uds": address, **options}
        async with load(address, clients, kind, certificate) as counts:
            for _ in range(restarts):
                async with serving(app, **options):
                    await app.answers(2 * clients)
            last = await start(app, **options)
        await last.aclose()
    return counts


async def restart_child_under_load(*, restarts: int, clients: int, kind: str) -> dict[str, int]:
    """Restart a child process, each time after some answers."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    async with load(port, clients, kind, None) as counts:
        for _ in range(restarts):
            async with serving_process("tests.helpers.apps:factory", factory=True, port=port) as server:
                async with httpx.AsyncClient(base_url=server.url, trust_env=False) as client:
                    for _ in range(clients):
                        await client.get("/")
        last = await start(Counting(), port=port)
    await last.aclose()
    return counts


class Slow(Counting):
    """An app whose startup takes until the server before it has answered a number of requests; it may then fail."""

    def __init__(self, before: Counting, requests: int, *, fails: bool) -> None:
        super().__init__()
        self.before = before
        self.requests = requests
        self.fails = fails

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.before.answers(self.requests)
            if self.fails:
                raise RuntimeError("as told")
        await super().__call__(scope, receive, send)


async def roll_under_load(
    *, restarts: int, clients: int, kind: str = "fresh", certificate: str | None = None, **options: Any
) -> dict[str, int]:
    """
    Replace the server by a new one on the same port, each time when the new one has started; every fifth one fails.

    A client may take long to connect: the kernel sends a SYN again after a second if a closing server has dropped it.
    """
    app = Counting()
    server = await start(app, reuse_port=True, **options)
    async with load(server.port, clients, kind, certificate) as counts:
        for number in range(restarts):
            new = Slow(app, clients, fails=number % 5 == 4)
            try:
                following = await start(new, port=server.port, reuse_port=True, **options)
            except StartupError:
                continue
            await new.answers(clients)  # both answer
            await server.aclose()
            app, server = new, following
            await app.answers(clients)
    await server.aclose()
    return counts
