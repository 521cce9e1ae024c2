"""
From host and port to listening sockets, from those to URLs, and to the connections that they accept.

We bind by ourselves, so that a busy port is an `OSError` here and not a `SystemExit` in uvicorn, and before the app's
startup runs. We listen at once, too: under SO_REUSEADDR two programs can *bind* the same port, and the second is told
only by `listen()`.

We accept by ourselves, too. asyncio's own servers know nothing of a connection that they have accepted and not yet
made: one whose TLS handshake is under way outlives them by up to a minute, a plain one of the last turn leaks its
socket, and what waits in the kernel's queue is reset. (A connection costs as much as with asyncio's, and a tenth more
than with uvloop's.)
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import ssl
import types
from collections.abc import Callable, Coroutine, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, NamedTuple, TypeAlias, TypeVar
from urllib.parse import quote

logger = logging.getLogger("aioserve")

T = TypeVar("T")

Host: TypeAlias = str | Sequence[str] | None

# Port 0 on several addresses: the free port of the first may be taken on another, so try again with a new one.
_SAME_PORT_ATTEMPTS = 32

# What a machine without IPv6 (or without IPv4) says of an address of the family that it lacks.
_NO_SUCH_FAMILY = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)

# What accept() can say of one connection, which has gone before we came (accept(2), on Linux).
_GONE = (errno.ECONNABORTED, errno.EPROTO, errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH)

# How long to leave it alone when it says something else, as when descriptors have run out: seconds.
_ACCEPT_AGAIN_AFTER = 1.0

_HINTS = {
    errno.EADDRINUSE: "port=0 takes a free one",
    errno.EACCES: "a port below 1024 needs a privilege",
    errno.EADDRNOTAVAIL: "it is not an address of this machine",
}


class _Address(NamedTuple):
    family: int
    sockaddr: tuple[Any, ...]
    """As `socket.bind()` takes it, with port 0."""
    optional: bool
    """One of several that stand for a name, or for "every interface": this machine may lack its family."""


async def listen(host: Host, port: int, *, backlog: int) -> list[socket.socket]:
    """
    Return listening sockets for all addresses of the host, or none at all.

    Args:
        host: A name or an address, or a sequence of them; `None` for every interface, IPv4 and IPv6.
        port: 0 takes a free one, the same on every address.
        backlog: How many connections the kernel keeps waiting for us, per socket.

    Raises:
        OSError: An address cannot be bound, or a name cannot be resolved (`socket.gaierror`). The class and the errno
            are the system's own; the message says which address.
    """
    hosts = [host] if host is None or isinstance(host, str) else host
    addresses = [address for each in hosts for address in await _resolve(each)]
    unique = list({address.sockaddr: address for address in addresses}.values())

    for _ in range(_SAME_PORT_ATTEMPTS if port == 0 else 1):
        try:
            return _listen_on_all(unique, port, backlog)
        except OSError as exc:
            last = exc
            if exc.errno != errno.EADDRINUSE:
                break
    if last.errno in _HINTS and not (last.errno == errno.EADDRINUSE and port == 0):
        last = OSError(last.errno, f"{last.strerror}; {_HINTS[last.errno]}")
    raise last from None  # the system's own error says the same in fewer words


def borrow(sockets: Sequence[socket.socket], *, backlog: int) -> list[socket.socket]:
    """
    Return duplicates of sockets that the caller has bound, listening.

    The originals stay the caller's, open and non-blocking: that is shared with every duplicate, and to put it back
    would freeze whoever else has one. With duplicates, several servers can accept on one socket.

    Raises:
        OSError: One of them cannot listen.
    """
    with ExitStack() as undo:
        duplicates = []
        for sock in sockets:
            sock.setblocking(False)
            sock.listen(backlog)
            duplicate = sock.dup()
            undo.callback(duplicate.close)
            duplicate.setblocking(False)
            duplicates.append(duplicate)
        undo.pop_all()
    return duplicates


def url_of(sock: socket.socket, scheme: str) -> str:
    """Where a client on this machine reaches the socket: a wildcard becomes loopback, IPv6 stands in brackets."""
    address, port = sock.getsockname()[:2]
    address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)  # noqa: S104 (compared, not bound)
    if sock.family == socket.AF_INET6:
        address = f"[{quote(address, safe=':')}]"  # the % of a scope is written %25: RFC 6874
    return f"{scheme}://{address}:{port}"


class Acceptor:
    """
    Accepts connections on listening sockets, and knows those that it is still making.

    To code that knows uvicorn, it stands where `uvicorn.Server.servers` has an `asyncio.Server`.
    """

    def __init__(
        self,
        sockets: Sequence[socket.socket],
        make_protocol: Callable[[], asyncio.Protocol],
        *,
        ssl: ssl.SSLContext | None,
        backlog: int,
        lent: bool,
        changed: Callable[[], None],
    ) -> None:
        self.sockets: Sequence[socket.socket] = sockets
        self.making: set[asyncio.Task[object]] = set()
        """The connections that are accepted and not yet made: with TLS, those in their handshake."""

        self._below: dict[asyncio.BaseTransport, asyncio.Transport] = {}
        self._loop = asyncio.get_running_loop()
        self._make_protocol = make_protocol
        self._ssl = ssl
        self._backlog = backlog
        self._lent = lent
        self._changed = changed
        self._serving = False
        self._retries: dict[socket.socket, asyncio.TimerHandle] = {}

    def is_serving(self) -> bool:
        return self._serving and not self._loop.is_closed()

    def start(self) -> None:
        self._serving = True
        for sock in self.sockets:
            self._loop.add_reader(sock, self._accept, sock)

    def close(self) -> None:
        """
        Accept what waits in the kernel's queue, and then nothing more.

        The queue of a socket that is lent belongs to whoever takes it next.
        """
        if self._serving and not self._loop.is_closed():
            self._serving = False
            for sock in self.sockets:
                self._loop.remove_reader(sock)
                if not self._lent:
                    self._accept(sock)
            for retry in self._retries.values():
                retry.cancel()
        for sock in self.sockets:
            sock.close()

    async def wait_closed(self) -> None:
        """Return at once: nothing of ours takes time to close."""

    def give_up(self) -> None:
        """Drop the connections that are still being made."""
        for task in self.making:
            task.cancel()

    def _accept(self, sock: socket.socket) -> None:
        for _ in range(self._backlog):
            try:
                connection, _address = sock.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as exc:
                if exc.errno in _GONE:
                    continue
                if self._serving:
                    self._pause(sock, exc)
                return
            connection.setblocking(False)
            if connection.proto != socket.IPPROTO_TCP and connection.family in (socket.AF_INET, socket.AF_INET6):
                # A socket that was made with 0 for its protocol, as most are that are lent: asyncio takes no notice of
                # it, and answers on kept-alive connections would take 40 ms.
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            task: asyncio.Task[object] = self._loop.create_task(
                self._loop.connect_accepted_socket(self._make_protocol, connection)
                if self._ssl is None
                else self._secure(connection, self._ssl)
            )
            if not task.done():  # an eager one may be
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
        self._loop.remove_reader(sock)
        self._retries[sock] = self._loop.call_later(_ACCEPT_AGAIN_AFTER, self._resume, sock)

    def _resume(self, sock: socket.socket) -> None:
        self._loop.add_reader(sock, self._accept, sock)


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


def _listen_on_all(addresses: Sequence[_Address], port: int, backlog: int) -> list[socket.socket]:
    sockets: list[socket.socket] = []
    lacking: OSError | None = None
    with ExitStack() as undo:
        for address in addresses:
            try:
                sock = _listen_on(address, port, backlog)
            except OSError as exc:
                if address.optional and exc.errno in _NO_SUCH_FAMILY:
                    lacking = exc
                    continue
                raise
            undo.callback(sock.close)
            sockets.append(sock)
            port = sock.getsockname()[1]
        if not sockets and lacking is not None:
            raise lacking
        undo.pop_all()
    return sockets


def _listen_on(address: _Address, port: int, backlog: int) -> socket.socket:
    where, _, *rest = address.sockaddr
    with ExitStack() as undo:
        try:
            # With the protocol named, asyncio sets TCP_NODELAY on what it accepts from here; with 0 it does not, and
            # answers on kept-alive connections take 40 ms.
            sock = socket.socket(address.family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
            undo.callback(sock.close)
            sock.setblocking(False)
            if os.name == "posix":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if address.family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind((where, port, *rest))
            sock.listen(backlog)
        except OSError as exc:
            bracketed = f"[{where}]" if address.family == socket.AF_INET6 else where
            raise OSError(exc.errno, f"cannot listen on {bracketed}:{port}: {exc.strerror}") from exc
        undo.pop_all()
    return sock


async def _resolve(host: str | None) -> list[_Address]:
    if host is None:
        return [*_literal("0.0.0.0", optional=True), *_literal("::", optional=True)]  # noqa: S104 (asked for)
    if host == "localhost":  # always loopback, whatever a resolver says: RFC 6761, 6.3
        return [*_literal("127.0.0.1", optional=True), *_literal("::1", optional=True)]
    try:
        return _literal(host)
    except (socket.gaierror, UnicodeError):
        pass

    # A name. Asking can take seconds, hence a thread; and loop.getaddrinfo() would leave one of the default executor
    # behind, hence one of our own, which ends with its answer.
    executor = ThreadPoolExecutor(1, thread_name_prefix="aioserve-resolve")
    try:
        found = await asyncio.get_running_loop().run_in_executor(executor, _getaddrinfo, host, socket.AI_PASSIVE)
    except asyncio.CancelledError:
        executor.shutdown(wait=False, cancel_futures=True)
        raise
    except OSError as exc:
        executor.shutdown()
        raise socket.gaierror(exc.errno, f"cannot resolve host {host!r}: {exc.strerror}") from exc
    except UnicodeError as exc:  # what the "idna" codec says of an impossible name
        executor.shutdown()
        raise socket.gaierror(socket.EAI_NONAME, f"cannot resolve host {host!r}: {exc}") from exc
    executor.shutdown()
    return [_Address(family, sockaddr, optional=True) for family, sockaddr in found]


def _literal(host: str, *, optional: bool = False) -> list[_Address]:
    found = _getaddrinfo(host, socket.AI_PASSIVE | socket.AI_NUMERICHOST)
    return [_Address(family, sockaddr, optional) for family, sockaddr in found]


def _getaddrinfo(host: str, flags: int) -> list[tuple[int, tuple[Any, ...]]]:
    found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=flags)
    return [(int(family), sockaddr) for family, _, _, _, sockaddr in found]
