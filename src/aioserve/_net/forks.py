"""
Lets no process that is forked from this one keep our sockets.

A fork has a copy of every descriptor, and the kernel closes a socket with its last copy. So the workers of a process
pool would keep a port taken, and clients waiting, after their server has closed. In the child, /dev/null takes the
place of each socket. To close it would free its number for a file of the child's, which the copies of our objects there
could then write to and close.

A program can still give a child a socket of ours: by a duplicate of it, or by making it inheritable.
"""

from __future__ import annotations

import os
import socket
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol
from weakref import ref

if TYPE_CHECKING:  # each Protocol takes a tenth of a millisecond at the import

    class HasDescriptor(Protocol):
        def fileno(self) -> int: ...


lock = threading.RLock()
"""Held while a socket is made and tracked, and while it is closed: then no other thread can fork."""

_tracked: set[ref[HasDescriptor]] = set()
_is_registered = False

count: int = 0
"""How many forks lie between this process and the first one that had a socket to track."""


def track(owner: HasDescriptor) -> None:
    """Let no child keep the descriptor of an object, as long as that is open."""
    global _is_registered
    if not _is_registered:
        _is_registered = True
        if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
            os.register_at_fork(before=lock.acquire, after_in_parent=_release, after_in_child=_let_go)
    _tracked.add(ref(owner, _tracked.discard))


def accept(sock: socket.socket) -> socket.socket:
    """Accept a connection, and let no child keep it."""
    with lock:
        connection, _address = sock.accept()
        if connection.__class__ is _Connection.__base__:  # and no class of the program's
            connection.__class__ = _Connection  # without another object, and a system call to make that
        track(connection)
    return connection


class _Connection(socket.socket):
    """A connection during whose `close()` no other thread can fork: its `fileno()` is -1 while it is still open."""

    __slots__ = ()

    def close(self) -> None:
        with lock:
            socket.socket.close(self)


def _release() -> None:
    with suppress(RuntimeError):  # another thread was about to fork when this was registered
        lock.release()


def _let_go() -> None:
    """Let go of all, in the child."""
    global count
    count += 1
    _release()
    owners = [each() for each in list(_tracked)]
    ours = [number for owner in owners if owner is not None and _is_open(number := owner.fileno())]
    _tracked.clear()
    if not ours:
        return
    os.close(ours[0])  # so that there is room for another descriptor
    nothing = os.open(os.devnull if os.path.exists(os.devnull) else "/", os.O_RDONLY)
    for number in ours:
        if number != nothing:
            os.dup2(nothing, number, inheritable=False)
    if nothing not in ours:
        os.close(nothing)


def _is_open(number: int) -> bool:
    """Whether it is open, and not meant for children."""
    try:
        return number >= 0 and not os.get_inheritable(number)
    except OSError:
        return False
