"""
Accepts connections on listening sockets, on loops with `add_reader()`; `portable.py` does so on others.

asyncio's own servers do not track a connection between accept() and its protocol; docs/explanation/decisions.md says
what that would cost.
"""

from __future__ import annotations

import asyncio
import contextvars
import errno
import os
import select
import socket
import ssl
import struct
import sys
import time
from array import array
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from aioserve import _limits
from aioserve._errors import describe_error
from aioserve._log import logger
from aioserve._net import forks
from aioserve._net.listeners import Listener
from aioserve._net.transports import FlushWatch, has_unsent, idle_time, queue_length, send_without_delay
from aioserve._waiting import start_task

if TYPE_CHECKING:
    from aioserve._net.handshakes import Handshake

# What accept() says of one connection that is gone already (accept(2), on Linux).
_GONE = (errno.ECONNABORTED, errno.EPROTO, errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH)


class Acceptor:
    """
    Accepts connections on listening sockets, and tracks those that it is still making.

    In `uvicorn.Server.servers` it takes the place of an `asyncio.Server`.
    """

    is_portable: bool = False
    """Whether the loop can watch no sockets of ours; then nobody knows what has arrived and is not read yet."""
    has_rest: bool = False
    """Whether connections wait in the queues of sockets that are about to close."""
    _watch: type[FlushWatch] = FlushWatch
    _handshakes_until: float = 0.0  # when those are complete that had begun when no new ones could

    def __init__(
        self,
        listeners: Sequence[Listener],
        make_protocol: Callable[[], asyncio.Protocol],
        *,
        ssl: ssl.SSLContext | None,
        handshake_timeout: float | None,
        backlog: int,
        on_change: Callable[[], None],
    ) -> None:
        self.sockets: tuple[socket.socket, ...] = tuple(listener.socket for listener in listeners)
        self.pending: set[asyncio.Task[object]] = set()
        """The connections that are accepted and not made yet: with TLS, those in their handshake."""
        self._listeners = list(listeners)
        self._reserve = _Reserve()
        self._raw_transports: dict[asyncio.BaseTransport, asyncio.Transport] = {}
        self._flush_watches: dict[asyncio.BaseTransport, FlushWatch] = {}
        self._loop, self._make_protocol, self._serving = asyncio.get_running_loop(), make_protocol, False
        self._ssl, self._handshake_timeout = ssl, handshake_timeout
        self._backlog, self._on_change = backlog, on_change
        self._accepted_in: int | None = None  # the process that has accepted a connection, if any has come
        self._handshakes: dict[asyncio.Task[Any], asyncio.Transport] = {}
        self._retries: dict[Listener, asyncio.TimerHandle] = {}

    def is_serving(self) -> bool:
        return self._serving and not self._loop.is_closed()

    async def start(self, context: contextvars.Context) -> None:
        """Listen, and accept; connections get a copy of the context. An `OSError` says where it cannot listen."""
        self._listen(context)
        for listener in self._listeners:
            context.run(self._add_reader, listener)

    def _listen(self, context: contextvars.Context) -> None:
        for listener in self._listeners:
            listener.listen(self._backlog)
        self._serving = True
        self._context = context

    def _add_reader(self, listener: Listener) -> None:
        # By its number: for a socket that it does not know, a selector builds an error message that nobody reads.
        self._loop.add_reader(listener.socket.fileno(), self._accept, listener)

    def refuse_new(self, *, has_clients: bool) -> bool:
        """Let no connection begin, as far as the system can; return whether `close()` can come a turn later."""
        if self._accepted_in != os.getpid():
            return False  # nothing has come, or this is a fork of the process that has accepted something
        tcp = [each.socket for each in self._listeners if not each.lent and each.path is None]
        is_shared = _end_new_connections(tcp)
        if has_clients or is_shared:  # elsewhere, hardly anybody connects
            self._handshakes_until = time.monotonic() + _limits.LAST_HANDSHAKES
        return has_clients and not (is_shared or any(listener.lent for listener in self._listeners))

    def close(self) -> None:
        """
        Accept what waits in the kernel's queue (that of a lent socket is left to its next user), and then nothing more.

        Where no descriptor is left, `has_rest` is true, and `accept_rest()` tries again.
        """
        was_serving, self._serving = self._serving, False
        if was_serving and not self._loop.is_closed():
            self._stop_accepting()
        else:
            self.lose_rest()

    def _stop_accepting(self) -> None:
        for listener in self._listeners:
            self._loop.remove_reader(listener.socket.fileno())
        self._accept_last()

    def _accept_last(self) -> None:
        for listener in self._listeners:
            listener.remove_file()
        if self._handshakes_until and (left := self._handshakes_until - time.monotonic()) > 0:
            time.sleep(left)  # no event tells of a handshake that the kernel has not completed
        for retry in self._retries.values():
            retry.cancel()
        self.has_rest = True
        self.accept_rest()
        if self.has_rest:
            logger.error("no descriptor is left for connections that wait; they are accepted as others close")

    def accept_rest(self) -> None:
        """Accept what waits in the queues of our own sockets, and close each one whose queue is empty."""
        before, is_used = len(self._listeners) + 1, self._accepted_in == os.getpid()
        while self.has_rest and len(self._listeners) < before:  # one that was closed has left its descriptor
            before = len(self._listeners)
            for listener in list(self._listeners):
                can_accept = not listener.lent and _is_readable(listener.socket) and self._loop.is_running()
                if can_accept and not self._context.run(self._accept, listener):
                    continue
                if is_used and not listener.lent:
                    _refuse_connections(listener.socket)
                listener.close()
                self._listeners.remove(listener)
            self.has_rest = bool(self._listeners)
            if not self.has_rest:
                self._reserve.release()

    def lose_rest(self) -> int:
        """Close all sockets, and return how many connections in their queues are lost for want of a descriptor."""
        lost = 0
        if self.has_rest:  # at least one in each, if it is not known
            lost = sum(queue_length(each.socket) or _is_readable(each.socket) for each in self._listeners)
        self.has_rest = False
        while self._listeners:
            self._listeners.pop().close()
        self._reserve.release()
        return lost

    async def wait_closed(self) -> None: ...  # `close()` leaves nothing to wait for

    def drop_silent(self, seconds: float) -> float:
        """
        Drop TLS handshakes that have not moved for so long, and return when to look at the others again.

        Where the kernel does not tell, none has moved.
        """
        left = seconds
        for task, raw in list(self._handshakes.items()):
            idle = idle_time(raw, unknown=seconds)
            if idle >= seconds:
                task.cancel()
            left = min(left, max(seconds - idle, _limits.SHORTEST_LOOK))
        return left

    def raw_transport(self, transport: Any) -> Any:
        """Return the transport below a TLS transport, or the transport itself where there is none."""
        return self._raw_transports.get(transport, transport)

    def when_flushed(self, transport: Any, hang_up: Callable[[Any], object]) -> None:
        """Hang up a closing TLS connection once our data is sent: by a function that gets the raw transport."""
        raw = self.raw_transport(transport)
        if raw is transport or transport in self._flush_watches:
            return
        if not has_unsent(transport, raw):
            hang_up(raw)
            return
        watch = self._watch(self._loop, transport, raw, hang_up)
        try:
            watch.start()
        except OSError as exc:
            # No descriptor is left. So the client decides how long it takes, or the budget.
            logger.debug("cannot watch a closing TLS connection: %s", exc)
        else:
            self._flush_watches[transport] = watch

    def forget(self, transport: asyncio.BaseTransport) -> None:
        """Forget a connection that is gone."""
        self._raw_transports.pop(transport, None)
        if (watch := self._flush_watches.pop(transport, None)) is not None:
            watch.stop()

    def _accept(self, listener: Listener) -> bool:
        """Accept what waits in a queue; return `False` if no descriptor is left for it."""
        if listener.lent:
            listener.socket.setblocking(False)  # its twin shares that, and somebody may have set it
        for _ in range(self._backlog + 1):  # Linux queues one more
            try:
                connection = forks.accept(listener.socket)
            except (BlockingIOError, InterruptedError):
                return True
            except OSError as exc:
                if exc.errno in _GONE:
                    continue
                if exc.errno == errno.ENOTSOCK:
                    return True  # this is a fork, which has let go of it and runs the loop that it has a copy of
                if self._serving:
                    self._pause(listener, exc)
                elif self._reserve.release():
                    continue
                return False
            if self._accepted_in is None:
                self._accepted_in = os.getpid()
                self._reserve.take()
            connection.setblocking(False)
            if connection.proto != socket.IPPROTO_TCP:
                send_without_delay(connection)
            making: Coroutine[Any, Any, object]
            if self._ssl is None:
                making = self._loop.connect_accepted_socket(self._make_protocol, connection)
            else:
                making = self._connect_tls(connection, self._ssl)
            try:
                self._begin(making)
            except BaseException:  # raised by a task factory
                connection.close()
                raise
        return True

    def _begin(self, making: Coroutine[Any, Any, object]) -> None:
        """Begin to make a connection, in a task that is tracked."""
        try:
            task = start_task(making)
        except BaseException:
            making.close()
            raise
        if not task.done():
            self.pending.add(task)
        task.add_done_callback(self._made)

    async def _connect_tls(self, connection: socket.socket, context: ssl.SSLContext) -> None:
        from aioserve._net.handshakes import Handshake  # only where it is needed

        raw, handshake = await self._loop.connect_accepted_socket(Handshake, connection)
        await self._shake_hands(raw, handshake, context)

    async def _shake_hands(self, raw: asyncio.Transport, handshake: Handshake, context: ssl.SSLContext) -> None:
        self._handshakes[asyncio.current_task(self._loop)] = raw  # type: ignore[index]
        try:
            transport = await handshake.start_tls(raw, context, self._handshake_timeout)
        except BaseException:
            if self._loop.is_closed():
                return  # this is garbage, and asyncio has tried to call the loop
            raw.abort()
            raise
        if not handshake.is_lost:
            self._raw_transports[transport] = raw
            handshake.complete(transport, self._make_protocol())

    def _made(self, task: asyncio.Task[object]) -> None:
        self.pending.discard(task)
        self._handshakes.pop(task, None)
        if not task.cancelled() and (exc := task.exception()) is not None:
            # A failed handshake is the client's error; anything else is an error here.
            log = logger.debug if isinstance(exc, OSError) else logger.error
            log("a connection could not be made: %s", describe_error(exc), exc_info=exc)
        if not self._serving:
            self._on_change()

    def _pause(self, listener: Listener, exc: OSError) -> None:
        logger.error("cannot accept: %s; trying again in %g second", exc.strerror, _limits.ACCEPT_RETRY)
        self._loop.remove_reader(listener.socket.fileno())
        self._retries[listener] = self._loop.call_later(_limits.ACCEPT_RETRY, self._add_reader, listener)


acceptors: dict[tuple[type[asyncio.AbstractEventLoop], bool], type[Acceptor]] = {
    (asyncio.SelectorEventLoop, False): Acceptor,
    (asyncio.SelectorEventLoop, True): Acceptor,
}
"""What accepts connections on loops of a class, without TLS and with it; `loops.py` tries others."""


class _Reserve:
    """A descriptor that is kept so that one connection at a time can be accepted when no other is left."""

    _descriptor: int | None = None

    def take(self) -> None:
        with suppress(OSError):
            self._descriptor = os.open(os.devnull, os.O_RDONLY)

    def release(self) -> bool:
        """Close it, and return whether it was there."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)
        return descriptor is not None


_NO_INTERFACE = 2**31 - 1
_SO_BINDTOIFINDEX = 62  # asm-generic/socket.h, Linux 5.1; not in Python's module
_SO_ATTACH_FILTER = 26
# A classic BPF program: load byte 13 of the TCP header, and accept the packet unless the SYN bit (2) is set in it.
_NO_SYN = array("B", struct.pack("HBBI" * 4, 0x30, 0, 0, 13, 0x45, 0, 1, 2, 0x06, 0, 0, 0, 0x06, 0, 0, 0xFFFFFFFF))
_NO_SYN_FILTER = struct.pack("HP", 4, _NO_SYN.buffer_info()[0])  # the number of instructions, and where they are


def _end_new_connections(listening: Iterable[socket.socket]) -> bool:
    """
    Let no new connection begin, so that none comes between the last look at the queue and the close, which resets it.

    On Linux, and for TCP: a socket that is bound to no interface that exists is not found by new clients, which are
    refused, or reach another socket on the port. Only among sockets that share their port (SO_REUSEPORT), the kernel
    may choose it nevertheless: then a filter drops a client's SYN, which comes again a second later. Return whether so.

    On another processor, a handshake may be under way, for some microseconds of which the kernel does not tell.
    """
    shares_port = False
    if sys.platform == "linux":
        for sock in listening:
            is_shared = sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT) != 0
            shares_port = shares_port or is_shared
            if is_shared or not _set(sock, _SO_BINDTOIFINDEX, _NO_INTERFACE):
                _set(sock, _SO_ATTACH_FILTER, _NO_SYN_FILTER)
    return shares_port


def _set(sock: socket.socket, option: int, value: Any) -> bool:
    try:
        sock.setsockopt(socket.SOL_SOCKET, option, value)
    except OSError:  # not on this architecture, in this sandbox, or with an older Linux
        return False
    return True


def _refuse_connections(sock: socket.socket) -> None:
    """Let it listen no more, nor its copies in other processes: C code can fork without Python's knowledge."""
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def _is_readable(sock: socket.socket) -> bool:
    """Whether connections wait in its queue: three times as quick as an accept() that fails."""
    if sys.platform == "win32":
        return bool(select.select([sock], (), (), 0)[0])
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))
