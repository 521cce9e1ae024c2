"""
What a server says about itself: what it is doing, and how it was closed.

(A dataclass would take a millisecond at the import.)
"""

from __future__ import annotations

import asyncio
import functools
import gc
import itertools
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import AsyncGeneratorType, FrameType, SimpleNamespace
from typing import Any
from urllib.parse import quote

from aioserve import _limits
from aioserve._errors import public

_LIBRARIES = sys.stdlib_module_names | {"aioserve", "anyio", "fastapi", "starlette", "uvicorn", "uvloop"}
SHOWN = 5  # handlers in one line
_IN_THREAD = ("run_sync_in_worker_thread", "to_thread")  # anyio's and asyncio's


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

    def __repr__(self) -> str:
        shown = (f"{name}={value!r}" for name, value in vars(self).items() if name != "where")  # which is long
        return f"aioserve.UnfinishedHandler({', '.join(shown)})"

    def __str__(self) -> str:
        # Quoted as in uvicorn's access log, so that no client can write a line of its own, or control a terminal.
        request = f"{_quoted(self.method)} {_quoted(self.path)}"
        route = None if self.route == self.path or not self.route else f"route {self.route}"
        names = ", ".join(each for each in (route, self.endpoint) if each)
        named = f" ({_printable(names)})" if names else ""
        client = _quoted(":".join(map(str, self.client))) if self.client else "?"
        line = self.line or (None if self.in_thread else next(reversed(self.where), None))
        waiting = f", waiting at {_printable(line)}" if line else ""
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


def describe_handlers(handlers: Iterable[UnfinishedHandler]) -> str:
    """Describe the first five of them."""
    described = [*map(str, itertools.islice(handlers, SHOWN + 1))]
    return "; ".join([*described[:SHOWN], *(["..."] if len(described) > SHOWN else [])])


def _quoted(text: str) -> str:
    return quote(text, safe="/?:@[]!$&'()*+,;=", errors="backslashreplace")


def _printable(text: str) -> str:
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def unfinished_handler(scope: Mapping[str, Any], task: asyncio.Task[Any]) -> UnfinishedHandler:
    """Describe a handler. It never raises, whatever the program has put into its scope and variables."""
    try:
        return _describe(scope, task)
    except Exception:  # noqa: BLE001
        return UnfinishedHandler(method="?", path="?", client=None, where=(), stuck=False)


def _describe(scope: Mapping[str, Any], task: asyncio.Task[Any]) -> UnfinishedHandler:
    frames = frames_of(task)
    # A middleware may have copied the scope before the framework put its route there.
    scopes = (_variable(frame, "scope") for frame in reversed(frames))
    routed = next((each for each in scopes if type(each) is dict and "endpoint" in each), scope)
    is_websocket = scope.get("type") == "websocket"
    return UnfinishedHandler(
        method=_text(scope.get("method")) or ("WEBSOCKET" if is_websocket else "?"),
        path=_text(scope.get("path")) or "?",
        client=_client(scope.get("client")),
        route=_guarded(lambda: _route_of(routed, scope["path"])),
        endpoint=_guarded(lambda: _name_of(routed["endpoint"])),
        line=own_line(frames),
        where=tuple(frames.values()),
        in_thread=is_in_thread(frames),
        stuck=False,
    )


def _guarded(get: Callable[[], str | None]) -> str | None:
    try:
        return get()
    except Exception:  # noqa: BLE001 (an object of the program's can be anything)
        return None


def _text(value: object) -> str | None:
    return str.__str__(value) if isinstance(value, str) else None  # without what a derived class may have changed


def _client(value: Any) -> tuple[str, int] | None:
    if isinstance(value, (tuple, list)) and len(value) == 2 and isinstance(value[0], str):
        return value[0], value[1] if isinstance(value[1], int) else 0
    return None


def _route_of(scope: Mapping[str, Any], path: str) -> str | None:
    """The whole template of a path, also where the route has only the end of it, as below a prefix or a mount."""
    template = _text(scope["route"].path)
    values = scope.get("path_params", {})
    end = re.sub(r"{(\w+)(?::\w+)?}", lambda found: str(values[found[1]]), template or "")
    return path.removesuffix(end) + template if template and path.endswith(end) else None


def _name_of(endpoint: object) -> str | None:
    """The module and name of a function or a class; of another object those of its class."""
    if endpoint is None:
        return None
    while isinstance(endpoint, functools.partial):
        endpoint = endpoint.func
    named = endpoint if hasattr(endpoint, "__qualname__") else type(endpoint)
    return f"{getattr(named, '__module__', '?')}.{getattr(named, '__qualname__', '?')}"


# Where a task waits.


def frames_of(task: asyncio.Task[Any]) -> dict[FrameType, str]:
    """
    The frames of the coroutines that wait for each other, outermost first, each with its name, file and line.

    They go on into another task that the last of them waits for: alone, in a group, or by `asyncio.gather()`.
    (`asyncio.capture_call_graph()` of Python 3.14 looks for that among all tasks of a program, which takes too long.)
    """
    return _frames_of(task, [])


def _frames_of(task: asyncio.Task[Any], seen: list[asyncio.Task[Any]]) -> dict[FrameType, str]:
    seen.append(task)
    frames = {} if task.done() else _frames_of_coroutine(task.get_coro())
    inner: dict[FrameType, str] = {}
    for each in _inner_tasks(task, frames):
        if len(seen) == _limits.INNER_TASKS or own_line(inner):
            break  # of several, one that is at a line of the program's says most
        if not any(each is known for known in seen):
            inner = _frames_of(each, seen) or inner
    return frames | inner


def _frames_of_coroutine(coroutine: object) -> dict[FrameType, str]:
    frames: dict[FrameType, str] = {}
    while (frame := frame_of(coroutine)) is not None and frame not in frames and len(frames) < _limits.FRAMES:
        name = _text(_first_of(coroutine, "__qualname__")) or frame.f_code.co_qualname
        frames[frame] = f"{name} ({frame.f_code.co_filename}:{frame.f_lineno})"
        awaited = _generator_of(awaited_by(coroutine))
        # A coroutine that has not begun may be one that a task factory has put around another one.
        coroutine = next(coroutines_held_by(frame), None) if awaited is None else awaited
    return frames


def _inner_tasks(task: asyncio.Task[Any], frames: Iterable[FrameType]) -> Iterator[asyncio.Task[Any]]:
    """The tasks that a task waits for."""
    waited_for = getattr(task, "_fut_waiter", None)
    tasks = [waited_for, *getattr(waited_for, "_children", ())]  # those of `asyncio.gather()`
    for frame in frames:
        if frame.f_code.co_name in ("__aexit__", "_aexit") and _package_of(frame) in ("anyio", "asyncio"):
            tasks += getattr(_variable(frame, "self"), "_tasks", ())
        elif frame.f_globals.get("__name__") in ("starlette.middleware.base", "starlette.responses"):
            # It waits for a message, and its work is done by another task.
            tasks += getattr(_variable(frame, "task_group"), "_tasks", ())
    return (each for each in tasks if isinstance(each, asyncio.Task) and not each.done())


def own_line(frames: dict[FrameType, str]) -> str | None:
    """The innermost of these that belongs neither to Python, nor to a library that stands around every app."""
    own = (line for frame, line in reversed(frames.items()) if _package_of(frame) not in _LIBRARIES)
    return next(own, None)


def is_in_thread(frames: Iterable[FrameType]) -> bool:
    """Whether they wait for a thread, which no cancellation ends."""
    return any(frame.f_code.co_name in _IN_THREAD and _package_of(frame) in _LIBRARIES for frame in frames)


def awaited_thread(task: asyncio.Task[Any]) -> asyncio.Future[Any] | None:
    """What a task waits for, by itself or by another task, until a thread is done; `None` if it waits for none."""
    tasks = [task]
    for each in tasks:
        frames = {} if each.done() else _frames_of_coroutine(each.get_coro())
        innermost = next(reversed(frames), None)  # further out, it would wait for its turn to use a thread
        if innermost is not None and is_in_thread([innermost]) and not _variable(innermost, "abandon_on_cancel"):
            return getattr(each, "_fut_waiter", None)
        tasks += [inner for inner in _inner_tasks(each, frames) if not any(inner is known for known in tasks)]
        del tasks[_limits.INNER_TASKS :]
    return None


def _package_of(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__")).partition(".")[0]


def line_of(task: asyncio.Task[Any]) -> str | None:
    """The innermost line of the program's own that a task waits at; where there is none, the innermost of all."""

    def line() -> str | None:
        frames = frames_of(task)
        return own_line(frames) or next(reversed(frames.values()), None)

    return _guarded(line)


def _variable(frame: FrameType, name: str) -> object:
    # Asked first, since Python 3.11 and 3.12 keep a copy of the variables when they are looked at.
    code = frame.f_code
    return frame.f_locals.get(name) if name in code.co_varnames or name in code.co_freevars else None


# What coroutines tell: also those of generators and of Cython, and nothing where they are something else.


def frame_of(coroutine: object) -> FrameType | None:
    found = _first_of(coroutine, "cr_frame", "gi_frame", "ag_frame")
    return found if type(found) is FrameType else None


def awaited_by(coroutine: object) -> object:
    return _first_of(coroutine, "cr_await", "gi_yieldfrom", "ag_await")


def _generator_of(awaited: object) -> object:
    """The generator of an `async for`, where the await is for its next item: that object does not name it."""
    if type(awaited).__name__ in ("async_generator_asend", "async_generator_athrow", "anext_awaitable"):
        return next((each for each in gc.get_referents(awaited) if isinstance(each, AsyncGeneratorType)), awaited)
    return awaited


def _first_of(coroutine: object, *names: str) -> Any:
    try:
        values = [getattr(coroutine, name, None) for name in names]
    except Exception:  # noqa: BLE001 (an awaitable of the program's can be anything)
        return None
    return next((value for value in values if value is not None), None)


def coroutines_held_by(frame: FrameType) -> Iterator[object]:
    """The coroutines in the variables of a function, and in those of the functions around it that it uses."""
    return (value for value in frame.f_locals.values() if hasattr(type(value), "cr_frame"))
