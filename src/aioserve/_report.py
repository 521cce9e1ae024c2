"""
What a server says about itself: what it is doing, and how it was closed.

(A dataclass would take a millisecond at the import.)
"""

from __future__ import annotations

import asyncio
import functools
import gc
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType, MappingProxyType, SimpleNamespace
from typing import Any
from urllib.parse import quote

from aioserve._errors import public

_LIBRARIES = sys.stdlib_module_names | {"aioserve", "anyio", "fastapi", "starlette", "uvicorn", "uvloop"}
_IN_THREAD = ("run_sync_in_worker_thread", "to_thread")  # anyio's and asyncio's

InnerTasks = Mapping[asyncio.Task[Any], Sequence[asyncio.Task[Any]]]
"""The tasks that each task waits for, as a task group does."""


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
    route: str | None = None
    """The path of the framework's route, like ``"/items/{item_id}"``; `None` where the scope has no `route`."""
    endpoint: str | None = None
    """The function of that route, like ``"main.read_item"``; `None` where the scope has no `endpoint`."""
    line: str | None = None
    """The innermost line of the program's own that it waits at; `None` where only libraries are waiting."""
    where: tuple[str, ...]
    """The coroutines that wait for each other, outermost first, each with its file and line."""
    in_thread: bool = False
    """Whether it waits for a thread, as a synchronous endpoint does; no cancellation ends that."""
    stuck: bool
    """Whether the handler was cancelled and was still running when the server had closed."""

    def __str__(self) -> str:
        # Quoted as in uvicorn's access log, so that no client can write a line of its own, or control a terminal.
        request = f"{_quoted(self.method)} {_quoted(self.path)}"
        route = None if self.route == self.path else self.route
        names = [*([f"route {route}"] if route else []), *([self.endpoint] if self.endpoint else [])]
        named = f" ({', '.join(names)})" if names else ""
        client = _quoted(":".join(map(str, self.client))) if self.client else "?"
        line = self.line or (None if self.in_thread else next(reversed(self.where), None))
        waiting = f", waiting at {line}" if line else ""
        thread = ", in a thread, which goes on" if self.in_thread else ""
        return f"{request}{named} from {client}{waiting}{thread}{', which is still running' if self.stuck else ''}"


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
        line = f"{name}{': ' if name else ''}forced shutdown: {self._counts()}"
        handlers = self._handlers()
        return f"{line} ({handlers})" if handlers else line

    def summary_of_test(self, url: str) -> str:
        """Say it for the report of a test, where the handlers matter, and the port is a random one."""
        handlers = self._handlers()
        return f"{handlers}{': ' if handlers else ''}forced shutdown of {url}: {self._counts()}"

    def _counts(self) -> str:
        return (
            f"{count(len(self.disconnected), 'handler')} disconnected, {len(self.cancelled)} cancelled, "
            f"{count(self.aborted, 'connection')} dropped"
        )

    def _handlers(self) -> str:
        return describe_handlers([*self.cancelled, *self.disconnected])


def describe_handlers(handlers: Sequence[UnfinishedHandler]) -> str:
    return "; ".join([*map(str, handlers[:5]), *(["..."] if len(handlers) > 5 else [])])


def _quoted(text: str) -> str:
    return quote(text, safe="/?:@[]!$&'()*+,;=", errors="backslashreplace")


def count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def unfinished_handler(
    scope: Mapping[str, Any], task: asyncio.Task[Any], inner_tasks: InnerTasks = MappingProxyType({})
) -> UnfinishedHandler:
    frames = frames_of(task, inner_tasks)
    # A middleware may have copied the scope before the framework put its route there.
    scopes = (variable(frame, "scope") for frame in reversed(frames))
    routed = next((each for each in scopes if isinstance(each, dict) and "endpoint" in each), scope)
    return UnfinishedHandler(
        method=scope.get("method") or ("WEBSOCKET" if scope.get("type") == "websocket" else "?"),
        path=scope.get("path", "?"),
        client=scope.get("client"),
        route=_text(getattr(routed.get("route"), "path", None)),
        endpoint=_name_of(routed.get("endpoint")),
        line=own_line(frames),
        where=tuple(frames.values()),
        in_thread=is_in_thread(frames),
        stuck=False,
    )


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _name_of(endpoint: object) -> str | None:
    """The module and name of a function or a class; of another object those of its class."""
    if endpoint is None:
        return None
    while isinstance(endpoint, functools.partial):
        endpoint = endpoint.func
    named = endpoint if hasattr(endpoint, "__qualname__") else type(endpoint)
    return f"{getattr(named, '__module__', '?')}.{getattr(named, '__qualname__', '?')}"


# Where a task waits.


def frames_of(task: asyncio.Task[Any], inner_tasks: InnerTasks) -> dict[FrameType, str]:
    """The frames of the coroutines that wait for each other, outermost first, each with its name, file and line."""
    frames: dict[FrameType, str] = {}
    tasks = [task]
    for each in tasks:
        coroutine: object = each.get_coro()
        while (frame := frame_of(coroutine)) is not None and frame not in frames:
            name = getattr(coroutine, "__qualname__", frame.f_code.co_qualname)
            frames[frame] = f"{name} ({frame.f_code.co_filename}:{frame.f_lineno})"
            awaited = _generator_of(awaited_by(coroutine))
            # A coroutine that has not begun may be one that a task factory has put around another one.
            coroutine = next(coroutines_held_by(frame), None) if awaited is None else awaited
        inner = [*inner_tasks.get(each, ()), *_tasks_in_groups(frames)]
        tasks += [found for found in inner if found not in tasks][-1:]  # the youngest, if there are several
    return frames


def _tasks_in_groups(frames: dict[FrameType, str]) -> list[asyncio.Task[Any]]:
    """The tasks of the groups that are in variables: a middleware waits for messages of such a task, not for itself."""
    values = (value for frame in frames for value in frame.f_locals.values())
    groups = (value for value in values if type(value).__name__ == "TaskGroup" and _is_of_library(type(value)))
    return [task for group in groups for task in getattr(group, "_tasks", ()) if isinstance(task, asyncio.Task)]


def _is_of_library(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in ("anyio", "asyncio")


def find_inner_tasks() -> InnerTasks:
    """Find what each task of the running loop waits for; Python tells it since 3.14."""
    inner: dict[asyncio.Task[Any], list[asyncio.Task[Any]]] = {}
    if sys.version_info >= (3, 14):
        for task in asyncio.all_tasks():
            graph = asyncio.capture_call_graph(task)
            for waiting in graph.awaited_by if graph is not None else ():
                inner.setdefault(waiting.future, []).append(task)
    return inner


def own_line(frames: dict[FrameType, str]) -> str | None:
    """The innermost of these that belongs neither to Python, nor to a library that stands around every app."""
    own = (line for frame, line in reversed(frames.items()) if _package_of(frame) not in _LIBRARIES)
    return next(own, None)


def is_in_thread(frames: dict[FrameType, str]) -> bool:
    """Whether they wait for a thread, which no cancellation ends."""
    return any(frame.f_code.co_name in _IN_THREAD and _package_of(frame) in _LIBRARIES for frame in frames)


def _package_of(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__")).partition(".")[0]


def line_of(task: asyncio.Task[Any]) -> str | None:
    """The innermost line of the program's own that a task waits at; where there is none, the innermost of all."""
    frames = frames_of(task, find_inner_tasks())
    return own_line(frames) or next(reversed(frames.values()), None)


# What coroutines tell: also those of generators and of Cython, and nothing where they are something else.


def frame_of(coroutine: object) -> FrameType | None:
    return _first_of(coroutine, "cr_frame", "gi_frame", "ag_frame")  # type: ignore[no-any-return]


def awaited_by(coroutine: object) -> object:
    return _first_of(coroutine, "cr_await", "gi_yieldfrom", "ag_await")


def _generator_of(awaited: object) -> object:
    """The generator of an `async for`, where the await is for its next item: that object does not name it."""
    if type(awaited).__name__ in ("async_generator_asend", "async_generator_athrow", "anext_awaitable"):
        return next((each for each in gc.get_referents(awaited) if hasattr(each, "ag_frame")), awaited)
    return awaited


def _first_of(coroutine: object, *names: str) -> Any:
    values = (getattr(coroutine, name, None) for name in names)
    return next((value for value in values if value is not None), None)


def variable(frame: FrameType, name: str) -> object:
    return frame.f_locals.get(name)


def coroutines_held_by(frame: FrameType) -> Iterator[object]:
    """The coroutines in the variables of a function, and in those of the functions around it that it uses."""
    return (value for value in frame.f_locals.values() if hasattr(type(value), "cr_frame"))
