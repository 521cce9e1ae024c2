"""
What a transport does not tell or do by itself: what is unread and unsent, and how to end it without a reset.

A raw transport is the one with the socket: the transport itself, or the one below a TLS transport.
"""

from __future__ import annotations

import errno
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from aioserve import _limits
from aioserve._net import forks

if sys.platform != "win32":
    import fcntl
    from termios import FIONREAD, TIOCOUTQ
else:
    FIONREAD, TIOCOUTQ = 0, 0  # nobody tells there


def unread_bytes(raw: Any) -> int:
    """Return how much has arrived on a connection that nobody has read yet; on Windows, 1 for anything."""
    return _peek(raw) if sys.platform == "win32" else _ask_kernel(raw, FIONREAD)


def _peek(raw: Any) -> int:
    with suppress(OSError), _borrowed_socket(raw) as sock:
        return len(sock.recv(1, socket.MSG_PEEK))
    return 0


@contextmanager
def _borrowed_socket(raw: Any) -> Iterator[socket.socket]:
    """Lend the socket of a raw transport, which does not show all of its methods; an `OSError` says that it is gone."""
    sock = socket.socket(fileno=descriptor(raw))
    try:
        yield sock
    finally:
        sock.detach()  # the descriptor is the transport's


def unacknowledged_bytes(raw: Any) -> int:
    """Return how much was written to a connection of which the client's kernel has not said that it has it."""
    return _ask_kernel(raw, TIOCOUTQ)


def _ask_kernel(raw: Any, request: int) -> int:
    size = bytearray(4)  # a C int; bytes would be copied
    if sys.platform != "win32":
        try:
            fcntl.ioctl(raw.get_extra_info("socket"), request, size)
        except (OSError, TypeError, ValueError):  # it is gone
            return 0
    return int.from_bytes(size, sys.byteorder)


def is_active(raw: Any) -> bool:
    """Whether something waits in either direction, or has come a moment ago, behind the first packet."""
    if raw.get_write_buffer_size() or unread_bytes(raw):
        return True
    info = tcp_info(raw)
    if info is None:
        return unacknowledged_bytes(raw) > 0
    return info.unsent > 0 or (info.packets > 1 and info.since_received < _limits.ACTIVE)


class TcpInfo:
    """What the kernel knows of a TCP connection."""

    # Not a NamedTuple, which would take a tenth of a millisecond at the import.

    def __init__(self, since_sent: int, since_received: int, received: int, unsent: int, packets: int) -> None:
        self.since_sent: float = since_sent / 1000
        """Seconds since we sent something to the client."""
        self.since_received: float = since_received / 1000
        """Seconds since the client sent something."""
        self.received = received
        """Bytes that have come."""
        self.unsent = unsent
        """Bytes that are not sent, since the client does not read what came before."""
        self.packets = packets
        """The number of packets in which those bytes have come."""


def tcp_info(raw: Any) -> TcpInfo | None:
    """Return it; `None` where the kernel does not tell."""
    sock = raw.get_extra_info("socket")
    fields = None if sock is None else _tcp_info_fields(sock, "44xI4xI72xQ8xI4xI")
    return None if fields is None else TcpInfo(*fields)


def _tcp_info_fields(sock: Any, layout: str) -> tuple[int, ...] | None:
    """Return fields of the `struct tcp_info` of linux/tcp.h; `None` on other systems, and for Unix sockets."""
    if sys.platform != "linux":
        return None
    try:
        return struct.unpack(layout, sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, struct.calcsize(layout)))
    except (OSError, struct.error):
        return None


def idle_time(raw: Any, *, unknown: float) -> float:
    """Return for how many seconds nothing has come or gone; the given number where the kernel does not tell."""
    if unread_bytes(raw):
        return 0.0
    info = tcp_info(raw)
    return unknown if info is None else min(info.since_sent, info.since_received)


def queue_length(listening: socket.socket) -> int:
    """Return how many connections wait in the queue of a listening socket; 0 where the kernel does not tell."""
    fields = _tcp_info_fields(listening, "24xI")  # tcpi_unacked
    return 0 if fields is None else fields[0]


def send_without_delay(sock: Any) -> None:
    """
    Set TCP_NODELAY, or answers on kept-alive connections take 40 ms.

    asyncio does so only for a socket whose protocol is named: neither for one that a socket with proto=0 has accepted,
    as most lent ones are, nor on Windows.
    """
    if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
        with suppress(OSError):  # the client is gone
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def has_unsent(transport: Any, raw: Any) -> bool:
    """Whether a TLS transport, or the one below, holds something that the kernel does not have yet."""
    try:
        return bool(raw.get_write_buffer_size() or transport.get_write_buffer_size())
    except AttributeError:
        return False  # closed twice, a TLS transport has no buffer


def hang_up(raw: Any) -> None:
    """
    End a connection from the outside, as if its client had done it.

    An abort would send a reset if something is unread, and a reset can take back what we have sent.
    """
    if sys.platform == "win32":
        raw.abort()  # a read is pending, and it is not said what that does in a socket that is shut down
        return
    try:
        with _borrowed_socket(raw) as sock, suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # it is gone
    raw.resume_reading()


def drop(raw: Any) -> None:
    """Close a connection whose loop is closed; uvloop has done so by itself."""
    last_step = getattr(raw, "_call_connection_lost", None)  # asyncio's, which closes the socket
    if last_step is not None:
        with suppress(Exception):  # its protocol may call the loop
            last_step(None)


class FlushWatch:
    """
    Hangs up a closing TLS connection as soon as all is sent, the close_notify included.

    asyncio waits half a minute for the client's close_notify, which the client need not send. (RFC 8446, 6.1.)
    """

    def __init__(self, loop: Any, transport: Any, raw: Any, hang_up: Callable[[Any], object]) -> None:
        self._loop = loop
        self._transport = transport
        self._raw = raw
        self._hang_up = hang_up

    def start(self) -> None:
        """Start to watch; raise an `OSError` if no descriptor is left."""
        # A descriptor of our own, since a loop allows nobody to watch a transport's.
        with forks.lock:
            self._descriptor = socket.dup(descriptor(self._raw))
            forks.track(self)
        self._loop.add_writer(self._descriptor, self._look)

    def _look(self) -> None:
        if not has_unsent(self._transport, self._raw):
            self._loop.remove_writer(self._descriptor)
            self._hang_up(self._raw)

    def stop(self) -> None:
        """Stop watching: the connection is gone."""
        self._loop.remove_writer(self._descriptor)
        with forks.lock:
            socket.close(self._descriptor)
            self._descriptor = -1

    def fileno(self) -> int:
        return self._descriptor


def descriptor(raw: Any) -> int:
    """Return the descriptor of a raw transport's socket; an `OSError` says that it is gone."""
    sock = raw.get_extra_info("socket")
    descriptor: int = -1 if sock is None else sock.fileno()
    if descriptor < 0:
        raise OSError(errno.EBADF, "the connection is gone")
    return descriptor
