"""
A handler that begins while cancelled ones are awaited is cancelled as well, is reported, and ends with the block.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from aioserve import Server, Swappable, serving, start
from tests.helpers.apps import Receive, Scope, Send
from tests.helpers.clients import PIPELINING, REQUEST, connect
from tests.helpers.turns import turns


class Delaying:
    """
    The handler of "/first" delays its cancellation for some turns; the one of "/late" waits for ever.

    Args:
        answers: Whether "/first" is answered when it is cancelled, so that a request behind it can begin.
    """

    def __init__(self, *, answers: bool) -> None:
        self.answers = answers
        self.running: list[str] = []
        self.began, self.cancelled = asyncio.Event(), asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        self.running.append(scope["path"])
        self.began.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if scope["path"] == "/first":
                self.cancelled.set()
                if self.answers:
                    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
                    await send({"type": "http.response.body", "body": b""})
                await turns()
            raise
        finally:
            self.running.remove(scope["path"])


def cancelled(server: Server) -> list[tuple[str, bool]]:
    """Return the paths of the handlers that were cancelled, each with whether it is still running."""
    assert server.report is not None
    assert server.stats.in_flight == 0
    return sorted((each.path, each.stuck) for each in server.report.cancelled)


BOTH = [("/first", False), ("/late", False)]
FORCED: list[dict[str, Any]] = [{"shutdown_timeout": 0.01}, {"shutdown_timeout": 0}]


@pytest.mark.parametrize("http", PIPELINING)
@pytest.mark.parametrize("options", FORCED, ids=["budget over", "no budget"])
async def test_pipelined_request_that_begins_after_a_cancellation_is_cancelled_too(
    http: str, options: dict[str, Any]
) -> None:
    """It waits behind a request whose handler answers when it is cancelled, and takes its time to end."""
    app = Delaying(answers=True)
    async with serving(app, http=http, lifespan="off", **options) as server, connect(server) as client:
        client.writer.write(REQUEST % b"/first" + REQUEST % b"/late")
        await app.began.wait()
        async with asyncio.timeout(10):
            await server.aclose()
        assert app.running == []
    assert cancelled(server) == BOTH


@pytest.mark.parametrize("http", PIPELINING)
async def test_request_whose_head_completes_after_a_cancellation_is_cancelled_too(http: str) -> None:
    """The first part of it came before the stop, and the rest while a cancelled handler is awaited."""
    app = Delaying(answers=False)
    server = await start(app, http=http, lifespan="off", shutdown_timeout=0.01)
    async with connect(server) as first, connect(server) as late:
        first.ask("/first")
        head = REQUEST % b"/late"
        late.writer.write(head[:-2])
        await app.began.wait()
        while server.stats.connections < 2:
            await asyncio.sleep(0)
        closing = asyncio.create_task(server.aclose())
        await app.cancelled.wait()
        late.writer.write(head[-2:])
        async with asyncio.timeout(10):
            await closing
        assert app.running == []
    assert cancelled(server) == BOTH


@pytest.mark.parametrize("http", PIPELINING)
async def test_request_of_a_server_that_is_forced_by_a_second_close_is_cancelled_too(http: str) -> None:
    """`close(timeout=0)` cancels the first handler, and the pipelined one begins after that."""
    app = Delaying(answers=True)
    async with serving(app, http=http, lifespan="off", shutdown_timeout=None) as server, connect(server) as client:
        client.writer.write(REQUEST % b"/first" + REQUEST % b"/late")
        await app.began.wait()
        server.close()
        server.close(timeout=0)
        async with asyncio.timeout(10):
            await server.wait_closed()
        assert app.running == []
    assert cancelled(server) == BOTH


@pytest.mark.parametrize("http", PIPELINING)
async def test_handler_that_begins_late_is_cancelled_under_a_swappable(http: str) -> None:
    """The server's own stop cancels its task."""
    app = Delaying(answers=True)

    async def with_lifespan(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            raise NotImplementedError
        await app(scope, receive, send)

    async with serving(Swappable(with_lifespan), http=http, shutdown_timeout=0.01) as server, connect(server) as client:
        client.writer.write(REQUEST % b"/first" + REQUEST % b"/late")
        await app.began.wait()
        async with asyncio.timeout(10):
            await server.aclose()
        assert app.running == []
    assert cancelled(server) == BOTH
