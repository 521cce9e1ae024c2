"""
A small program for a systemd socket unit; on SIGHUP it stops and starts itself again, with the same sockets.

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
    """Serve until a signal comes, and return the signal."""
    signalled: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    for number in (signal.SIGHUP, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, signalled.set_result, number)
    async with serving(app, systemd=True, lifespan="off") as server:
        print("started", flush=True)
        await signalled
    print(server.stats.served, flush=True)
    return signalled.result()


if __name__ == "__main__":
    # Between two runs there are no handlers: a signal that comes too early must not end the program.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if asyncio.run(main()) == signal.SIGHUP:
        os.set_inheritable(3, True)  # systemd's socket, for the program that takes this one's place
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606
