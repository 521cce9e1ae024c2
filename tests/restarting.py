"""
A server that is restarted on one lent socket, again and again, while clients in another process ask it.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from pathlib import Path
from typing import Any

from aioserve import serving

LOAD = Path(__file__).parent / "load.py"


class Counting:
    """An app that tells when it has answered so many requests."""

    def __init__(self) -> None:
        self.left = 0
        self.enough = asyncio.Event()

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
    Restart it so often, each time after every client was answered twice, on average; return what the clients counted.
    """
    app = Counting()
    with socket.socket() as lent:
        lent.bind(("127.0.0.1", 0))
        lent.listen(2048)
        load = await asyncio.create_subprocess_exec(
            sys.executable,
            str(LOAD),
            str(lent.getsockname()[1]),
            str(clients),
            kind,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        for _ in range(restarts):
            app.left = 2 * clients
            app.enough.clear()
            async with serving(app, sockets=[lent], **options):
                await app.enough.wait()
        async with serving(app, sockets=[lent]):
            assert load.stdin is not None
            load.stdin.close()
            assert load.stdout is not None
            counted = await load.stdout.read()
            assert await load.wait() == 0
    result: dict[str, int] = json.loads(counted)
    return result
