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
import errno
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
from aioserve._waiting import complete


class _FlushLook(FlushWatch):
    """Looks again and again whether all is sent."""

    def start(self) -> None:
        self._timer = self._loop.call_later(_limits.LOOK_AT_FLUSH, self._look)

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
        self._servers: dict[Listener, tuple[asyncio.Server, _LoopsSocket]] = {}
        self._gave_up: dict[Listener, float] = {}  # when the loop has done so, in its time

    async def start(self, context: contextvars.Context) -> None:
        self._listen(context)
        # In a task, which is how a coroutine gets another context, and is not cancelled in the middle.
        starting = self._loop.create_task(self._create_servers(), context=context)
        await complete(starting)

    async def _create_servers(self) -> None:
        for listener in self._listeners:
            with forks.lock:
                # The loop closes what it gets, and then we accept what is left in the queue.
                sock = _LoopsSocket(fileno=listener.socket.dup().detach())
                forks.track(sock)
            try:
                await self._create_server(listener, sock)
            except OSError as exc:
                raise listener.error(
                    exc, "on Windows, a socket stays with the first event loop that accepts on it"
                ) from exc

    async def _create_server(self, listener: Listener, sock: _LoopsSocket) -> None:
        """Let the loop accept on a socket; raise an `OSError` if it gives up at once."""
        gave_up = False

        def give_up() -> None:
            nonlocal gave_up
            gave_up = True

        sock.on_close = give_up
        try:
            server = await self._loop.create_server(lambda: _Arrival(self), sock=sock, backlog=self._backlog)
        except BaseException:
            sock.on_close = None
            sock.close()
            raise
        sock.on_close = partial(self._accept_later, listener, sock)
        self._servers[listener] = server, sock
        if gave_up:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    def _accept_later(self, listener: Listener, sock: _LoopsSocket) -> None:
        """Accept again: at once after an error, which can be a client's reset; a second later after another one."""
        if not self._serving or self._loop.is_closed():
            return
        now = self._loop.time()
        is_first = now - self._gave_up.get(listener, -_limits.ACCEPT_RETRY) >= _limits.ACCEPT_RETRY
        self._gave_up[listener] = now
        if not is_first:
            logger.error("cannot accept; trying again in %g second", _limits.ACCEPT_RETRY)
        self._retries[listener] = self._loop.call_later(
            0 if is_first else _limits.ACCEPT_RETRY, lambda: self._begin(self._accept_again(listener, sock))
        )

    async def _accept_again(self, listener: Listener, sock: _LoopsSocket) -> None:
        try:
            if self._serving:
                await self._create_server(listener, sock)
        except OSError:  # there is still no descriptor
            self._accept_later(listener, sock)
        else:
            if not self._serving:
                self._close_loops_sockets()

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
            await is_closed.wait()  # a stop reads what has arrived as long as this is pending
        finally:
            timer.cancel()
            self._close_servers()

    def _close_servers(self) -> None:
        self._close_loops_sockets()
        if self._listeners and not self.has_rest:
            self._accept_last()

    def _close_loops_sockets(self) -> None:
        servers, self._servers = self._servers, {}
        for server, sock in servers.values():
            sock.on_close = None
            if not self._loop.is_closed():
                server.close()

    def lose_rest(self) -> int:
        self._close_loops_sockets()
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
    """
    What a loop accepts on. asyncio's on Windows closes it at the first error, which can be a client's reset.

    It stays open then: Windows ties a socket to the first loop that accepts on it, which knows it by this object.
    """

    on_close: Callable[[], None] | None = None
    """Called in place of closing it."""

    def close(self) -> None:
        if self.on_close is not None:
            self.on_close()
        else:
            with forks.lock:
                super().close()


class _Arrival(Handshake):
    """The first protocol of a connection."""

    def __init__(self, acceptor: PortableAcceptor) -> None:
        super().__init__()
        self._acceptor = acceptor
        acceptor.accepted()

    def connection_made(self, transport: Any) -> None:  # not each loop's has asyncio's as its base class
        self._acceptor.arrived(transport, self)
