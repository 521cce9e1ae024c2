"""
What a program puts into its scopes, variables and tasks cannot break, or hold up, a stop that describes its handlers.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any
from unittest.mock import MagicMock

import pytest

from aioserve import _limits, serving
from tests.helpers.apps import App
from tests.helpers.clients import connect

pytestmark = pytest.mark.usefixtures("short_grace")


class Raising:
    """Raises whatever it is asked."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)


class Route:
    """Has a path that is no ordinary string."""

    class Path(str):
        __slots__ = ()

        def __eq__(self, other: object) -> bool:
            raise RuntimeError

        __hash__ = str.__hash__

    path = Path("/\n{nothing}")


class TaskGroup:
    """Is named as those of libraries."""

    __module__ = None  # type: ignore[assignment]
    _tasks = 5


class Awaitable:
    """Is awaited by an iterator with every attribute there is."""

    def __init__(self, event: asyncio.Event) -> None:
        self._event = event

    def __await__(self) -> Any:
        return Iterator(self._event.wait().__await__())


class Iterator:
    """Passes on to another one, and has every attribute."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        return next(self.inner)

    def throw(self, *exc: Any) -> Any:
        return self.inner.throw(*exc)

    def __getattr__(self, name: str) -> Any:
        return MagicMock()


HOSTILE: dict[str, dict[str, Any]] = {
    "path": {"path": None},
    "path of bytes": {"path": b"/x"},
    "method": {"method": 5},
    "client": {"client": 5},
    "client's host": {"client": (Raising(), 1)},
    "type": {"type": Raising()},
    "route": {"route": Raising(), "endpoint": App},
    "route's path": {"route": Route(), "endpoint": App},
    "endpoint": {"endpoint": Raising()},
    "path_params": {"route": Route(), "endpoint": None, "path_params": Raising()},
}


@pytest.mark.parametrize("changes", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("forced", [False, True])
async def test_hostile_scope_does_not_break_a_stop(
    changes: dict[str, Any], forced: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The handler is described by what is left, and its request is answered, or cancelled in order."""
    monkeypatch.setattr(_limits, "SLOW_STOP", 0.01)
    begun, release = asyncio.Event(), asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        group = TaskGroup()
        before = {**scope}
        scope.update(changes)
        begun.set()
        try:
            await Awaitable(release)
        finally:
            scope.update(before)  # uvicorn logs it
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
        await send({"type": "http.response.body", "body": b"hello"})
        del group

    async with serving(app, lifespan="off", shutdown_timeout=0.05 if forced else 20) as server:
        async with connect(server) as client:
            client.ask("/")
            await begun.wait()
            server.close()
            if not forced:
                while "the stop waits for 1 handler" not in caplog.text:
                    await asyncio.sleep(0.01)
                release.set()
                assert (await client.answer()).endswith(b"hello")
            await server.wait_closed()
    assert server.report is not None
    assert len(server.report.cancelled) == forced
    assert "failed" not in caplog.text
    lines = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert all(line.isprintable() for line in lines)


async def test_handler_with_many_tasks_is_described_by_one_of_them() -> None:
    """However many there are, and whatever they wait for, few are looked into."""
    begun = asyncio.Event()

    async def hang(others: list[Any], count: int) -> None:
        begun.set()
        await asyncio.gather(*others, *(asyncio.sleep(100) for _ in range(count)))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async with asyncio.TaskGroup() as group:
            waited_for: list[Any] = []
            for _ in range(100):
                waited_for = [group.create_task(hang(waited_for, 5))]

    async with serving(app, lifespan="off", shutdown_timeout=0.01) as server, connect(server) as client:
        client.ask("/")
        await begun.wait()
        await server.aclose()
    assert server.report is not None
    (handler,) = server.report.cancelled
    assert handler.line is not None
    assert "hang" in handler.line
    assert len(handler.where) < 10 * _limits.INNER_TASKS


async def test_task_group_in_a_variable_is_not_taken_for_what_is_waited_for() -> None:
    """It may be the program's own, with other work in it."""

    async def unrelated() -> None:
        await asyncio.Event().wait()

    app = App()
    async with asyncio.TaskGroup() as group:
        worker = group.create_task(unrelated())

        async def with_group(scope: Any, receive: Any, send: Any) -> None:
            mine = group
            await app(scope, receive, send)
            del mine

        async with serving(with_group, lifespan="off", shutdown_timeout=0.01) as server, connect(server) as client:
            client.ask("/hold")
            await app.holding.wait()
            await server.aclose()
        worker.cancel()
    assert server.report is not None
    (handler,) = server.report.cancelled
    assert handler.line is not None
    assert "unrelated" not in handler.line
