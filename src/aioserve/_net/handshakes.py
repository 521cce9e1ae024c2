"""
The TLS handshake of a server's connection, in two steps: first the raw transport, and then TLS on top of it.

A loop would do both in one, and then nobody knows the transport below TLS.
"""

from __future__ import annotations

import asyncio
import ssl
import types
from collections.abc import Callable, Coroutine, Generator
from typing import Any, TypeVar

from aioserve import _limits

T = TypeVar("T")


class Handshake(asyncio.Protocol):
    """
    The protocol of a TLS connection until its handshake is complete.

    It keeps what arrives on the raw transport before TLS is there to read it (uvloop does not stop reading at once);
    and then what arrives over TLS together with the end of the handshake.
    """

    def __init__(self) -> None:
        self._received = bytearray()
        self.is_lost: bool = False

    def data_received(self, data: bytes) -> None:
        self._received += data

    async def start_tls(self, raw: Any, context: ssl.SSLContext, timeout: float | None) -> asyncio.Transport:
        """
        Do the handshake on a raw transport, whose protocol this is; return the TLS transport.

        It may take `timeout` seconds, and no longer than the loop's own limit, a minute.
        """
        loop = asyncio.get_running_loop()
        raw.pause_reading()
        seconds = None if timeout is None or timeout >= _limits.LOOPS_HANDSHAKE else timeout
        starting = loop.start_tls(raw, self, context, server_side=True, ssl_handshake_timeout=seconds)
        transport = await after_first_step(starting, lambda: loop.call_soon(self._pass_on, raw))
        assert transport is not None
        return transport

    def _pass_on(self, raw: Any) -> None:
        """Give what has arrived on the raw transport to TLS, as a transport does: by its buffer."""
        received, self._received = self._received, bytearray()
        protocol = raw.get_protocol()  # None where the client is gone
        while protocol is not None and received:
            buffer = protocol.get_buffer(len(received))
            size = min(len(buffer), len(received))
            buffer[:size] = received[:size]
            protocol.buffer_updated(size)
            del received[:size]

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_lost = True

    def complete(self, transport: asyncio.Transport, protocol: asyncio.Protocol) -> None:
        """Hand the connection to its real protocol, which may put another one in its place."""
        transport.set_protocol(protocol)
        protocol.connection_made(transport)
        if self._received:
            protocol = transport.get_protocol()  # type: ignore[assignment]
            protocol.data_received(bytes(self._received))


@types.coroutine
def after_first_step(coroutine: Coroutine[Any, Any, T], act: Callable[[], object]) -> Generator[Any, Any, T]:
    """Await a coroutine, and act right after its first step, before the loop turns."""
    try:
        awaited = coroutine.send(None)
        act()
        while True:
            try:
                result = yield awaited
            except BaseException as exc:  # noqa: BLE001 (it is for the coroutine)
                awaited = coroutine.throw(exc)
            else:
                awaited = coroutine.send(result)
    except StopIteration as stop:
        value: T = stop.value
        return value
