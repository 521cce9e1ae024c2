"""
Lets the loop accept the connections, on loops without `add_reader()`: asyncio's on Windows, and others with
`create_server()`.

It promises less than `acceptor.py`, since such a loop does not let us watch a socket. A read is always pending, so that
what has arrived on a connection is known a turn of the loop later. Clients that are still sending when their connection
closes may get a reset.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import socket
from collections.abc import Callable
from functools import partial
from typing import Any

from aioserve import _limits
from aioserve._log import logger
from aioserve._net import forks
from aioserve._net.acceptor import Acceptor
from aioserve._net.handshakes import Handshake
from aioserve._net.listeners import Listener
from aioserve._net.transports import FlushWatch, has_unsent, send_without_delay
from aioserve._waiting import outlast


class _FlushLook(FlushWatch):
    """Looks again and again whether all is sent."""

    def start(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(_limits.LOOK_AT_FLUSH, self._look)

    def _look(self) -> None:
        if has_unsent(self._transport, self._raw):
            self.start()
        else:
            self._hang_up(self._raw)

    def stop(self) -> None:
        self._timer.cancel()


class PortableAcceptor(Acceptor):
    """Lets the loop accept connections on listening sockets, and tracks those that are still being made."""

    is_portable = True
    _watch = _FlushLook

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._servers: dict[Listener, asyncio.Server] = {}

    async def start(self, context: contextvars.Context) -> None:
        self._listen(context)
        # In a task, which is how a coroutine gets another context, and is not cancelled in the middle.
        starting = self._loop.create_task(self._create_servers(), context=context)
        cancellation = await outlast(starting.done, lambda: asyncio.wait({starting}), lambda: None)
        starting.result()
        if cancellation is not None:
            raise cancellation

    async def _create_servers(self) -> None:
        for listener in self._listeners:
            await self._create_server(listener)

    async def _create_server(self, listener: Listener) -> None:
        with forks.lock:
            # The loop closes what it gets, and then we accept what is left in the queue.
            sock = _LoopsSocket(fileno=listener.socket.dup().detach())
            forks.track(sock)
        try:
            server = await self._loop.create_server(lambda: _Arrival(self), sock=sock, backlog=self._backlog)
        except BaseException:
            sock.close()
            raise
        if not self._serving:
            server.close()
        elif sock.fileno() < 0:
            self._accept_later(listener)
        else:
            sock.on_close = partial(self._accept_later, listener)
            self._servers[listener] = server

    def _accept_later(self, listener: Listener) -> None:
        if self._serving and not self._loop.is_closed():
            logger.error("cannot accept; trying again in %g second", _limits.ACCEPT_RETRY)
            self._retries[listener] = self._loop.call_later(
                _limits.ACCEPT_RETRY, lambda: self._begin(self._accept_again(listener))
            )

    async def _accept_again(self, listener: Listener) -> None:
        try:
            if self._serving:
                await self._create_server(listener)
        except OSError:  # there is still no descriptor
            self._accept_later(listener)

    def _stop_accepting(self) -> None:
        if self._loop.is_running():
            self._begin(self._stop_after_a_turn())
        else:
            self._close_servers()

    async def _stop_after_a_turn(self) -> None:
        is_closed = asyncio.Event()

        def close() -> None:
            self._close_servers()
            is_closed.set()

        # By a timer: asyncio makes what it has accepted in a turn before it calls the timers of that turn; and it fails
        # to make a connection whose server is closed.
        timer = self._loop.call_later(0, close)
        try:
            await is_closed.wait()  # meanwhile the server is not settled, and so what has arrived is read
        finally:
            timer.cancel()
            self._close_servers()

    def _close_servers(self) -> None:
        servers, self._servers = self._servers, {}
        for server in servers.values():
            server.close()
        if self._listeners and not self.has_rest:
            self._accept_last()

    def lose_rest(self) -> int:
        servers, self._servers = self._servers, {}
        if not self._loop.is_closed():
            for server in servers.values():
                server.close()
        return super().lose_rest()

    def accepted(self) -> None:
        """Note that the loop has accepted a connection."""
        self._accepted_in = os.getpid()

    def arrived(self, raw: asyncio.Transport, arrival: Handshake) -> None:
        """Give a connection that the loop has accepted to its protocol, or to TLS."""
        send_without_delay(raw.get_extra_info("socket"))
        if self._ssl is None:
            protocol: Any = self._make_protocol()
            raw.set_protocol(protocol)
            protocol.connection_made(raw)
        else:
            raw.pause_reading()
            self._begin(self._shake_hands(raw, arrival, self._ssl))


class _LoopsSocket(socket.socket):
    """What a loop accepts on. asyncio's on Windows closes it at the first error, which can be a client's reset."""

    on_close: Callable[[], None] | None = None

    def close(self) -> None:
        with forks.lock:
            super().close()
        on_close, self.on_close = self.on_close, None
        if on_close is not None:
            on_close()


class _Arrival(Handshake):
    """The first protocol of a connection."""

    def __init__(self, acceptor: PortableAcceptor) -> None:
        super().__init__()
        self._acceptor = acceptor
        acceptor.accepted()

    def connection_made(self, transport: Any) -> None:  # not each loop's has asyncio's as its base class
        self._acceptor.arrived(transport, self)
