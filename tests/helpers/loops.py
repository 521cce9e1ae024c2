"""
Event loops for the command line.
"""

from __future__ import annotations

import asyncio
from typing import Any


def make() -> asyncio.AbstractEventLoop:
    print("made a loop")
    return asyncio.SelectorEventLoop()


class WithoutAccepting(asyncio.SelectorEventLoop):
    """A loop that has the method, and raises in it, as rloop's does."""

    async def connect_accepted_socket(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError


class WithoutServers(WithoutAccepting):
    """A loop that cannot serve at all."""

    async def create_server(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError


without_accepting, without_servers = WithoutAccepting, WithoutServers
