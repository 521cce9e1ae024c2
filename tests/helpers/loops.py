"""
Event loops that are asyncio's own, but for something that they lack: they have the method, and raise in it.
"""

from __future__ import annotations

import asyncio
import functools
from typing import Any


def make() -> asyncio.AbstractEventLoop:
    print("made a loop")
    return asyncio.SelectorEventLoop()


class WithoutReaders(asyncio.SelectorEventLoop):
    def add_reader(self, *_: Any) -> Any:  # type: ignore[override]  # it takes anything, and raises
        raise NotImplementedError


class WithoutAccepting(WithoutReaders):
    async def create_server(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError


class WithoutTLS(asyncio.SelectorEventLoop):
    async def start_tls(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError


class WithoutReadersAndTLS(WithoutTLS, WithoutReaders):
    pass


class WithFixedProtocols(asyncio.SelectorEventLoop):
    """Its transports keep the protocol that they were made with, as rloop's do."""

    def _make_socket_transport(self, *args: Any, **kwargs: Any) -> Any:
        made: Any = super()._make_socket_transport(*args, **kwargs)  # type: ignore[misc]  # typeshed leaves it out
        made.__class__ = _fixed(made.__class__)
        return made


@functools.cache
def _fixed(kind: type[asyncio.BaseTransport]) -> Any:
    def set_protocol(self: Any, protocol: asyncio.BaseProtocol) -> None:
        raise NotImplementedError

    return type("FixedTransport", (kind,), {"set_protocol": set_protocol})


without_accepting = WithoutAccepting
