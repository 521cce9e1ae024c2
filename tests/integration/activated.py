"""
A small program as a systemd socket unit starts it; on SIGHUP it stops and is started again, with the same sockets.

It prints "started" and the number of requests that it has answered.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import Any

from aioserve import serving


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Say hello."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    await send({"type": "http.response.body", "body": b"hello"})


async def main() -> int:
    """Serve until a signal comes, and return which."""
    told: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    for number in (signal.SIGHUP, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, told.set_result, number)
    async with serving(app, systemd=True, lifespan="off") as server:
        print("started", flush=True)
        await told
    print(server.stats.served, flush=True)
    return told.result()


if __name__ == "__main__":
    # In between nobody handles the signals; that they come too early must not end it.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if asyncio.run(main()) == signal.SIGHUP:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606
