"""
From what was asked for to listening sockets, and from those to URLs.

We bind by ourselves, so that a busy port is an `OSError` here and not a `SystemExit` in uvicorn, and before the app's
startup runs. We listen at once, too: under SO_REUSEADDR two programs can *bind* the same port, and the second is told
only by `listen()`.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias
from urllib.parse import quote

if TYPE_CHECKING:
    from aioserve._unix import Place

Host: TypeAlias = str | Sequence[str] | None

# Port 0 on several addresses: the free port of the first may be taken on another, so try again with a new one.
_SAME_PORT_ATTEMPTS = 32

# What a machine without IPv6 (or without IPv4) says of an address of the family that it lacks.
_NO_SUCH_FAMILY = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)

_NUMERIC = int(socket.AI_PASSIVE | socket.AI_NUMERICHOST)

_LOOPBACK_FOR = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 (compared, not bound)

_HINTS = {
    errno.EADDRINUSE: "port=0 takes a free one",
    errno.EACCES: "a port below 1024 needs a privilege",
    errno.EADDRNOTAVAIL: "it is not an address of this machine",
}


class Listener:
    """
    A listening socket of ours, and what becomes of it at the end.

    Args:
        sock: Ours to close; where it is lent, a duplicate.
        lent: Whether its queue belongs to whoever takes it next.
        place: What it has in the file system, to be removed at the end.
    """

    def __init__(self, sock: socket.socket, *, lent: bool = False, place: Place | None = None) -> None:
        self.socket = sock
        self.lent = lent
        self._place = place
        self.host: str | None = None
        """The address that it is bound to, with its scope, if any; none of a Unix socket."""
        self.port: int | None = None
        name = sock.getsockname()
        if isinstance(name, tuple):
            self.host, self.port, *rest = name
            if rest and rest[1]:
                self.host = f"{self.host}%{_link(rest[1])}"
        else:
            # A path (or a name in bytes), which a program that goes elsewhere could no longer find.
            self._path = os.path.join(os.getcwd(), name) if isinstance(name, str) else name

    def url(self, scheme: str) -> str:
        """Where a client on this machine reaches it: a wildcard becomes loopback, IPv6 stands in brackets."""
        if self.host is None:
            return f"{scheme}+unix://{quote(os.fsencode(self._path), safe='')}"
        host = _LOOPBACK_FOR.get(self.host, self.host)
        if ":" in host:
            host = f"[{quote(host, safe=':')}]"  # the % of a scope is written %25: RFC 6874
        return f"{scheme}://{host}:{self.port}"

    def withdraw(self) -> None:
        """Let nobody new find it, where it has a place of its own."""
        if self._place is not None:
            self._place.clear()
            self._place = None

    def close(self) -> None:
        self.withdraw()
        self.socket.close()


if TYPE_CHECKING:

    class Listen(Protocol):
        """What was asked for, and has only to be done."""

        def __call__(self, *, backlog: int) -> Awaitable[list[Listener]]:
            """
            Listen on all of it, or on none.

            Args:
                backlog: How many connections the kernel keeps waiting for us, per socket.

            Raises:
                OSError: The class and the errno are the system's own; the message says which address or path.
            """


async def on_addresses(host: Host, port: int, *, reuse_port: bool = False, backlog: int) -> list[Listener]:
    """
    Listen on all addresses of a host.

    Args:
        host: A name or an address, or a sequence of them; `None` for every interface, IPv4 and IPv6.
        port: 0 takes a free one, the same on every address.
        reuse_port: Whether others may listen on the same port, and have their share of the connections.
        backlog: As in `Listen`.
    """
    hosts = [host] if host is None or isinstance(host, str) else host
    unique = {address.sockaddr: address for each in hosts for address in await _resolve(each)}

    for _ in range(_SAME_PORT_ATTEMPTS if port == 0 else 1):
        try:
            return _listen_on_all(unique.values(), port, backlog, reuse_port=reuse_port)
        except OSError as exc:
            last = exc
            if exc.errno != errno.EADDRINUSE:
                break
    hint = _HINTS.get(last.errno or 0)
    if last.errno == errno.EADDRINUSE and port == 0:
        hint = "no port is free on all of the addresses; does one of them cover another?" if len(unique) > 1 else None
    if hint is not None:
        last = OSError(last.errno, f"{last.strerror}; {hint}")
    raise last from None  # the system's own error says the same in fewer words


async def at_path(path: str, mode: int, *, backlog: int) -> list[Listener]:
    """Listen at a path, with a mode for the file there."""
    from aioserve._unix import listen  # for those who need it only

    sock, place = await listen(path, mode, backlog=backlog)
    return [Listener(sock, place=place)]


async def on_lent(sockets: Sequence[socket.socket], *, backlog: int) -> list[Listener]:
    """
    Listen on sockets that the caller has bound.

    The originals stay the caller's, open and non-blocking: that is shared with every duplicate, and to put it back
    would freeze whoever else has one. With duplicates, several servers can accept on one socket.
    """
    for sock in sockets:
        sock.setblocking(False)
    return _borrow(((repr(sock), sock.dup) for sock in sockets), backlog)


async def on_descriptors(descriptors: Sequence[int], *, backlog: int) -> list[Listener]:
    """Do the same, by their descriptors."""
    return _borrow(((f"descriptor {each}", partial(_duplicate, each)) for each in descriptors), backlog)


async def on_systemds(name: str | None, otherwise: Listen | None, *, backlog: int) -> list[Listener]:
    """
    Listen on what systemd hands down.

    Args:
        name: Which of it, by the unit's `FileDescriptorName`; `None` for all.
        otherwise: Where to listen if it hands down nothing.
        backlog: As in `Listen`.
    """
    from aioserve import _systemd  # for those who need it only

    descriptors = _systemd.listen_fds(name)
    if descriptors:
        return await on_descriptors(descriptors, backlog=backlog)
    if otherwise is not None:
        return await otherwise(backlog=backlog)
    named = "" if name is None else f" of the name {name!r}"
    if name is not None and _systemd.listen_fds():
        named += f" (but {', '.join(map(repr, _systemd.names()))})"
    raise OSError(
        errno.ENOENT,
        f"systemd has handed down no socket{named} to this process (LISTEN_FDS, LISTEN_PID, LISTEN_FDNAMES in its "
        "environment say so); start it by its socket unit, or say as well where to listen without one",
    )


def _link(index: int) -> str:
    try:
        return socket.if_indextoname(index)
    except OSError:
        return str(index)  # it is gone


def check_lent(sock: socket.socket, what: str) -> None:
    """
    Raises:
        TypeError, ValueError: The socket is none that can be served.
    """
    if sock.fileno() < 0:
        raise ValueError(f"{what} is closed")
    if isinstance(sock, ssl.SSLSocket):
        raise TypeError(f"{what} has TLS of its own; lend the plain socket, and give its context as ssl")
    if sock.family not in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX) or sock.type != socket.SOCK_STREAM:
        raise ValueError(f"only TCP sockets and Unix stream sockets can be served, not {what}")
    name = sock.getsockname()
    if not (name if sock.family == socket.AF_UNIX else name[1]):
        raise ValueError(f"{what} is not bound; bind it first")


def _borrow(lent: Iterable[tuple[str, Callable[[], socket.socket]]], backlog: int) -> list[Listener]:
    listeners = []
    with ExitStack() as undo:
        for what, duplicate in lent:
            try:
                sock = duplicate()
                undo.callback(sock.close)
                check_lent(sock, what)
                sock.setblocking(False)
                sock.listen(backlog)
            except OSError as exc:
                hint = "; is it a connection? (Accept=no hands down what listens)" if exc.errno == errno.EINVAL else ""
                raise OSError(exc.errno, f"cannot listen on {what}: {exc.strerror}{hint}") from exc
            listeners.append(Listener(sock, lent=True))
        undo.pop_all()
    return listeners


def _duplicate(descriptor: int) -> socket.socket:
    duplicate = os.dup(descriptor)
    try:
        return socket.socket(fileno=duplicate)  # it finds out the rest
    except OSError:
        os.close(duplicate)
        raise


class _Address:
    """
    Where to bind.

    Args:
        family: The socket's.
        sockaddr: As `socket.bind()` takes it, with port 0.
        optional: Whether it is one of several that stand for a name, or for "every interface": this machine may lack
            its family.
    """

    def __init__(self, family: int, sockaddr: tuple[Any, ...], *, optional: bool) -> None:
        self.family = family
        self.sockaddr = sockaddr
        self.optional = optional


def _listen_on_all(addresses: Iterable[_Address], port: int, backlog: int, *, reuse_port: bool) -> list[Listener]:
    listeners: list[Listener] = []
    lacking: OSError | None = None
    for address in addresses:
        try:
            listener = Listener(_listen_on(address, port, backlog, reuse_port=reuse_port))
        except OSError as exc:
            if address.optional and exc.errno in _NO_SUCH_FAMILY:
                lacking = exc
                continue
            for each in listeners:
                each.close()
            raise
        listeners.append(listener)
        port = listener.port or port
    if not listeners and lacking is not None:
        raise lacking
    return listeners


def _listen_on(address: _Address, port: int, backlog: int, *, reuse_port: bool) -> socket.socket:
    where, _, *rest = address.sockaddr
    sock = None
    try:
        # With the protocol named, asyncio sets TCP_NODELAY on what it accepts from here; with 0 it does not, and
        # answers on kept-alive connections take 40 ms.
        sock = socket.socket(address.family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        sock.setblocking(False)
        if os.name == "posix":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if address.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((where, port, *rest))
        sock.listen(backlog)
    except OSError as exc:
        if sock is not None:
            sock.close()
        bracketed = f"[{where}]" if address.family == socket.AF_INET6 else where
        reason = f"{exc.strerror}"
        if exc.errno == errno.EINVAL and where[:3].lower() in ("fe8", "fe9", "fea", "feb"):
            reason += "; an address that is good on one link only needs its interface, as in fe80::1%eth0"
        raise OSError(exc.errno, f"cannot listen on {bracketed}:{port}: {reason}") from exc
    return sock


async def _resolve(host: str | None) -> list[_Address]:
    if host is None:
        return [*_literal("0.0.0.0", optional=True), *_literal("::", optional=True)]  # noqa: S104 (asked for)
    if host.lower().removesuffix(".") == "localhost":  # always loopback, whatever a resolver says: RFC 6761, 6.3
        return [*_literal("127.0.0.1", optional=True), *_literal("::1", optional=True)]
    try:
        return _literal(host)
    except (socket.gaierror, UnicodeError):
        pass

    # A name. Asking can take seconds, hence a thread; and loop.getaddrinfo() would leave one of the default executor
    # behind, hence one of our own, which ends with its answer.
    from concurrent.futures import ThreadPoolExecutor  # for those who need it only

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
    ask = _getaddrinfo if "%" in host else _getaddrinfo_once  # a scope may be another one the next time
    found = ask(host, _NUMERIC)
    return [_Address(family, sockaddr, optional=optional) for family, sockaddr in found]


def _getaddrinfo(host: str, flags: int) -> list[tuple[int, tuple[Any, ...]]]:
    found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=flags)
    return [(int(family), sockaddr) for family, _, _, _, sockaddr in found]


_getaddrinfo_once = lru_cache(_getaddrinfo)
