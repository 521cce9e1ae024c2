"""
A server that is restarted again and again, while clients in another process send requests.
"""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from aioserve import StartupError, serving, start

LOAD = Path(__file__).parent / "load.py"


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


async def restart_under_load(*, restarts: int, clients: int, kind: str, **options: Any) -> dict[str, int]:
    """
    Restart the server, each time after two answers for each client, on average; return what the clients counted.
    """
    app = Counting()
    with socket.socket() as lent:
        lent.bind(("127.0.0.1", 0))
        lent.listen(2048)
        command = [sys.executable, str(LOAD), str(lent.getsockname()[1]), str(clients), kind]
        with (
            ThreadPoolExecutor(1) as executor,
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as load,  # noqa: ASYNC220, S603
        ):
            assert load.stdin is not None
            assert load.stdout is not None
            for _ in range(restarts):
                async with serving(app, sockets=[lent], **options):
                    await app.answers(2 * clients)
            async with serving(app, sockets=[lent]):
                load.stdin.close()
                counted = await asyncio.get_running_loop().run_in_executor(executor, load.stdout.read)
        assert load.returncode == 0
    result: dict[str, int] = json.loads(counted)
    return result


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


async def roll_under_load(*, restarts: int, clients: int, **options: Any) -> dict[str, int]:
    """
    Replace the server by a new one on the same port, each time when the new one has started; every fifth one fails.
    """
    app = Counting()
    server = await start(app, reuse_port=True, **options)
    assert server.port is not None
    command = [sys.executable, str(LOAD), str(server.port), str(clients), "fresh"]
    with (
        ThreadPoolExecutor(1) as executor,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as load,  # noqa: ASYNC220, S603
    ):
        assert load.stdin is not None
        assert load.stdout is not None
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
        load.stdin.close()
        counted = await asyncio.get_running_loop().run_in_executor(executor, load.stdout.read)
    await server.aclose()
    assert load.returncode == 0
    result: dict[str, int] = json.loads(counted)
    return result
