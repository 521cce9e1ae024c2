"""
A Unix socket's place in the file system: who may connect, whose it is, and when it goes.

The kernel makes the file when a socket is bound, and leaves it there when the socket is closed. So what stands at a
path may be alive, or stale, or something else altogether; only what is stale makes way. Somebody may be starting there
at this very moment, and so whatever is to make way is first looked at under a name that nobody else knows.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import socket
import stat
from contextlib import ExitStack
from typing import NamedTuple

logger = logging.getLogger("aioserve")


class Place(NamedTuple):
    """A path, and what stands there: an inode's number alone is soon given to the next file."""

    path: str
    device: int
    inode: int
    made_at: int

    @classmethod
    def at(cls, path: str) -> Place:
        found = os.lstat(path)
        if not stat.S_ISSOCK(found.st_mode):
            raise OSError(errno.EADDRINUSE, "what is there is no socket, and is left alone")
        return cls(os.path.abspath(path), found.st_dev, found.st_ino, found.st_mtime_ns)

    def still_stands(self) -> bool:
        try:
            return Place.at(self.path) == self
        except OSError:
            return False

    def clear(self) -> None:
        """Remove the file, and nothing that has come in its place."""
        if not self.still_stands():
            return
        try:
            os.unlink(self.path)
        except OSError as exc:
            logger.warning("cannot remove the socket %s: %s", self.path, exc.strerror)


def listen(path: str, mode: int, *, backlog: int) -> tuple[socket.socket, Place]:
    """
    Return a listening socket at a path, which nobody can connect to who is not meant to, not for a moment.

    Raises:
        OSError: Another server listens there, or something else stands there, or the directory is none of ours.
    """
    with ExitStack() as undo:
        try:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            undo.callback(sock.close)
            sock.setblocking(False)
            with contextlib.suppress(OSError):  # only Linux knows it: a file that is made with this mode at once
                os.fchmod(sock.fileno(), mode)
            _bind(sock, path)
            place = Place.at(path)
            undo.callback(place.clear)
            # What the umask has taken from it; connecting is not possible yet.
            os.chmod(path, mode, follow_symlinks=False)
            sock.listen(backlog)
            if not place.still_stands():
                raise OSError(errno.EADDRINUSE, "another server has just taken its place")
        except NotImplementedError:  # of chmod(): a symbolic link, whose target is none of our business
            raise OSError(errno.EADDRINUSE, f"cannot listen on {path}: a link has just taken its place") from None
        except OSError as exc:
            raise OSError(exc.errno or errno.ENAMETOOLONG, f"cannot listen on {path}: {exc.strerror or exc}") from exc
        undo.pop_all()
    return sock, place


def _bind(sock: socket.socket, path: str) -> None:
    if not _has_room(sock, path):
        _make_way(path)
        if not _has_room(sock, path):
            raise OSError(errno.EADDRINUSE, "another server was quicker to take its place")


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
    try:
        before = Place.at(path)
        if _is_alive(path):
            raise OSError(errno.EADDRINUSE, "another server is listening there")
        aside = os.path.join(os.path.dirname(path), f".{secrets.token_hex(3)}")
        os.rename(path, aside)
    except FileNotFoundError:
        return

    # Of several that find a stale one, each removes that one, and not the socket that the first has made since.
    stale = False
    try:
        stale = before._replace(path=os.path.abspath(aside)).still_stands() and not _is_alive(aside)
    finally:
        if stale:
            os.unlink(aside)
        else:
            os.rename(aside, path)
    if not stale:
        raise OSError(errno.EADDRINUSE, "another server has just begun to listen there")


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
