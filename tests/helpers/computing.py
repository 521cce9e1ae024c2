"""
A program whose handlers compute while its server stops: python -m tests.helpers.computing LOOP HTTP

LOOP is "asyncio" or "uvloop", with a runner, or "plain": asyncio's without one.
"""

from __future__ import annotations

import asyncio
import sys
import time
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import uvloop

from aioserve import serving
from tests.helpers.clients import connect

HANDLERS = 3


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        return
    waiting.append(None)
    await scope["state"]["aioserve"].stopping.wait()
    print("computing", flush=True)
    while True:
        began = time.monotonic()
        while time.monotonic() < began + 0.05:
            pass
        await asyncio.sleep(0)


waiting: list[None] = []


async def main(http: Any) -> None:
    async with serving(app, http=http, shutdown_timeout=None) as server, AsyncExitStack() as stack:
        for _ in range(HANDLERS):
            (await stack.enter_async_context(connect(server))).ask("/")
        while len(waiting) < HANDLERS:
            await asyncio.sleep(0)
        asyncio.get_running_loop().call_soon(partial(print, "serving", flush=True))  # no interrupt comes in this task
        await asyncio.Event().wait()


def run_plainly(http: str) -> None:
    loop = asyncio.new_event_loop()
    task = loop.create_task(main(http))
    try:
        loop.run_until_complete(task)
    except KeyboardInterrupt:
        task.cancel()
        loop.run_until_complete(task)


if __name__ == "__main__":
    _, loop_name, chosen = sys.argv
    try:
        if loop_name == "plain":
            run_plainly(chosen)
        elif loop_name == "uvloop":
            uvloop.run(main(chosen))
        else:
            asyncio.run(main(chosen))
    except KeyboardInterrupt:
        print("interrupted", flush=True)
