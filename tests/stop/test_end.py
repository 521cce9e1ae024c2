"""
The end of a stop: the app's lifespan shuts down, and the report says what was forced.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from aioserve import ShutdownError, serving
from tests.helpers.apps import App
from tests.helpers.turns import MOMENT

pytestmark = pytest.mark.usefixtures("short_grace")


async def test_report_of_an_orderly_stop_lists_nothing() -> None:
    """Nothing was forced."""
    async with serving(App()) as server:
        assert server.report is None
    assert server.report is not None
    assert 0 <= server.report.duration < 60
    assert not server.report.was_forced


async def test_deadline_of_close_does_not_shorten_the_lifespans_shutdown() -> None:
    """The requests end in time; the app's shutdown takes longer than their deadline."""
    ended: list[bool] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await passed.wait()
        ended.append(True)

    passed = asyncio.Event()
    async with serving(app) as server:
        server.close(timeout=MOMENT)
        asyncio.get_running_loop().call_later(6 * MOMENT, passed.set)
    assert ended


async def test_lifespan_that_receives_after_its_shutdown_ends_at_once() -> None:
    """There is no further message, so nobody waits, and it is no error."""
    app = App(shutdown="receives on")

    async with serving(app, shutdown_timeout=None):
        pass

    assert app.events == ["startup", "shutdown", "lifespan over"]


async def test_two_concurrent_receives_both_get_the_shutdown() -> None:
    """And neither counts as one after the shutdown: the clean-up behind them is not cut off."""
    cleaned_up = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        received = await asyncio.gather(receive(), receive())
        for _ in range(10):
            await asyncio.sleep(0)
        cleaned_up.append([message["type"] for message in received])

    async with serving(app):
        pass

    assert cleaned_up == [["lifespan.shutdown", "lifespan.shutdown"]]


async def test_cancelled_receive_loses_no_message() -> None:
    """An app may wait for the shutdown with a timeout, again and again."""
    received = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        while True:
            given_up = asyncio.ensure_future(receive())
            done, _ = await asyncio.wait({given_up}, timeout=0)
            if done:
                break
            given_up.cancel()
        received.append(given_up.result()["type"])
        await send({"type": "lifespan.shutdown.complete"})

    async with serving(app):
        for _ in range(10):
            await asyncio.sleep(0)

    assert received == ["lifespan.shutdown"]


async def test_shutdown_that_swallows_its_cancellation_does_not_block_the_stop(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The block ends within its bound, and the log names the app that is still running."""
    app = App(shutdown="clings")

    with pytest.raises(ShutdownError, match=r"within .* s \(.*\); it was cancelled, and is still running"):
        async with serving(app, shutdown_timeout=0):
            pass

    assert "the app's lifespan is stuck" in caplog.text
    (stuck,) = (task for task in asyncio.all_tasks() if task.get_name() == "aioserve lifespan")
    app.release.set()
    await asyncio.wait({stuck})


async def test_crash_during_the_stop_is_a_shutdown_error() -> None:
    """The body was already over."""
    app = App()

    with pytest.raises(ShutdownError) as caught:
        async with serving(app) as server:
            server.close()
            while not server._engine.lifespan._shutdown.is_set():
                await asyncio.sleep(0)
            app.crash.set()  # before the app has received that message

    assert caught.value.__cause__ is app.error
