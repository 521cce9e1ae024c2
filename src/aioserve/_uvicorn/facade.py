"""A `uvicorn.Server` for code that knows one, such as middleware that sets `should_exit`."""

from __future__ import annotations

from typing import Any, NoReturn

import uvicorn


class UvicornServer(uvicorn.Server):
    """Shows a server of aioserve as a `uvicorn.Server`: it can be looked at and closed, but not run."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        super().__init__(engine.settings.config)
        self.server_state = engine.connections.state
        self.lifespan = engine.lifespan
        self.servers = [engine.connections.acceptor]

    @property
    def started(self) -> bool:
        return bool(self._engine.started)

    @started.setter
    def started(self, value: bool) -> None:
        pass  # uvicorn's constructor sets it

    @property
    def should_exit(self) -> bool:
        return bool(self._engine.is_stopping)

    @should_exit.setter
    def should_exit(self, value: bool) -> None:
        if value:
            self._engine.close()

    @property
    def force_exit(self) -> bool:
        return bool(self._engine.is_forced)

    @force_exit.setter
    def force_exit(self, value: bool) -> None:
        if value:
            self._engine.close(deadline=0)

    async def serve(self, sockets: object = None) -> NoReturn:
        raise RuntimeError("this server is run by aioserve, and only once")

    async def startup(self, sockets: object = None) -> NoReturn:
        raise RuntimeError("this server is started by aioserve, and only once")

    async def shutdown(self, sockets: object = None) -> None:
        self._engine.close()
