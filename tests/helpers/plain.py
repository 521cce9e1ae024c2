"""
uvicorn's own server in a running loop, as other programs run it: a task that ends when a flag is set.
"""

from __future__ import annotations

import asyncio
import socket
from types import TracebackType
from typing import Any, Self

import uvicorn


class Plain:
    """A `uvicorn.Server` for the length of a block."""

    def __init__(self, app: Any, **options: Any) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=2048)
        self.host, self.port = self._socket.getsockname()
        self._server = uvicorn.Server(uvicorn.Config(app, log_config=None, **options))

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._server.serve([self._socket]))
        while not self._server.started:
            assert not self._task.done()
            await asyncio.sleep(0)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._server.should_exit = True
        await self._task
        self._socket.close()
