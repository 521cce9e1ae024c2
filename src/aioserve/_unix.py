"""
A Unix socket's place in the file system: who may connect, whose it is, and when it goes.

The kernel makes the file when a socket is bound, and leaves it there when the socket is closed. So what stands at a
path may be alive, or stale, or something else altogether; only what is stale makes way. A socket that is bound and does
not listen yet looks stale as well, and so we take the place of nobody while somebody else is taking it: whoever does
holds a lock on the directory. (It is a lock on its descriptor, which leaves no file behind.)
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import socket
import stat
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from typing import NamedTuple

logger = logging.getLogger("aioserve")

# A lock is held for the blink of an eye; nothing but trying again tells when it is free. Seconds.
_LOCKED_AGAIN_AFTER = 0.001
_LOCKED_AT_MOST = 1.0


class Place(NamedTuple):
    """A path, and what stands there: an inode's number alone is soon given to the next file."""

    path: str
    device: int
    inode: int
    made_at: int
    process: int
    """A fork of the process that made it has nothing to remove."""

    @classmethod
    def at(cls, path: str) -> Place:
        found = os.lstat(path)
        if not stat.S_ISSOCK(found.st_mode):
            raise OSError(errno.EADDRINUSE, "what is there is no socket, and is left alone")
        # Not normalized: behind a link, `..` is not what it looks like.
        absolute = os.path.join(os.getcwd(), path)
        return cls(absolute, found.st_dev, found.st_ino, found.st_mtime_ns, os.getpid())

    def still_stands(self) -> bool:
        try:
            return Place.at(self.path) == self
        except OSError:
            return False

    def clear(self) -> None:
        """Remove the file, and nothing that has come in its place; as long as it is alive, nothing of ours can."""
        if not self.still_stands():
            return
        try:
            os.unlink(self.path)
        except OSError as exc:
            logger.warning("cannot remove the socket %s: %s", self.path, exc.strerror)


async def listen(path: str, mode: int, *, backlog: int) -> tuple[socket.socket, Place]:
    """
    Return a listening socket at a path, which nobody can connect to who is not meant to, not for a moment.

    Raises:
        OSError: Another server listens there, or something else stands there, or the directory is none of ours.
    """
    try:
        async with _locked(os.path.dirname(path) or "."):
            return _listen(path, mode, backlog)
    except OSError as exc:
        raise OSError(exc.errno or errno.ENAMETOOLONG, f"cannot listen on {path}: {exc.strerror or exc}") from exc


def _listen(path: str, mode: int, backlog: int) -> tuple[socket.socket, Place]:
    with ExitStack() as undo:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        undo.callback(sock.close)
        sock.setblocking(False)
        with contextlib.suppress(OSError):  # only Linux knows it: a file that is made with this mode at once
            os.fchmod(sock.fileno(), mode)
        if not _has_room(sock, path):
            _make_way(path)
            if not _has_room(sock, path):
                raise OSError(errno.EADDRINUSE, "another server was quicker to take its place")
        place = Place.at(path)
        undo.callback(place.clear)
        if stat.S_IMODE(os.lstat(path).st_mode) != mode:
            _change_mode(path, mode)  # what the umask has taken from it; connecting is not possible yet
        sock.listen(backlog)
        if not place.still_stands():
            raise OSError(errno.EADDRINUSE, "something else has just taken its place")
        undo.pop_all()
    return sock, place


@asynccontextmanager
async def _locked(directory: str) -> AsyncIterator[None]:
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        yield  # not there, which binding will tell; or not to be read by us
        return
    try:
        until = asyncio.get_running_loop().time() + _LOCKED_AT_MOST
        while not _lock(descriptor):
            if asyncio.get_running_loop().time() > until:
                raise OSError(errno.EAGAIN, "another program holds a lock on its directory")
            await asyncio.sleep(_LOCKED_AGAIN_AFTER)
        yield
    finally:
        os.close(descriptor)  # which unlocks it


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks
    return True


def _has_room(sock: socket.socket, path: str) -> bool:
    """Bind it, if nothing is in the way: no link is followed, nothing replaced."""
    try:
        sock.bind(path)
    except OSError as exc:
        if exc.errno != errno.EADDRINUSE:
            raise
        return False
    return True


def _make_way(path: str) -> None:
    """Remove a stale socket; raise, where what stands there is anything else."""
    with contextlib.suppress(FileNotFoundError):  # it has gone by itself
        found = Place.at(path)
        if _is_alive(path):
            raise OSError(errno.EADDRINUSE, "another server is listening there")
        if found.still_stands():
            os.unlink(path)


def _change_mode(path: str, mode: int) -> None:
    try:
        os.chmod(path, mode, follow_symlinks=False)
    except NotImplementedError:
        reason = "a link has just taken its place, or there is no /proc to change its mode by"
        raise OSError(errno.EADDRINUSE, reason) from None


def _is_alive(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return False
        except BlockingIOError:
            return True  # its queue is full
        except OSError as exc:
            if exc.errno == errno.EPROTOTYPE:
                return True  # of another kind, as datagrams are
            raise
    return True
