"""The header "connection: close" on the last response of a connection, from when a stop is asked for."""

from __future__ import annotations

from typing import Any

from aioserve._uvicorn.logs import pass_on_interrupts
from aioserve._uvicorn.protocols import Observer, is_http, unanswered_cycles

CLOSE = (b"connection", b"close")


def announce_close(connection: Any, observer: Observer) -> int:
    """
    Let every response of an HTTP connection that has not begun yet say "connection: close".

    Return how many handlers it has; an interrupt in one of them is passed on from here.
    """
    if not is_http(connection):
        pass_on_interrupts(connection)
        return 1
    if isinstance(connection.server_state, ClosingState):
        return 0
    connection.server_state = state = ClosingState(connection, observer)
    cycles = unanswered_cycles(connection)
    for cycle in cycles:
        cycle.default_headers = state.default_headers
        pass_on_interrupts(cycle)
    return len(cycles)


def has_answered_since(connection: Any) -> bool:
    """Whether an HTTP connection has had a request in flight since its close was announced."""
    return connection.cycle is not None and isinstance(connection.cycle.default_headers, ClosingHeaders)


class ClosingState:
    """
    Takes the place of uvicorn's state for one connection that is to close.

    So a request costs nothing for it before a stop is asked for.
    """

    def __init__(self, connection: Any, observer: Observer) -> None:
        self._connection = connection
        self._observer = observer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._observer.state, name)

    @property
    def default_headers(self) -> list[tuple[bytes, bytes]]:
        self._observer.progress_made(self._connection)
        return ClosingHeaders(self._connection, self._observer)

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
