"""What runs a server, here or in a child process, as those who hold the server see it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from aioserve._log import logger
from aioserve._net import forks
from aioserve._net.listeners import Listener
from aioserve._report import Report


class ServerTask:
    """The base of a server's task in this loop, and of a child process."""

    started: bool = False
    error: BaseException | None = None
    """What went wrong: an `OSError` or a `ServingError`."""
    report: Report | None = None
    _is_abandoned: bool = False
    on_crash: Callable[[], bool] | None = None
    """Called when the server dies while it is serving; returns whether somebody will raise the error."""

    def __init__(self, listeners: Sequence[Listener], *, has_tls: bool) -> None:
        self._loop = asyncio.get_running_loop()
        self._forks = forks.count
        self.listeners = listeners
        scheme = "https" if has_tls else "http"
        self.urls: list[str] = [listener.url(scheme) for listener in listeners]
        self.ready: asyncio.Future[None] = self._loop.create_future()
        """Done when the server has started, or has failed to."""
        self.closed: asyncio.Event = asyncio.Event()

    def close(self, deadline: float | None = None, *, begin: bool = False) -> None:
        """
        Ask for a graceful stop, from anywhere; a deadline, in the loop's time, can only shorten it.

        With `begin`, the caller is a task of the server's loop that is about to wait for the end.
        """
        raise NotImplementedError

    def has_lost_its_loop(self, exc: BaseException | None) -> bool:
        """Whether nobody can await the end: its loop does not run, and no other one that could be told so does."""
        if self._loop.is_running():
            return False
        # A block whose loop was closed can be closed as garbage, in any loop; there is nobody to tell.
        return self._loop.is_closed() or isinstance(exc, GeneratorExit) or asyncio._get_running_loop() is None

    def abandon(self) -> None:
        """Close what can be closed where the loop does not run any more."""
        if self.closed.is_set() or self._is_abandoned or self._forks != forks.count:
            return  # a fork of its process has no part in it
        self._is_abandoned = True
        logger.warning(
            "%s: its event loop has ended before the server: %s; leave the block, or await aclose(), while it runs",
            self.urls[0],
            self._abandon(),
        )

    def _abandon(self) -> str:
        """Do so, and return what it means."""
        raise NotImplementedError

    def owns(self, task: asyncio.Task[Any] | None) -> bool:
        """Whether the task belongs to the server: the lifespan's, or that of a request or a WebSocket."""
        return False

    def _set_ready(self) -> None:
        if not self.ready.done():
            self.ready.set_result(None)
