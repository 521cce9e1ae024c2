"""
A server that is restarted on one lent socket, again and again, while clients in another process send requests.
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

from aioserve import serving

LOAD = Path(__file__).parent / "load.py"


class Counting:
    """An app that sets an event when it has answered a number of requests."""

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
                app.left = 2 * clients
                app.enough.clear()
                async with serving(app, sockets=[lent], **options):
                    await app.enough.wait()
            async with serving(app, sockets=[lent]):
                load.stdin.close()
                counted = await asyncio.get_running_loop().run_in_executor(executor, load.stdout.read)
        assert load.returncode == 0
    result: dict[str, int] = json.loads(counted)
    return result
