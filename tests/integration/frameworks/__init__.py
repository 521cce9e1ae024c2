"""
The same small app in each framework, written as its users write it.

What they have in common, where the framework has it:

    GET  /json        a bit of JSON
    POST /form        a form with a name and a file; says what has arrived
    POST /body        a body, read as it arrives; says what has arrived
    GET  /greeting    a greeting from the state of the lifespan
    GET  /hold        waits until the test lets it go; a coroutine
    GET  /sync        the same as a plain function, in a thread
    GET  /stream      sends FIRST, waits until the test lets it go, sends LAST
    GET  /events      an event, and a last one when the server stops
    GET  /endless     a stream without an end
    GET  /background  answers, and then works in the background until the test lets it go
    WS   /echo        echoes
"""

from __future__ import annotations

import asyncio
import hashlib
import threading

FIRST = bytes(range(256)) * 4096
LAST = b"the end"

# Nothing waits so long; it is for threads, which cannot be cancelled.
TIMEOUT = 30.0


Received = dict[str, int | str]


def received(data: bytes) -> Received:
    """Summarise what has arrived."""
    return {"size": len(data), "digest": hashlib.sha256(data).hexdigest()}


class Play:
    """What a test and its app share: what has happened, and when to go on."""

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
        """Let all handlers go that wait, now or later."""
        self._released.set()
        self._threads_released.set()

    async def hold(self) -> None:
        self.holding.set()
        await self._released.wait()

    def hold_thread(self) -> None:
        self._loop.call_soon_threadsafe(self.holding.set)
        assert self._threads_released.wait(TIMEOUT), "the test has never let it go"

    def is_over(self, moment: float) -> bool:
        """Wait in a thread for a short time; return whether the test has let the handlers go."""
        return self._threads_released.wait(moment)


async def end_sse_starlettes_watcher() -> None:
    """End the task of sse-starlette that checks twice a second whether uvicorn stops, as long as the loop lives."""
    watchers = {task for task in asyncio.all_tasks() if "_shutdown_watcher" in repr(task.get_coro())}
    for task in watchers:
        task.cancel()
    if watchers:
        await asyncio.wait(watchers)
