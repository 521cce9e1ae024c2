"""
Binds the sockets that the options ask for, knows their URLs, and lets them listen.

They are bound before the app's startup, so that a busy port is an `OSError` (and not uvicorn's `SystemExit`) before the
app has done anything. They listen after the startup: whoever connects earlier is refused, and waits in no queue. With
SO_REUSEADDR two starting programs can bind the same port; then `listen()` fails for the second one.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
import sys
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from functools import lru_cache, partial
from typing import Any, TypeAlias
from urllib.parse import quote

from aioserve import _limits
from aioserve._log import logger
from aioserve._net import forks

Host: TypeAlias = str | Sequence[str] | None

# The errors for an address on a machine without IPv6, or without IPv4.
_MISSING_FAMILY = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)

_NUMERIC = int(socket.AI_PASSIVE | socket.AI_NUMERICHOST)
_LOOPBACK_FOR = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 (compared, not bound)

_HINTS = {
    errno.EACCES: (
        "another program has it for itself, or Windows reserves it (netsh interface ipv4 show excludedportrange tcp)"
        if sys.platform == "win32"
        else "a port below 1024 requires a privilege"
    ),
    errno.EADDRNOTAVAIL: "this machine does not have that address",
}
_CONNECTION = "it is a connection (systemd: set Accept=no)"


class Listener:
    """
    A socket that listens when the app has started, and what to clean up when it closes.

    Args:
        sock: A socket of the server's own, which is bound, but for one with a path; a duplicate, if it is lent.
        lent: Whether the connections in its queue belong to the next process that accepts on it.
        path: Where a Unix socket is to appear, in a file that is removed at the end.
        mode: The mode of that file.
        name: What an error calls the socket, if not by its address.
    """

    def __init__(
        self, sock: socket.socket, *, lent: bool = False, path: str | None = None, mode: int = 0, name: str = ""
    ) -> None:
        self.socket = sock
        self.lent = lent
        self.file_path, self.mode = path, mode
        self._remove_file: Callable[[], None] | None = None
        self._name = name
        forks.track(sock)
        self.host: str | None = None
        """The address that it is bound to, with its scope, if any; `None` for a Unix socket."""
        self.port: int | None = None
        self.path: str | bytes | None = None
        """The path of a Unix socket, or its abstract name as bytes."""
        self.bound_as: str | bytes | None = None
        """What the system calls a Unix socket, where that is not its path."""
        address = sock.getsockname() if path is None else path
        if isinstance(address, tuple):
            self.host, self.port, *rest = address
            if rest and rest[1]:  # with its interface, as in fe80::1%eth0
                self.host, _ = socket.getnameinfo(address, socket.NI_NUMERICHOST | socket.NI_NUMERICSERV)
        else:  # absolute, since the program may change its working directory
            self.path = os.path.join(os.getcwd(), address) if isinstance(address, str) else address
            if path is None and (bound := socket.socket.getsockname(sock)) != address:
                self.bound_as = bound

    def listen(self, backlog: int) -> None:
        """Listen from now on; an `OSError` says where it cannot. The file of a Unix socket appears."""
        if sys.platform != "win32" and self.file_path is not None:
            from aioserve._net import unix  # only where it is needed

            self._remove_file = unix.listen(self.socket, self.file_path, self.mode, backlog).remove
            self.bound_as = socket.socket.getsockname(self.socket)
            return
        try:
            # So that the port can be bound again while connections linger.
            if sys.platform != "win32" and not self.lent:
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.socket.listen(backlog)
        except OSError as exc:
            hints = {errno.EADDRINUSE: "another server has begun to listen there"}
            if self.lent:
                hints[errno.EINVAL] = _CONNECTION
            raise self.error(exc, hints.get(exc.errno or 0)) from exc

    def error(self, exc: OSError, hint: str | None) -> OSError:
        """Return an error that says where it cannot listen."""
        where = self._name or (str(self.path) if self.host is None else _where(self.host, self.port or 0))
        return _cannot_listen(where, exc, hint)

    def url(self, scheme: str) -> str:
        """Return the URL for clients on this machine: a wildcard becomes loopback, IPv6 is in brackets."""
        if self.path is not None:
            return f"{scheme}+unix://{quote(os.fsencode(self.path), safe='')}"
        assert self.host is not None
        host = _LOOPBACK_FOR.get(self.host, self.host)
        if ":" in host:
            host = f"[{quote(host, safe=':')}]"  # the % of a scope is written %25: RFC 6874
        return f"{scheme}://{host}:{self.port}"

    def adopt_file(self) -> None:
        """Remove the file at the end also where another process, our child, has made it appear."""
        if sys.platform != "win32" and self.file_path is not None:
            from aioserve._net import unix  # only where it is needed

            with suppress(OSError):  # it has removed the file already
                self._remove_file = unix.SocketFile.at(self.file_path).remove_stale

    def remove_file(self) -> None:
        """Remove the file of a Unix socket, so that no new client finds it."""
        if self._remove_file is not None:
            self._remove_file()
            self._remove_file = None

    def close(self) -> None:
        self.remove_file()
        with forks.lock:
            self.socket.close()


Bind: TypeAlias = Callable[[], Awaitable[list[Listener]]]
"""Makes all the listeners that the options ask for, or none; an `OSError` says which one failed."""


async def bind_addresses(
    host: Host, port: int, *, reuse_port: bool, hint_if_busy: str = "port 0 takes a free port"
) -> list[Listener]:
    """Bind all addresses of the hosts (`None`: every interface); port 0 is one free port for all of them."""
    hosts = [host] if host is None or isinstance(host, str) else host
    unique = {address[1]: address for each in hosts for address in await _resolve(each)}

    for _ in range(_limits.SAME_PORT_ATTEMPTS if port == 0 else 1):
        try:
            return _bind_all(unique.values(), port, reuse_port=reuse_port)
        except OSError as exc:
            error = exc
            if exc.errno != errno.EADDRINUSE:
                break
    hint = _HINTS.get(error.errno or 0)
    if error.errno == errno.EADDRINUSE and port != 0:
        hint = hint_if_busy
    elif error.errno == errno.EADDRINUSE and len(unique) > 1:
        hint = "no port is free on all of the addresses; one of them may include another"
    if hint is not None:
        error = OSError(error.errno, f"{error.strerror}; {hint}")
    raise error from None  # the system's own error says the same in fewer words


async def prepare_path(path: str, mode: int) -> list[Listener]:
    """Check that a Unix socket can appear there; it is bound when it listens, since until then it would look stale."""
    if sys.platform == "win32":
        raise NotImplementedError  # the option is refused before
    from aioserve._net import unix  # only where it is needed

    unix.check(path)
    with forks.lock:
        return [Listener(unix.create_socket(), path=path, mode=mode)]


async def duplicate_sockets(sockets: Sequence[socket.socket]) -> list[Listener]:
    """
    Duplicate sockets that the caller has bound, so that several servers can accept on one socket.

    The originals stay open. They stay non-blocking, too: a socket shares that with all its duplicates, and setting it
    back would block the loop of any other server that has one.
    """
    return _duplicates((repr(sock), partial(_duplicate_socket, sock)) for sock in sockets)


async def duplicate_descriptors(descriptors: Sequence[int]) -> list[Listener]:
    return _duplicates((f"descriptor {each}", partial(_duplicate, each)) for each in descriptors)


async def bind_all(kinds: Iterable[Bind]) -> list[Listener]:
    """Make the listeners of several kinds, or none of them."""
    made: list[Listener] = []
    try:
        for bind in kinds:
            made += await bind()
    except BaseException:
        for each in made:
            each.close()
        raise
    return made


async def bind_with_systemd(name: str | None, lent: Sequence[Bind], own: Sequence[Bind]) -> list[Listener]:
    """Take what is lent and systemd's sockets, with one `FileDescriptorName` or any; without any, what is our own."""
    from aioserve._net import systemd  # only where it is needed

    if descriptors := systemd.listen_fds(name):
        made = await bind_all([*lent, partial(duplicate_descriptors, descriptors)])
        for each in descriptors:
            os.set_inheritable(each, False)  # they are for this process, and not for all that it starts
        return made
    systemd.warn_if_for_another_process()
    named = "" if name is None else f" named {name!r}"
    if name is not None and systemd.listen_fds():
        named += f" (only {', '.join(map(repr, systemd.names()))})"
        if own or lent:
            logger.warning("systemd has passed no socket%s; listening on the address that was given as well", named)
    if own or lent:
        return await bind_all([*own, *lent])
    raise OSError(
        errno.ENOENT,
        f"systemd has passed no socket{named} to this process (see LISTEN_FDS, LISTEN_PID and LISTEN_FDNAMES in its "
        "environment); start it by its socket unit, or also say where to listen without systemd",
    )


def check_socket(sock: socket.socket, what: str) -> None:
    """Raise a `TypeError` or `ValueError` if a server cannot accept connections on this socket."""
    if sock.fileno() < 0:
        raise ValueError(f"{what} is closed")
    if isinstance(sock, ssl.SSLSocket):
        raise TypeError(f"{what} is a TLS socket; pass the plain socket, and its context as ssl")
    is_tcp = sock.family in (socket.AF_INET, socket.AF_INET6)
    is_unix = sys.platform != "win32" and sock.family == socket.AF_UNIX
    if not (is_tcp or is_unix) or sock.type != socket.SOCK_STREAM:
        raise ValueError(f"only TCP sockets and Unix stream sockets can be served, not {what}")
    name = sock.getsockname()
    if not (name[1] if is_tcp else name):
        raise ValueError(f"{what} is not bound; bind it first")


def _duplicates(originals: Iterable[tuple[str, Callable[[], socket.socket]]]) -> list[Listener]:
    listeners = []
    with forks.lock, ExitStack() as undo:
        for name, duplicate in originals:
            try:
                sock = duplicate()
                undo.callback(sock.close)
                check_socket(sock, name)
                sock.setblocking(False)
                if _is_connected(sock):
                    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            except OSError as exc:
                raise _cannot_listen(name, exc, _CONNECTION if exc.errno == errno.EINVAL else None) from exc
            listeners.append(Listener(sock, lent=True, name=name))
        undo.pop_all()
    return listeners


def _is_connected(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


def _where(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _cannot_listen(where: str, exc: OSError, hint: str | None) -> OSError:
    return OSError(exc.errno, f"cannot listen on {where}: {exc.strerror}{f'; {hint}' if hint else ''}")


def _duplicate_socket(sock: socket.socket) -> socket.socket:
    sock.setblocking(False)
    return sock.dup()


def _duplicate(descriptor: int) -> socket.socket:
    duplicate = os.dup(descriptor)  # socket.dup() would change whether it blocks, which all duplicates share
    try:
        return socket.socket(fileno=duplicate)  # which finds out its family and type
    except OSError:
        os.close(duplicate)
        raise


_Address: TypeAlias = tuple[int, tuple[Any, ...], bool]
"""A family, an address of it, and whether its host has others, too, so that this machine may lack this family."""


def _bind_all(addresses: Iterable[_Address], port: int, *, reuse_port: bool) -> list[Listener]:
    # Where the kernel chooses the port, it is not to choose one that another program has bound, too.
    reuse_address = sys.platform != "win32" and port != 0
    listeners: list[Listener] = []
    for family, sockaddr, optional in addresses:
        try:
            with forks.lock:  # so that no child has it before it is tracked
                listeners.append(Listener(_bind(family, sockaddr, port, reuse_address, reuse_port)))
            port = listeners[0].port or port
        except OSError as exc:
            missing = exc
            if not optional or exc.errno not in _MISSING_FAMILY:
                for each in listeners:
                    each.close()
                raise
    if not listeners:
        raise missing
    return listeners


def _bind(family: int, sockaddr: Any, port: int, reuse_address: bool, reuse_port: bool) -> socket.socket:
    host, _, *rest = sockaddr
    # asyncio sets TCP_NODELAY on connections only if the protocol is named here; without it, responses on kept-alive
    # connections take 40 ms.
    sock = None
    try:
        sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        sock.setblocking(False)
        if reuse_address:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if sys.platform == "win32":  # where another program could take the port of a socket without it
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        elif reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((host, port, *rest))
    except OSError as exc:
        if sock is not None:
            sock.close()
        hint = None
        if exc.errno == errno.EINVAL and host[:3].lower() in ("fe8", "fe9", "fea", "feb"):
            hint = "a link-local address requires its interface, as in fe80::1%eth0"
        raise _cannot_listen(_where(host, port), exc, hint) from exc
    return sock


async def _resolve(host: str | None) -> list[_Address]:
    if host is None:
        return [*_parse("0.0.0.0", optional=True), *_parse("::", optional=True)]  # noqa: S104 (asked for)
    if host.lower().removesuffix(".") == "localhost":  # always loopback: RFC 6761, 6.3
        return [*_parse("127.0.0.1", optional=True), *_parse("::1", optional=True)]
    try:
        return _parse(host)
    except (socket.gaierror, UnicodeError):
        pass

    # To resolve a name can take seconds, so a thread does it. It is a new one, which ends with the answer:
    # loop.getaddrinfo() would leave a thread of the default executor behind.
    from concurrent.futures import ThreadPoolExecutor  # only where it is needed

    executor = ThreadPoolExecutor(1, thread_name_prefix="aioserve-resolve")
    answer = asyncio.get_running_loop().run_in_executor(executor, _getaddrinfo, host, socket.AI_PASSIVE)
    try:
        return [(*found, True) for found in await answer]
    except OSError as exc:
        raise socket.gaierror(exc.errno, f"cannot resolve host {host!r}: {exc.strerror}") from exc
    except UnicodeError as exc:  # the "idna" codec rejects the name
        raise socket.gaierror(socket.EAI_NONAME, f"cannot resolve host {host!r}: {exc}") from exc
    finally:
        executor.shutdown(wait=answer.done() and not answer.cancelled(), cancel_futures=True)


def _parse(host: str, *, optional: bool = False) -> list[_Address]:
    getaddrinfo = _getaddrinfo if "%" in host else _getaddrinfo_cached  # the index of an interface can change
    return [(*found, optional) for found in getaddrinfo(host, _NUMERIC)]


def _getaddrinfo(host: str, flags: int) -> list[tuple[int, tuple[Any, ...]]]:
    found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=flags)
    return [(int(family), sockaddr) for family, _, _, _, sockaddr in found]


_getaddrinfo_cached = lru_cache(_getaddrinfo)
