"""
Creates and removes the files of Unix sockets.

`bind()` creates the file, and closing the socket does not remove it. So a file that already exists can be a socket in
use, a stale socket, or something else; only a stale socket is replaced. A socket that is bound and does not listen yet
looks stale, too. So that no server replaces it at that moment, servers lock the directory while they create a socket.
(The lock is on a descriptor of the directory, and leaves no file behind.)
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import socket
import stat
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from typing import NamedTuple

from aioserve import _limits
from aioserve._log import logger


class SocketFile(NamedTuple):
    """The file of a Unix socket. Its time is part of its identity, since the next file may get the same inode."""

    path: str
    device: int
    inode: int
    modified: int
    process: int  # that created it; a fork of that process does not remove it

    @classmethod
    def at(cls, path: str) -> SocketFile:
        found = os.lstat(path)
        if not stat.S_ISSOCK(found.st_mode):
            raise OSError(errno.EADDRINUSE, "the file there is not a socket; it was left unchanged")
        # Not normalized, since `..` after a link is the parent of the link's target.
        absolute = os.path.join(os.getcwd(), path)
        return cls(absolute, found.st_dev, found.st_ino, found.st_mtime_ns, os.getpid())

    def exists(self) -> bool:
        try:
            return SocketFile.at(self.path) == self
        except OSError:
            return False

    def remove(self) -> None:
        """Remove the file, unless another file has replaced it."""
        if self.exists():
            try:
                os.unlink(self.path)
            except OSError as exc:
                logger.warning("cannot remove the socket %s: %s", self.path, exc.strerror)


def create_socket() -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    return sock


def check(path: str) -> None:
    """Raise an `OSError` if it is plain already that a socket cannot appear there."""
    try:
        directory = os.path.dirname(path) or "."
        os.stat(os.path.join(directory, "."))
        if not os.access(directory, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if os.path.lexists(path):
            SocketFile.at(path)
        with suppress(FileNotFoundError):
            if _is_in_use(path):  # which also says whether the path is too long
                raise OSError(errno.EADDRINUSE, "another server is listening there")
    except OSError as exc:
        raise _cannot_listen(path, exc) from exc


async def listen(sock: socket.socket, path: str, mode: int, backlog: int) -> SocketFile:
    """Bind a socket and let it listen; return its new file, which at no moment allows more than its mode."""
    try:
        async with _locked(os.path.dirname(path) or "."):
            return _listen(sock, path, mode, backlog)
    except OSError as exc:
        raise _cannot_listen(path, exc) from exc


def _cannot_listen(path: str, exc: OSError) -> OSError:
    return OSError(exc.errno or errno.ENAMETOOLONG, f"cannot listen on {path}: {exc.strerror or exc}")


def _listen(sock: socket.socket, path: str, mode: int, backlog: int) -> SocketFile:
    with suppress(OSError):  # on Linux, the file then has this mode from the start
        os.fchmod(sock.fileno(), mode)
    if not _try_bind(sock, path):
        _remove_stale(path)
        if not _try_bind(sock, path):
            raise OSError(errno.EADDRINUSE, "another server has just created a socket there")
    file = SocketFile.at(path)
    with ExitStack() as undo:
        undo.callback(file.remove)
        if stat.S_IMODE(os.lstat(path).st_mode) != mode:
            try:
                os.chmod(path, mode, follow_symlinks=False)  # the umask has changed it; nobody can connect yet
            except NotImplementedError:
                reason = "its mode cannot be changed: a link has just replaced it, or /proc is missing"
                raise OSError(errno.EADDRINUSE, reason) from None
        sock.listen(backlog)
        if not file.exists():
            raise OSError(errno.EADDRINUSE, "another file has just replaced it")
        undo.pop_all()
    return file


@asynccontextmanager
async def _locked(directory: str) -> AsyncIterator[None]:
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        yield  # it is not readable, or does not exist; then bind() says so
        return
    try:
        time = asyncio.get_running_loop().time
        deadline = time() + _limits.FILE_LOCK_TIMEOUT
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time() > deadline:
                    raise OSError(errno.EAGAIN, "another program holds a lock on its directory") from None
                await asyncio.sleep(_limits.FILE_LOCK_RETRY)
            except OSError:
                break  # a file system without locks
            else:
                break
        yield
    finally:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # not left to close(): a fork may have a copy, which holds the lock
        os.close(descriptor)


def _try_bind(sock: socket.socket, path: str) -> bool:
    """Bind the socket, unless a file exists there; bind() follows no link and replaces nothing."""
    try:
        sock.bind(path)
    except OSError as exc:
        if exc.errno != errno.EADDRINUSE:
            raise
        return False
    return True


def _remove_stale(path: str) -> None:
    """Remove a stale socket, or raise if the file is anything else."""
    with suppress(FileNotFoundError):  # another process has removed it
        file = SocketFile.at(path)
        if _is_in_use(path):
            raise OSError(errno.EADDRINUSE, "another server is listening there")
        if file.exists():
            os.unlink(path)


def _is_in_use(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        code = probe.connect_ex(path)
    # It is in use, too, if its queue is full, or if it is of another type, such as datagrams.
    if code not in (0, errno.ECONNREFUSED, errno.EAGAIN, errno.EINPROGRESS, errno.EPROTOTYPE):
        raise OSError(code, os.strerror(code))
    return code != errno.ECONNREFUSED
