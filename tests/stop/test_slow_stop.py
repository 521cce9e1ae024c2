"""
A stop that takes longer than a second says once what it waits for, for how long at most, and how to force it.
"""

from __future__ import annotations

import asyncio
import logging
import re
from typing import Any

import pytest

from aioserve import ShutdownError, StartupTimeoutError, Swappable, _limits, serving, start
from tests.helpers.apps import App, AppError
from tests.helpers.clients import connect

pytestmark = pytest.mark.usefixtures("short_grace")

FORCES = "; a second Ctrl+C, or close(timeout=0), forces the stop"


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_limits, "SLOW_STOP", 0.05)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


async def warned(caplog: pytest.LogCaptureFixture) -> str:
    """Wait for the first warning."""
    while not warnings(caplog):
        await asyncio.sleep(0.01)
    return warnings(caplog)[0]


async def test_stop_that_waits_for_a_handler_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """Once, with what it waits for and how long at most; nothing was forced, so nothing else is logged."""
    app = App()
    async with serving(app, shutdown_timeout=20) as server, connect(server) as connection:
        connection.ask("/hold")
        await app.holding.wait()
        server.close()
        line = await warned(caplog)
        await asyncio.sleep(0.1)
        app.release.set()
        await connection.answer()

    assert re.fullmatch(
        rf"{server.url}: the stop waits for 1 handler \(GET /hold from 127\.0\.0\.1:\d+, waiting at App\.request "
        r"\(.*apps\.py:\d+\)\), for at most 20 s; a second Ctrl\+C, or close\(timeout=0\), forces the stop",
        line,
    )
    assert warnings(caplog) == [line]


@pytest.mark.parametrize("limit", [None, 20])
async def test_warning_says_the_limit_that_comes_first(limit: float | None, caplog: pytest.LogCaptureFixture) -> None:
    """The time of a `close()` can be shorter than the budget; without both there is no limit."""
    app = App()
    async with serving(app, shutdown_timeout=limit) as server, connect(server) as connection:
        connection.ask("/hold")
        await app.holding.wait()
        server.close(timeout=None if limit is None else 7)
        line = await warned(caplog)
        app.release.set()
        await connection.answer()
    assert line.endswith(("), without a limit" if limit is None else "), for at most 7 s") + FORCES)


async def test_stop_whose_time_is_nearly_over_says_only_what_it_forces(caplog: pytest.LogCaptureFixture) -> None:
    """Nobody could do anything in what is left of its time."""
    app = App()
    async with serving(app, shutdown_timeout=_limits.SLOW_STOP + 0.001) as server, connect(server) as connection:
        connection.ask("/hold")
        await app.holding.wait()
    (line,) = warnings(caplog)
    assert line.startswith(f"{server.url}: forced shutdown: ")


async def test_warning_before_the_disconnect_says_the_time_of_the_whole_stop(caplog: pytest.LogCaptureFixture) -> None:
    """`disconnect_after` ends only a part of the wait."""
    app = App()
    async with serving(app, shutdown_timeout=20, disconnect_after=0.2) as server, connect(server) as connection:
        connection.ask("/hold")
        await app.holding.wait()
        server.close()
        line = await warned(caplog)
        app.release.set()
        await connection.answer()
    assert line.endswith("), for at most 20 s" + FORCES)


async def test_quick_lifespan_after_a_long_wait_is_no_reason_to_warn(caplog: pytest.LogCaptureFixture) -> None:
    """It gets a moment of its own."""
    app = App()
    async with serving(app, shutdown_timeout=0.04) as server, connect(server) as connection:
        connection.ask("/cling")
        await app.holding.wait()
        asyncio.get_running_loop().call_later(0.08, app.release.set)
        await server.aclose()
    assert [line for line in warnings(caplog) if "the stop waits" in line] == []


async def test_quick_stop_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Also one that waits for a handler."""
    app = App()
    async with serving(app) as server, connect(server) as connection:
        connection.ask("/hold")
        await app.holding.wait()
        asyncio.get_running_loop().call_soon(app.release.set)
        await server.aclose()
        await connection.answer()
    assert warnings(caplog) == []


async def test_stop_that_waits_for_connections_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """No handler is left, and a client does not read its answer."""
    size = 20_000_000

    async def app(scope: Any, receive: Any, send: Any) -> None:
        length = b"%d" % size
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
        sending = asyncio.ensure_future(send({"type": "http.response.body", "body": bytes(size)}))
        await asyncio.sleep(0)
        sending.cancel()

    server = await start(app, lifespan="off", shutdown_timeout=20)
    async with connect(server) as connection:
        connection.ask("/")
        await connection.reader.readuntil(b"\r\n\r\n")
        while server.stats.in_flight:
            await asyncio.sleep(0)
        server.close()
        line = await warned(caplog)
        await connection.rest()
        await server.wait_closed()
    assert line == f"{server.url}: the stop waits for connections that are still open, for at most 20 s{FORCES}"


async def test_stop_that_waits_for_the_lifespan_says_where_that_waits(caplog: pytest.LogCaptureFixture) -> None:
    """The error has the place, too."""
    server = await start(App(shutdown="hangs"), shutdown_timeout=0.2)
    with pytest.raises(ShutdownError) as raised:
        await server.aclose()
    place = r"waiting at App\.lifespan \(.*apps\.py:\d+\)"
    assert re.fullmatch(
        rf"{server.url}: the stop waits for the shutdown of the app's lifespan, {place}, for at most 0\.\d s"
        + re.escape(FORCES),
        warnings(caplog)[0],
    )
    assert re.search(place, str(raised.value))


async def test_start_that_takes_too_long_says_where_the_lifespan_waited() -> None:
    """The innermost line of the app's own, and not asyncio's."""
    with pytest.raises(
        StartupTimeoutError, match=r"seconds, waiting at App\.lifespan \(.*apps\.py:\d+\); it was cancelled"
    ):
        async with serving(App(startup="hangs"), startup_timeout=0.01):
            raise AppError


async def test_swap_that_waits_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """But not how to force the stop of a server: none is asked for."""
    old = App()
    app = Swappable(old)
    async with serving(app) as server, connect(server) as connection:
        connection.ask("/hold")
        await old.holding.wait()
        swapping = asyncio.create_task(app.swap(App(), shutdown_timeout=20))
        line = await warned(caplog)
        old.release.set()
        await swapping
        await connection.answer()
    assert re.fullmatch(
        r"the replaced app: the stop waits for 1 handler \(GET /hold from 127\.0\.0\.1:\d+, waiting at App\.request "
        r"\(.*apps\.py:\d+\)\), for at most 20 s",
        line,
    )


async def test_second_cancellation_says_that_it_forces(caplog: pytest.LogCaptureFixture) -> None:
    """As the second signal does."""
    app = App()
    server = await start(app)

    async def close() -> None:
        async with server:
            await asyncio.Event().wait()

    async with connect(server) as connection:
        connection.ask("/hold")
        await app.holding.wait()
        closing = asyncio.create_task(close())
        await asyncio.sleep(0)
        closing.cancel()
        await server.stopping.wait()
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
    assert warnings(caplog)[0] == f"{server.url}: a second cancellation forces the stop"
