"""
Accepts connections, and makes them.

asyncio's own servers know nothing of a connection that they have accepted and not yet made: one whose TLS handshake is
under way outlives them by up to a minute, a plain one of the last turn leaks its socket, and what waits in the kernel's
queue is reset. So this is done here. (A connection costs as much as with asyncio's, and a tenth more than with
uvloop's.)
"""

from __future__ import annotations

import asyncio
import errno
import logging
import select
import socket
import ssl
import types
from collections.abc import Callable, Coroutine, Generator, Sequence
from typing import Any, TypeVar

from aioserve._sockets import Listener
from aioserve._waiting import begin

logger = logging.getLogger("aioserve")

T = TypeVar("T")

# What accept() can say of one connection, which has gone before we came (accept(2), on Linux).
_GONE = (errno.ECONNABORTED, errno.EPROTO, errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH)

# How long to leave it alone when it says something else, as when descriptors have run out: seconds.
_ACCEPT_AGAIN_AFTER = 1.0


class Acceptor:
    """
    Accepts connections on listening sockets, and knows those that it is still making.

    To code that knows uvicorn, it stands where `uvicorn.Server.servers` has an `asyncio.Server`.
    """

    def __init__(
        self,
        listeners: Sequence[Listener],
        make_protocol: Callable[[], asyncio.Protocol],
        *,
        ssl: ssl.SSLContext | None,
        backlog: int,
        changed: Callable[[], None],
    ) -> None:
        self.sockets: tuple[socket.socket, ...] = tuple(listener.socket for listener in listeners)
        self.making: set[asyncio.Task[object]] = set()
        """The connections that are accepted and not yet made: with TLS, those in their handshake."""

        self._listeners = listeners
        self._below: dict[asyncio.BaseTransport, asyncio.Transport] = {}
        self._loop = asyncio.get_running_loop()
        self._make_protocol = make_protocol
        self._ssl = ssl
        self._backlog = backlog
        self._changed = changed
        self._serving = False
        self._retries: dict[socket.socket, asyncio.TimerHandle] = {}

    def is_serving(self) -> bool:
        return self._serving and not self._loop.is_closed()

    def start(self) -> None:
        self._serving = True
        for sock in self.sockets:
            # By its number: of a socket that it does not know, a selector makes up a description that nobody reads.
            self._loop.add_reader(sock.fileno(), self._accept, sock)

    def close(self) -> None:
        """
        Accept what waits in the kernel's queue, and then nothing more.

        The queue of a socket that is lent belongs to whoever takes it next.
        """
        if self._serving and not self._loop.is_closed():
            self._serving = False
            for listener in self._listeners:
                self._loop.remove_reader(listener.socket.fileno())
                listener.withdraw()
                if not listener.lent and _is_readable(listener.socket):
                    self._accept(listener.socket)
            for retry in self._retries.values():
                retry.cancel()
        for listener in self._listeners:
            listener.close()
        self._listeners = ()

    async def wait_closed(self) -> None:
        """Return at once: nothing of ours takes time to close."""

    def give_up(self) -> None:
        """Drop the connections that are still being made."""
        for task in self.making:
            task.cancel()

    def _accept(self, sock: socket.socket) -> None:
        for _ in range(self._backlog + 1):  # Linux queues one more
            try:
                connection, _address = sock.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as exc:
                if exc.errno in _GONE:
                    continue
                if self._serving:
                    self._pause(sock, exc)
                else:
                    logger.error("cannot accept: %s; what waits in the queue is lost", exc.strerror)
                return
            connection.setblocking(False)
            if connection.proto != socket.IPPROTO_TCP and connection.family in (socket.AF_INET, socket.AF_INET6):
                # A socket that was made with 0 for its protocol, as most are that are lent: asyncio takes no notice of
                # it, and answers on kept-alive connections would take 40 ms.
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            task: asyncio.Task[object] = begin(
                self._loop.connect_accepted_socket(self._make_protocol, connection)
                if self._ssl is None
                else self._secure(connection, self._ssl)
            )
            if not task.done():
                self.making.add(task)
            task.add_done_callback(self._made)

    async def _secure(self, connection: socket.socket, context: ssl.SSLContext) -> None:
        """Make a connection in two steps, which asyncio would do in one, so as to know the transport below TLS."""
        below, gate = await self._loop.connect_accepted_socket(_Gate, connection)
        try:
            below.pause_reading()
            starting = self._loop.start_tls(below, gate, context, server_side=True)
            transport = await _begin(starting, then=lambda: self._loop.call_soon(gate.hand_over, below))
        except BaseException:
            below.abort()
            raise
        assert transport is not None
        if gate.lost:
            return  # its client has gone already
        self._below[transport] = below
        gate.open(transport, self._make_protocol())

    def below(self, transport: Any) -> Any:
        """The transport below a TLS transport; it knows what is not yet sent, and can always be aborted."""
        return self._below.get(transport, transport)

    def forget(self, transport: asyncio.BaseTransport) -> None:
        """Note that a connection has gone."""
        self._below.pop(transport, None)

    def _made(self, task: asyncio.Task[object]) -> None:
        self.making.discard(task)
        if not task.cancelled() and (exc := task.exception()) is not None:
            # A handshake that failed is the client's affair; anything else is ours.
            level = logging.DEBUG if isinstance(exc, OSError) else logging.ERROR
            logger.log(level, "a connection could not be made: %r", exc, exc_info=exc)
        if not self._serving:
            self._changed()

    def _pause(self, sock: socket.socket, exc: OSError) -> None:
        logger.error("cannot accept: %s; trying again in %g second", exc.strerror, _ACCEPT_AGAIN_AFTER)
        self._loop.remove_reader(sock.fileno())
        self._retries[sock] = self._loop.call_later(_ACCEPT_AGAIN_AFTER, self._resume, sock)

    def _resume(self, sock: socket.socket) -> None:
        self._loop.add_reader(sock.fileno(), self._accept, sock)


def _is_readable(sock: socket.socket) -> bool:
    """Whether something waits in its queue; a third of what it takes to be told by accept() that nothing does."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


class _Gate(asyncio.Protocol):
    """
    Stands before the real protocol of a TLS connection until there is a transport for it.

    Below TLS, it keeps what comes before TLS is there to read it (uvloop cannot be kept from reading); above, what
    comes with the end of the handshake.
    """

    def __init__(self) -> None:
        self._received = bytearray()
        self.lost = False

    def data_received(self, data: bytes) -> None:
        self._received += data

    def hand_over(self, below: Any) -> None:
        """Give what has come below to the protocol that is there now, as a transport does: by its buffer."""
        received, self._received = self._received, bytearray()
        protocol = below.get_protocol()  # none, where its client has gone
        while protocol is not None and received:
            buffer = protocol.get_buffer(len(received))
            size = min(len(buffer), len(received))
            buffer[:size] = received[:size]
            protocol.buffer_updated(size)
            del received[:size]

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True

    def open(self, transport: asyncio.Transport, protocol: asyncio.Protocol) -> None:
        transport.set_protocol(protocol)
        protocol.connection_made(transport)
        if self._received:
            protocol.data_received(bytes(self._received))


@types.coroutine
def _begin(coroutine: Coroutine[Any, Any, T], *, then: Callable[[], object]) -> Generator[Any, Any, T]:
    """Await a coroutine, and do something right after its first step, before the loop turns."""
    try:
        awaited = coroutine.send(None)
        then()
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
