"""
A program with an interface of Gradio: `python -m tests.integration.frameworks.with_gradio MODE`.

    browser   serves until SIGTERM comes, while somebody looks at the page
    client    stops while a call of Gradio's own client is in flight
    forced    the same; the client's heartbeat outlasts the timeout
    forgotten the same as "client", but nobody calls `Blocks.close()`

It prints what happens. It is a program of its own because Gradio changes the environment and starts threads.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

# Nothing may reach another machine.
os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_OFFLINE="1")

import gradio
from fastapi import FastAPI
from gradio_client import Client

from aioserve import Options, Server, serving

MODE = sys.argv[1]
OPTIONS: dict[str, Options] = {
    "browser": {"stop_on_signals": True, "shutdown_timeout": None},
    "client": {"disconnect_after": 0.5},
    "forced": {"shutdown_timeout": 0.5},
    "forgotten": {"disconnect_after": 0.5},
}

begun = asyncio.Event()
released = asyncio.Event()


async def greet(name: str, state: Any) -> tuple[str, Any]:
    begun.set()
    try:
        await released.wait()
    except asyncio.CancelledError:
        print("the function is cancelled")
        raise
    return f"hello {name}", state


with gradio.Blocks(analytics_enabled=False) as demo:
    name, answer, state = gradio.Textbox("Ada"), gradio.Textbox(), gradio.State()
    gradio.Button("Greet").click(greet, [name, state], [answer, state], api_name="greet")


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    yield
    print("the lifespan ends")
    if MODE != "forgotten":
        demo.close(verbose=False)


async def both_streams(server: Server) -> None:
    """Wait until the function runs, and the heartbeat and the results are being sent."""
    await begun.wait()
    while server.stats.in_flight != 2:
        await asyncio.sleep(0.01)


async def call(server: Server) -> None:
    client = await asyncio.to_thread(lambda: Client(f"{server.url}/ui", verbose=False, analytics_enabled=False))
    job = await asyncio.to_thread(lambda: client.submit("Ada", api_name="/greet"))
    await both_streams(server)
    server.close()
    released.set()
    await server.wait_closed()
    print(await asyncio.to_thread(job.result, 10))
    await asyncio.to_thread(client.close)


def names_of_tasks() -> set[str]:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    return {getattr(task.get_coro(), "__qualname__", "") for task in tasks}


async def main() -> None:
    app = gradio.mount_gradio_app(FastAPI(lifespan=lifespan), demo, path="/ui")
    async with serving(app, **OPTIONS[MODE]) as server:
        print(server.url)
        if MODE == "browser":
            await both_streams(server)
            print("both streams are open")
            await server.wait_closed()
        else:
            await call(server)
    assert server.report is not None
    print("forced:", server.report.was_forced)
    for _ in range(3):  # its tasks look each 0.05 s whether they are to end
        await asyncio.sleep(0.1)
    print("left:", *sorted(names_of_tasks() - {"sleep"}))  # it sleeps until the next heartbeat


asyncio.run(main())
