"""Where a task waits: its coroutines and their frames, and of these the innermost line that is the program's own."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

_LIBRARIES = sys.stdlib_module_names | {"aioserve", "anyio", "fastapi", "starlette", "uvicorn", "uvloop"}
_IN_THREAD = ("run_sync_in_worker_thread", "to_thread")  # anyio's and asyncio's

InnerTasks = Mapping[asyncio.Task[Any], Sequence[asyncio.Task[Any]]]
"""The tasks that each task waits for, as a task group does."""


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
