"""
Closes connections whose clients are still sending, without a reset.

The kernel answers with a reset what arrives on a socket that is closed, or what nobody has read when it is closed; and
a reset takes back what is still on its way to the client. So a duplicate of the socket stays open behind its transport:
our side is shut down, and what comes is thrown away, until the client closes as well. (RFC 9112, 9.6.)
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

from aioserve import _limits
from aioserve._log import logger
from aioserve._net import forks
from aioserve._net.transports import descriptor


class LingeringSockets:
    """The sockets whose transports are closed, or about to, and whose clients may still be sending."""

    def __init__(self, loop: asyncio.AbstractEventLoop, *, on_end: Callable[[], object]) -> None:
        self._loop = loop
        self._on_end = on_end
        self._sockets: dict[Any, _LingeringSocket] = {}

    def __len__(self) -> int:
        return len(self._sockets)

    def __contains__(self, raw: object) -> bool:
        return raw in self._sockets

    def begin(self, raw: Any, seconds: float) -> None:
        """
        Keep the socket of a raw transport open, which does not read any more, and throw away what comes.

        It ends when nothing has come for so many seconds.
        """
        if raw not in self._sockets:
            try:
                number = descriptor(raw)
                self._sockets[raw] = _LingeringSocket(self._loop, number, seconds, lambda: self._end(raw))
            except OSError as exc:
                logger.debug("cannot linger on a connection: %s", exc)  # it is gone, or no descriptor is left

    def shut_down(self, raw: Any) -> None:
        """Shut down our side, since all is written that was to be written; from here on, it is limited in time."""
        if raw in self._sockets:
            self._sockets[raw].shut_down()

    def close(self) -> None:
        for raw in list(self._sockets):
            self._end(raw)

    def _end(self, raw: Any) -> None:
        if lingering := self._sockets.pop(raw, None):
            lingering.close()
            self._on_end()


class _LingeringSocket:
    _timer: asyncio.TimerHandle | None = None

    def __init__(self, loop: Any, number: int, seconds: float, on_end: Callable[[], None]) -> None:
        self._loop = loop
        self._seconds = seconds
        self._on_end = on_end
        with forks.lock:
            self._socket = socket.socket(fileno=socket.dup(number))
            self._socket.setblocking(False)  # the program may have set a default timeout
            forks.track(self._socket)
        self._loop.add_reader(self._socket.fileno(), self.read)

    def read(self) -> None:
        """Read what has come, but not so much that the loop stands still."""
        try:
            for _ in range(_limits.LINGER_READS):
                if not self._socket.recv_into(_trash):
                    self._on_end()
                    return
                self._last_read = self._loop.time()
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            self._on_end()  # the client has reset it

    def shut_down(self) -> None:
        if self._timer is not None:
            return
        self._began = self._last_read = self._loop.time()
        self._timer = self._loop.call_later(min(self._seconds, _limits.LINGER_LONGEST), self._look)
        try:
            self._socket.shutdown(socket.SHUT_WR)
        except OSError:
            self._on_end()  # the client has reset it

    def _look(self) -> None:
        now = self._loop.time()
        until = min(self._last_read + self._seconds, self._began + _limits.LINGER_LONGEST)
        if now >= until:
            self._on_end()
        else:
            self._timer = self._loop.call_at(until, self._look)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._loop.remove_reader(self._socket.fileno())
        with forks.lock:
            self._socket.close()


_trash = bytearray(65536)  # shared, since nobody looks at it
