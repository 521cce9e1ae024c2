"""
The same small app in each framework, written as its users write it.

What they have in common, where the framework has it:

    GET  /json        a bit of JSON
    POST /form        a form with a name and a file; says what has come
    POST /body        a body, read as it comes; says what has come
    GET  /greeting    what the lifespan has prepared
    GET  /hold        waits until the test lets it go; a coroutine
    GET  /sync        the same as a plain function, in a thread
    GET  /stream      says FIRST, waits until the test lets it go, says LAST
    GET  /events      goes on until the server is to stop, and says goodbye
    GET  /endless     goes on forever
    GET  /background  answers, and then works in the background until the test lets it go
    WS   /echo        echoes
"""

from __future__ import annotations

import asyncio
import hashlib
import threading

FIRST = bytes(range(256)) * 4096
LAST = b"the end"

# Nothing waits so long; it is for threads that nobody can cancel.
TIMEOUT = 30.0


Received = dict[str, int | str]


def received(data: bytes) -> Received:
    """What has come, in short."""
    return {"size": len(data), "digest": hashlib.sha256(data).hexdigest()}


class Play:
    """What a test and its app have between them: what has happened, and when to go on."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.holding = asyncio.Event()
        """Set when a handler has begun to wait."""
        self._loop = asyncio.get_running_loop()
        self._released = asyncio.Event()
        self._threads_released = threading.Event()

    def note(self, event: str) -> None:
        self.events.append(event)

    def release(self) -> None:
        """Let everybody go who waits, or will."""
        self._released.set()
        self._threads_released.set()

    async def hold(self) -> None:
        self.holding.set()
        await self._released.wait()

    def hold_thread(self) -> None:
        self._loop.call_soon_threadsafe(self.holding.set)
        assert self._threads_released.wait(TIMEOUT), "the test has never let it go"

    def is_over(self, moment: float) -> bool:
        """Whether the test has let everybody go; a thread that asks waits for a moment."""
        return self._threads_released.wait(moment)


async def end_sse_starlettes_watcher() -> None:
    """It looks for uvicorn's end twice a second, in a task that lives as long as the loop."""
    watchers = {task for task in asyncio.all_tasks() if "_shutdown_watcher" in repr(task.get_coro())}
    for task in watchers:
        task.cancel()
    if watchers:
        await asyncio.wait(watchers)
