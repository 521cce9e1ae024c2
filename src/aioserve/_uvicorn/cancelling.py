"""Cancels the handler of a request whose client has gone, where the server is asked to (`cancel_on_disconnect`)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from aioserve import _limits
from aioserve._report import awaited_thread
from aioserve._uvicorn.logs import silence_expected_errors
from aioserve._uvicorn.protocols import handled_by, is_http, unanswered_cycles


class CancellableTasks(set[asyncio.Task[Any]]):
    """The tasks of the handlers, in uvicorn's state, each of which is found by its cycle."""

    def __init__(self) -> None:
        super().__init__()
        self._tasks: dict[Any, asyncio.Task[Any]] = {}
        self._cycles: dict[asyncio.Task[Any], Any] = {}
        self._cancelled: dict[asyncio.Task[Any], float] = {}  # and when

    def add(self, task: asyncio.Task[Any]) -> None:
        super().add(task)
        cycle = handled_by(task)
        if cycle is not None and not task.done():
            self._tasks[cycle], self._cycles[task] = task, cycle

    def discard(self, task: Any) -> None:
        super().discard(task)
        self._tasks.pop(self._cycles.pop(task, None), None)
        self._cancelled.pop(task, None)

    def watch_streams(self, connection: Any) -> None:
        """Cancel also the handlers of HTTP/2 streams that a client resets."""
        if hasattr(connection, "cycles"):
            connection.cycles = _Streams(self._cancel)

    def cancel_handlers_of(self, connection: Any) -> None:
        """Cancel the handlers of a connection that is lost, and not the one that is answered before an upgrade."""
        if is_http(connection) and connection.transport.is_closing():
            for cycle in unanswered_cycles(connection):
                cycle.disconnected = True  # uvicorn sets it for the last one, and an error is sent for the others
                self._cancel(cycle)

    def is_cleaning_up(self, task: asyncio.Task[Any]) -> bool:
        """Whether it was cancelled here just now, so that another cancellation would disturb its clean-up."""
        since = self._cancelled.get(task)
        return since is not None and task.get_loop().time() - since < _limits.CANCELLED_HANDLERS

    def _cancel(self, cycle: Any) -> None:
        task = self._tasks.get(cycle)
        # A stop may have cancelled it, and it is not to be disturbed in its clean-up.
        if task is None or task.cancelling():
            return
        thread = awaited_thread(task)
        if thread is not None and not thread.done():
            # Cancelled, it would leave the thread behind: uncounted by anyio's limit, and alive after a stop.
            thread.add_done_callback(lambda _: self._cancel(cycle))
            return
        silence_expected_errors(cycle)
        self._cancelled[task] = task.get_loop().time()
        task.cancel()


class _Streams(dict[int, Any]):
    """The cycles of an HTTP/2 connection, by their streams."""

    def __init__(self, cancel: Callable[[Any], None]) -> None:
        super().__init__()
        self._cancel = cancel

    def pop(self, stream_id: int, default: Any = None) -> Any:
        cycle = super().pop(stream_id, default)
        if cycle is not None and not cycle.response_complete and not cycle.disconnected:
            self._cancel(cycle)  # not in the handler's own task: then its response is complete, or was broken off
        return cycle
