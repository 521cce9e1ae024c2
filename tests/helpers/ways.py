"""
The three ways to start, with one signature: each calls a body with a running server, in the task of the caller.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

from anyio.abc import TaskStatus

from aioserve import Server, serve, serving, start

Body: TypeAlias = Callable[[Server], Awaitable[None]]
Way: TypeAlias = Callable[..., Awaitable[None]]


async def by_serving(app: Any, body: Body, **options: Any) -> None:
    async with serving(app, **options) as server:
        await body(server)


async def by_start(app: Any, body: Body, **options: Any) -> None:
    async with await start(app, **options) as server:
        await body(server)


async def by_serve(app: Any, body: Body, **options: Any) -> None:
    """Call the body when the server has started; `serve()` has no block, so the body must not wait."""

    class Started(TaskStatus[Server]):
        def started(self, value: Server | None = None) -> None:
            assert value is not None
            coroutine: Any = body(value)
            try:
                coroutine.__await__().send(None)
            except StopIteration:
                pass

    await serve(app, task_status=Started(), **options)


WAYS: dict[str, Way] = {"serving": by_serving, "start": by_start, "serve": by_serve}
