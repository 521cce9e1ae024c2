"""
asyncio's own loop and transports for Windows, on a system without its completion ports.

`BaseProactorEventLoop` is all that Windows has but for the completion ports. `SelectorProactor` stands in for these: an
operation is begun, and its future is done in a later turn of the loop. As on Windows, such a loop has no
`add_reader()`, `add_writer()`, `add_signal_handler()`, and nothing of Unix.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import os
import select
import selectors
import socket
import sys
from asyncio.proactor_events import BaseProactorEventLoop
from collections import deque
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

SO_COOKIE = 57  # asm-generic/socket.h; the same for all duplicates of a socket
REGISTERED: set[bytes] = set()

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


class Operation(asyncio.Future[Any]):
    """The future of an operation; to cancel it is to take the operation back."""

    def __init__(self, proactor: SelectorProactor, number: int, event: int, act: Callable[[], Any]) -> None:
        super().__init__(loop=proactor.loop)
        self.proactor, self.number, self.event, self.act = proactor, number, event, act

    def cancel(self, msg: Any = None) -> bool:
        self.proactor.forget(self)
        return super().cancel(msg)

    def try_it(self) -> None:
        """Do it, if that is possible without blocking."""
        try:
            result = self.act()
        except (BlockingIOError, InterruptedError):
            return
        except OSError as exc:
            self.proactor.forget(self)
            self.set_exception(exc)
        else:
            self.proactor.forget(self)
            self.set_result(result)


class SelectorProactor:
    """What `BaseProactorEventLoop` asks of a proactor."""

    loop: BaseProactorEventLoop

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._registered: WeakSet[socket.socket] = WeakSet()
        self._waiting: dict[tuple[int, int], deque[Operation]] = {}

    def set_loop(self, loop: BaseProactorEventLoop) -> None:
        self.loop = loop

    def select(self, timeout: float | None = None) -> list[Any]:
        """Wait until an operation is done; what is done has been told to its future, so nothing is returned."""
        for key, events in self._selector.select(timeout):
            for event in (READ, WRITE):
                if events & event and (waiting := self._waiting.get((key.fd, event))):
                    waiting[0].try_it()
        return []

    def recv(self, conn: socket.socket, nbytes: int, flags: int = 0) -> Operation:
        return self._begin(conn, READ, lambda: conn.recv(nbytes, flags))

    def recv_into(self, conn: socket.socket, buf: Any, flags: int = 0) -> Operation:
        return self._begin(conn, READ, lambda: conn.recv_into(buf, 0, flags))

    def send(self, conn: socket.socket, buf: Any, flags: int = 0) -> Operation:
        rest = memoryview(bytes(buf))

        def act() -> int:
            nonlocal rest
            while rest:  # on Windows, it is done when everything is sent
                rest = rest[conn.send(rest, flags) :]
            return len(buf)

        return self._begin(conn, WRITE, act)

    def _register(self, listener: socket.socket) -> None:
        """Refuse a duplicate of a socket that was registered: Windows knows them both as one, and takes it once."""
        if sys.platform == "linux" and listener not in self._registered:
            self._registered.add(listener)
            cookie = listener.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8)
            if cookie in REGISTERED:
                raise OSError(errno.EINVAL, "The parameter is incorrect")  # its error 87
            REGISTERED.add(cookie)

    def accept(self, listener: socket.socket) -> Operation:
        self._register(listener)

        def act() -> tuple[socket.socket, Any]:
            if not select.select([listener], (), (), 0)[0]:
                raise BlockingIOError  # somebody else has taken it; on Windows, no accept() blocks
            number, address = listener._accept()  # type: ignore[attr-defined]  # as `socket.accept()` does
            # Made with a family alone, as on Windows.
            conn = socket.socket(listener.family, socket.SOCK_STREAM, 0, fileno=number)
            conn.setblocking(False)
            return conn, address

        async def accept_coro(future: Operation) -> None:
            await future

        accept_coro.__qualname__ = "IocpProactor.accept.<locals>.accept_coro"
        operation = self._begin(listener, READ, act)
        self.loop.create_task(accept_coro(operation))  # as asyncio does, which cancels the accept with it
        return operation

    def connect(self, conn: socket.socket, address: Any) -> Operation:
        begun = conn.connect_ex(address)

        def act() -> None:
            error = conn.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error == 0 and begun not in (0, errno.EINPROGRESS):
                error = begun
            if error:
                raise OSError(error, os.strerror(error))

        return self._begin(conn, WRITE, act)

    def _begin(self, sock: socket.socket, event: int, act: Callable[[], Any]) -> Operation:
        operation = Operation(self, sock.fileno(), event, act)
        key = (operation.number, event)
        waiting = self._waiting.setdefault(key, deque())
        waiting.append(operation)
        if len(waiting) == 1:
            self._watch(operation.number)
        return operation

    def forget(self, operation: Operation) -> None:
        """Let an operation go, which is over or cancelled."""
        key = (operation.number, operation.event)
        waiting = self._waiting.get(key, deque())
        if operation in waiting:
            waiting.remove(operation)
            if not waiting:
                del self._waiting[key]
                self._watch(operation.number)

    def _watch(self, number: int) -> None:
        events = sum(event for event in (READ, WRITE) if (number, event) in self._waiting)
        try:
            self._selector.unregister(number)
        except KeyError:
            pass
        if events:
            self._selector.register(number, events)

    def _stop_serving(self, sock: socket.socket) -> None:
        for operation in list(self._waiting.get((sock.fileno(), READ), ())):
            operation.cancel()

    def close(self) -> None:
        self._selector.close()


@functools.cache
def windows_class(kind: type[socket.socket]) -> Any:
    """Make a class of sockets for which it is no error to be shut down when the client has gone, as on Windows."""

    class WindowsSocket(kind):  # type: ignore[misc, valid-type]
        __slots__ = ()

        def shutdown(self, how: int) -> None:
            try:
                super().shutdown(how)
            except OSError as exc:
                if exc.errno != errno.ENOTCONN:
                    raise

    return WindowsSocket


class PortableLoop(BaseProactorEventLoop):
    """asyncio's loop for Windows, as `ProactorEventLoop` makes it."""

    _self_reading_future: Any

    def __init__(self) -> None:
        super().__init__(SelectorProactor())

    def _make_socket_transport(self, sock: socket.socket, *args: Any, **kwargs: Any) -> Any:
        kind: Any = sock.__class__
        sock.__class__ = windows_class(kind)
        return super()._make_socket_transport(sock, *args, **kwargs)  # type: ignore[misc]  # typeshed leaves it out

    def run_forever(self) -> None:
        self.call_soon(self._loop_self_reading)  # type: ignore[attr-defined]
        try:
            super().run_forever()
        finally:
            if self._self_reading_future is not None:
                self._self_reading_future.cancel()
                self._self_reading_future = None
