"""
What a server says about itself: what it is doing, and how it was closed.

(A dataclass would take a millisecond at the import.)
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from types import FrameType, SimpleNamespace
from typing import Any
from urllib.parse import quote

from aioserve._public import public

_ASYNCIO = asyncio.__file__.removesuffix("__init__.py")


@public
class Stats(SimpleNamespace):
    """What a server is doing and has done, at the moment of asking."""

    connections: int
    """Open connections, idle ones and WebSockets included."""
    in_flight: int
    """Requests and WebSockets whose handler is running."""
    served: int
    """HTTP responses completed since the start."""


@public
class UnfinishedHandler(SimpleNamespace):
    """A handler that was still running when its time was over."""

    method: str
    """The request's method; ``"WEBSOCKET"`` for a WebSocket; ``"?"`` where a task factory hides the request."""
    path: str
    """The request's path, without the query string; ``"?"`` where it is not known."""
    client: tuple[str, int] | None
    """The client's address and port; `None` where it has none, as on a Unix socket."""
    where: tuple[str, ...]
    """The coroutines that were waiting for each other, outermost first, each with its file and line."""
    stuck: bool
    """Whether the handler was cancelled and was still running when the server had closed."""

    def __str__(self) -> str:
        # Quoted as in uvicorn's access log, so that no client can write a line of its own, or control a terminal.
        request = f"{_quoted(self.method)} {_quoted(self.path)}"
        client = _quoted(":".join(map(str, self.client))) if self.client else "?"
        inner = [each for each in self.where if f"({_ASYNCIO}" not in each] or self.where
        where = f" in {inner[-1]}" if inner else ""
        return f"{request} from {client}{where}{', which is still running' if self.stuck else ''}"


@public
class Report(SimpleNamespace):
    """How a server was closed."""

    duration: float
    """Seconds from the moment the stop was asked for until the end."""
    aborted: int
    """Connections that were dropped."""
    disconnected: tuple[UnfinishedHandler, ...]
    """Handlers that were told of a disconnect because the time was over, and then ended by themselves."""
    cancelled: tuple[UnfinishedHandler, ...]
    """Handlers that were cancelled because the time was over."""
    lifespan_stuck: bool
    """Whether the app's lifespan was cancelled and was still running when the server had closed."""

    def __init__(
        self,
        duration: float = 0.0,
        aborted: int = 0,
        disconnected: tuple[UnfinishedHandler, ...] = (),
        cancelled: tuple[UnfinishedHandler, ...] = (),
        lifespan_stuck: bool = False,
    ) -> None:
        self.duration = duration
        self.aborted = aborted
        self.disconnected = disconnected
        self.cancelled = cancelled
        self.lifespan_stuck = lifespan_stuck

    @property
    def was_forced(self) -> bool:
        """Whether anything had to be forced."""
        return bool(self.aborted or self.disconnected or self.cancelled or self.lifespan_stuck)

    def summary(self, name: str = "") -> str:
        """Say in one line what had to be forced, and which handlers these were; with the name of the server first."""
        line = (
            f"{name}{': ' if name else ''}forced shutdown: {_count(len(self.disconnected), 'handler')} disconnected, "
            f"{len(self.cancelled)} cancelled, {_count(self.aborted, 'connection')} dropped"
        )
        handlers = [*self.cancelled, *self.disconnected]
        shown = [*map(str, handlers[:5]), *(["..."] if len(handlers) > 5 else [])]
        return f"{line} ({'; '.join(shown)})" if shown else line


def _quoted(text: str) -> str:
    return quote(text, safe="/?:@[]!$&'()*+,;=", errors="backslashreplace")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def unfinished_handler(scope: dict[str, Any], task: asyncio.Task[Any]) -> UnfinishedHandler:
    return UnfinishedHandler(
        method=scope.get("method") or ("WEBSOCKET" if scope.get("type") == "websocket" else "?"),
        path=scope.get("path", "?"),
        client=scope.get("client"),
        where=_await_chain(task.get_coro()),
        stuck=False,
    )


def _await_chain(coroutine: object) -> tuple[str, ...]:
    chain: dict[FrameType, str] = {}
    while (frame := frame_of(coroutine)) is not None and frame not in chain:
        name = getattr(coroutine, "__qualname__", frame.f_code.co_qualname)
        chain[frame] = f"{name} ({frame.f_code.co_filename}:{frame.f_lineno})"
        awaited = awaited_by(coroutine)
        # A coroutine that has not begun may be one that a task factory has put around another one.
        coroutine = next(coroutines_held_by(frame), None) if awaited is None else awaited
    return tuple(chain.values())


# What coroutines tell: also those of generators and of Cython, and nothing where they are something else.


def frame_of(coroutine: object) -> FrameType | None:
    return _first_of(coroutine, "cr_frame", "gi_frame", "ag_frame")  # type: ignore[no-any-return]


def awaited_by(coroutine: object) -> object:
    return _first_of(coroutine, "cr_await", "gi_yieldfrom", "ag_await")


def _first_of(coroutine: object, *names: str) -> Any:
    values = (getattr(coroutine, name, None) for name in names)
    return next((value for value in values if value is not None), None)


def coroutines_held_by(frame: FrameType) -> Iterator[object]:
    """The coroutines in the variables of a function, and in those of the functions around it that it uses."""
    return (value for value in frame.f_locals.values() if hasattr(type(value), "cr_frame"))
