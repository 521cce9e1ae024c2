"""What tells a client, from when a stop is asked for, that its connection closes: "connection: close", or a GOAWAY."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aioserve._uvicorn.http2 import is_undecided
from aioserve._uvicorn.logs import pass_on_interrupts
from aioserve._uvicorn.protocols import is_http, unanswered_cycles

if TYPE_CHECKING:
    from aioserve._uvicorn.protocols import Observer

CLOSE = (b"connection", b"close")


class ClosingState:
    """
    Takes the place of uvicorn's state for one connection that is to close.

    So a request costs nothing for it before a stop is asked for.
    """

    has_answered: bool = False  # a request was in flight since then

    def __init__(self, connection: Any, observer: Observer) -> None:
        self._connection = connection
        self._observer = observer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._observer.state, name)

    def headers(self) -> list[tuple[bytes, bytes]]:
        return ClosingHeaders(self._connection, self._observer)

    @property
    def default_headers(self) -> list[tuple[bytes, bytes]]:
        """Read when a request has come."""
        self.has_answered = True
        self._observer.progress_made(self._connection)
        return self.headers()

    @property
    def total_requests(self) -> int:
        return self._observer.state.total_requests

    @total_requests.setter
    def total_requests(self, value: int) -> None:
        self._observer.state.total_requests = value
        self._observer.progress_made(self._connection)


class ClosingHeaders(list[tuple[bytes, bytes]]):
    """
    The default headers, to which "connection: close" is added when a response begins.

    Not in an answer to an upgrade (101), nor where the client has sent more requests already: none of these would be
    answered. (RFC 9112, 9.6.)
    """

    def __init__(self, connection: Any, observer: Observer) -> None:
        super().__init__(observer.state.default_headers)
        self._connection = connection
        self._observer = observer

    def __add__(self, others: Any) -> Any:
        connection = self._connection
        self._observer.progress_made(connection)
        is_upgraded = connection not in connection.connections
        if is_upgraded or self._observer.has_more_requests(connection):
            return [*self, *others]
        return [*self, *(each for each in others if each[0].lower() != CLOSE[0]), CLOSE]


def announce_close(connection: Any, observer: Observer, state_class: type[ClosingState]) -> int:
    """
    Let every response of an HTTP/1 connection that has not begun yet say "connection: close".

    The state takes the place of uvicorn's. Return how many handlers the connection has; an interrupt in one of them is
    passed on from here.
    """
    if not is_http(connection):
        pass_on_interrupts(connection)
        return 1
    if is_undecided(connection) or isinstance(connection.server_state, ClosingState):
        return 0
    connection.server_state = state = state_class(connection, observer)
    cycles = unanswered_cycles(connection)
    for cycle in cycles:
        cycle.default_headers = state.default_headers
        pass_on_interrupts(cycle)
    return len(cycles)


def has_answered_since(connection: Any) -> bool:
    """Whether an HTTP connection has had a request in flight since its close was announced."""
    return getattr(connection.server_state, "has_answered", False)
