"""
Creates and removes the files of Unix sockets.

A server makes its socket in a directory of its own beside the path, which nobody else can enter. The socket is bound
there, gets its mode, and listens. Then `link()` gives it its place in one step, which fails if anything is there. So
one of many servers that start at once gets the path, a socket at the path always listens, and no mode is changed by a
name that another program can replace.

A stale socket is removed first. No system call removes a file only if it is still the same one, so servers do this one
at a time, under a lock on a file beside the path that only its owner can open. Whoever has the lock looks again whether
the socket is stale. Until it is removed, nothing of another server can take its place: `link()` replaces nothing, a
server that stops removes only its own file and still listens then, and everything else needs the lock.

Programs that are not aioserve know nothing of the lock. So the stale socket is moved into the private directory, where
nobody can replace it any more, and looked at once more: if it is another file, or alive, it is put back. Only during
these few system calls its name is missing. If a third program takes the name just then, the file is kept, and the error
says where.

A file is known by its device and inode. While its socket is open, the kernel gives that inode to no other file.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

from aioserve._log import logger

assert sys.platform != "win32"  # where it is refused: this is for type checkers

import fcntl  # noqa: E402

_LONGEST_NAME = 64  # of a socket in a private directory; an address can have about 100 bytes
_OTHER_IS_FASTER = "another server has just created a socket there"


class SocketFile(NamedTuple):
    """The file of a Unix socket."""

    path: str
    device: int
    inode: int
    process: int  # that created it; a fork of that process does not remove it

    @classmethod
    def at(cls, path: str) -> SocketFile:
        return cls.of(_find_socket(path), path)

    @classmethod
    def of(cls, found: os.stat_result, path: str) -> SocketFile:
        # Not normalized, since `..` after a link is the parent of the link's target.
        absolute = os.path.join(os.getcwd(), path)
        return cls(absolute, found.st_dev, found.st_ino, os.getpid())

    def exists(self) -> bool:
        try:
            return SocketFile.at(self.path) == self
        except OSError:
            return False

    def remove(self) -> None:
        """Remove the file while its socket listens, unless another file has replaced it."""
        if self.exists():
            try:
                os.unlink(self.path)
            except OSError as exc:
                self._warn(exc)

    def remove_stale(self) -> None:
        """Remove the file when its socket is closed; then its inode can be that of another server's file."""
        if self.exists():
            try:
                _check_unused(self.path)
                with _PrivateDirectory(self.path) as private, _locked(self.path):
                    _remove_stale(private, self.path)
            except OSError as exc:
                if exc.errno != errno.EADDRINUSE:
                    self._warn(exc)

    def _warn(self, exc: OSError) -> None:
        logger.warning("cannot remove the socket %s: %s", self.path, exc.strerror)


class UnixSocket(socket.socket):
    """A socket that says where clients find it; the kernel says where it was bound."""

    path: str | None = None

    def getsockname(self) -> Any:
        return super().getsockname() if self.path is None else self.path

    def dup(self) -> UnixSocket:
        duplicate = super().dup()
        duplicate.path = self.path
        return duplicate


def create_socket(descriptor: int | None = None) -> UnixSocket:
    sock = UnixSocket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=descriptor)
    sock.setblocking(False)
    return sock


def check(path: str) -> None:
    """Raise an `OSError` if it is plain already that a socket cannot appear there."""
    try:
        directory = os.path.dirname(path) or "."
        os.stat(os.path.join(directory, "."))
        # A program that has given up its privileges may have kept the real user.
        effective = os.access in os.supports_effective_ids
        if not os.access(directory, os.W_OK | os.X_OK, effective_ids=effective):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        with suppress(FileNotFoundError):
            if os.path.lexists(path):
                _find_socket(path)
            _check_unused(path)  # which also says whether the path is too long
    except OSError as exc:
        raise _cannot_listen(path, exc) from exc


def listen(sock: socket.socket, path: str, mode: int, backlog: int) -> SocketFile:
    """Bind a socket and let it listen; return its new file, which at no moment allows more than its mode."""
    try:
        with _PrivateDirectory(path) as private, ExitStack() as undo:
            with suppress(OSError):  # on Linux, the file then has this mode from the start
                os.fchmod(sock.fileno(), mode)
            sock.bind(private.address(private.name))
            created = os.lstat(private.name, dir_fd=private.descriptor)
            if stat.S_IMODE(created.st_mode) != mode:  # because of the umask
                os.chmod(private.name, mode, dir_fd=private.descriptor)
            sock.listen(backlog)

            file = SocketFile.of(created, path)
            undo.callback(file.remove)
            _put_in_place(private, path)
            undo.pop_all()
    except OSError as exc:
        raise _cannot_listen(path, exc) from exc
    if isinstance(sock, UnixSocket):
        sock.path = file.path
    return file


def _find_socket(path: str) -> os.stat_result:
    found = os.lstat(path)
    if not stat.S_ISSOCK(found.st_mode):
        what = "a link" if stat.S_ISLNK(found.st_mode) else "not a socket"
        raise OSError(errno.EADDRINUSE, f"the file there is {what}; it was left unchanged")
    return found


def _cannot_listen(path: str, exc: OSError) -> OSError:
    return OSError(exc.errno or errno.ENAMETOOLONG, f"cannot listen on {path}: {exc.strerror or exc}")


class _PrivateDirectory:
    """
    A directory beside a path, where only we can create or replace a file; it is removed when its block ends.

    It is used by its descriptor, so it does not matter if another program renames it, or replaces its name.
    """

    descriptor: int

    def __init__(self, path: str) -> None:
        directory, name = os.path.split(path)
        self.name = name if len(os.fsencode(name)) <= _LONGEST_NAME else "socket"
        self.path = os.path.join(directory, f".{os.urandom(4).hex()}")

    def __enter__(self) -> _PrivateDirectory:
        os.mkdir(self.path, 0o700)
        try:
            # O_PATH, since a umask may have taken the right to read it.
            self.descriptor = os.open(self.path, getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW)
        except BaseException:
            self._remove()
            raise
        found = os.fstat(self.descriptor)
        if found.st_uid == os.geteuid() and stat.S_IMODE(found.st_mode) & 0o700 != 0o700:
            with suppress(OSError):
                os.chmod(f"/proc/self/fd/{self.descriptor}", 0o700)
        if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
            self._close()
            raise OSError(errno.EACCES, "cannot make a directory beside it that nobody else can enter")
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # it has not been bound, or it was moved to its place
            os.unlink(self.name, dir_fd=self.descriptor)
        self._close()

    def _close(self) -> None:
        os.close(self.descriptor)
        self._remove()

    def _remove(self) -> None:
        with suppress(OSError):  # another program has renamed it
            os.rmdir(self.path)

    def address(self, name: str) -> str:
        """Return where to bind or connect to a socket in it: on Linux by the descriptor, which is short as well."""
        by_descriptor = f"/proc/self/fd/{self.descriptor}"
        return os.path.join(by_descriptor if os.path.isdir(by_descriptor) else self.path, name)

    def put(self, name: str, path: str) -> None:
        """Move a file from here to a path, unless a file exists there."""
        try:
            os.link(name, path, src_dir_fd=self.descriptor, follow_symlinks=False)
        except FileExistsError:
            raise
        except OSError:  # a directory, or a file system without hard links
            if os.path.lexists(path):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
            os.rename(name, path, src_dir_fd=self.descriptor)
        else:
            os.unlink(name, dir_fd=self.descriptor)


def _put_in_place(private: _PrivateDirectory, path: str) -> None:
    try:
        os.link(private.name, path, src_dir_fd=private.descriptor, follow_symlinks=False)
    except FileExistsError:
        with suppress(FileNotFoundError):
            _find_socket(path)
            _check_unused(path)
    except OSError:
        pass  # a file system without hard links
    else:
        return
    with _locked(path):
        _remove_stale(private, path)
        try:
            private.put(private.name, path)
        except FileExistsError:
            raise OSError(errno.EADDRINUSE, _OTHER_IS_FASTER) from None


def _remove_stale(private: _PrivateDirectory, path: str) -> None:
    """Remove a stale socket, or raise if the file is anything else."""
    moved = f"{private.name}~"
    try:
        expected = _find_socket(path)
        _check_unused(path)
        os.rename(path, moved, dst_dir_fd=private.descriptor)
    except FileNotFoundError:
        return  # another program has removed it
    found = os.lstat(moved, dir_fd=private.descriptor)
    with suppress(OSError):
        if _identity(found) == _identity(expected):
            _check_unused(private.address(moved))
            os.unlink(moved, dir_fd=private.descriptor)
            return
    try:
        private.put(moved, path)
    except OSError:
        where = os.path.join(private.path, moved)
        raise OSError(errno.EADDRINUSE, f"two other programs have just created a file there; one is {where}") from None
    raise OSError(errno.EADDRINUSE, _OTHER_IS_FASTER)


def _identity(found: os.stat_result) -> tuple[int, ...]:
    # With its type and time, since a new file may get the inode of a stale socket that was removed.
    return found.st_dev, found.st_ino, stat.S_IFMT(found.st_mode), found.st_mtime_ns


@contextmanager
def _locked(path: str) -> Iterator[None]:
    """Exclude all others that want to remove a stale socket at a path; an `OSError` says that another one does."""
    directory, name = os.path.split(path)
    lock = os.path.join(directory, f".{name}.lock")
    descriptor = _lock(lock)
    try:
        yield
    finally:
        with suppress(OSError):
            os.unlink(lock)
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # not left to close(): a fork may have a copy, which holds the lock
        os.close(descriptor)


def _lock(path: str) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        with ExitStack() as undo:
            undo.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                # It gets the path, or finds a server that listens there. It takes no time, but a loop cannot wait.
                raise OSError(errno.EADDRINUSE, "another server is just starting there") from None
            except OSError:
                pass  # a file system without locks
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.lstat(path)):
                    undo.pop_all()
                    return descriptor
            # Its last owner has removed it in the meantime, so it excludes nobody.


def _check_unused(path: str) -> None:
    """Raise an `OSError` if a socket is not stale, or may be connected to by others only."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        code = probe.connect_ex(path)
    # It is in use, too, if its queue is full, or if it is of another type, such as datagrams.
    if code in (0, errno.EAGAIN, errno.EINPROGRESS, errno.EPROTOTYPE):
        raise OSError(errno.EADDRINUSE, "another server is listening there")
    if code != errno.ECONNREFUSED:
        raise OSError(code, os.strerror(code))
