"""
Blocking clients, each in a thread of its own.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


def in_thread(function: Callable[[], T]) -> Awaitable[T]:
    """Run a function in a new thread; return what awaits its result and the thread's end."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[T] = loop.create_future()

    def run() -> None:
        try:
            value = function()
        except Exception as exc:  # noqa: BLE001 (it is raised where the result is awaited)
            loop.call_soon_threadsafe(result.set_exception, exc)
        else:
            loop.call_soon_threadsafe(result.set_result, value)

    thread = threading.Thread(target=run)
    thread.start()

    async def finish() -> T:
        try:
            return await result
        finally:
            thread.join()

    return finish()
