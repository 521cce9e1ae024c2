"""
A logging handler or filter of the program's that raises does not disturb a server.

Its traceback is printed to the standard error, as `logging` itself prints those of most handlers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from aioserve import ServerCrashedError, ShutdownError, Swappable, serving, start
from tests.helpers.apps import App
from tests.helpers.clients import connect

pytestmark = pytest.mark.usefixtures("short_grace")


class LogError(Exception):
    """Raised by the program's logging."""


class Broken:
    """Raises at every record of a logger, as its handler or its filter."""

    def __init__(self, name: str, kind: str) -> None:
        self.logger = logging.getLogger(name or None)
        self.kind = kind
        self.messages: list[str] = []

    def fail(self, record: logging.LogRecord) -> bool:
        if record.name in ("aioserve", "uvicorn.error"):  # the root logger has those of others as well
            self.messages.append(record.getMessage())
            raise LogError("the disk is full")
        return True

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        handler = logging.Handler()
        handler.emit = self.fail  # type: ignore[method-assign, assignment]
        level = self.logger.level
        self.logger.setLevel(logging.DEBUG)
        self.logger.addHandler(handler) if self.kind == "handler" else self.logger.addFilter(self.fail)
        try:
            yield
        finally:
            self.logger.removeHandler(handler)
            self.logger.removeFilter(self.fail)
            self.logger.setLevel(level)


# A filter of the root logger sees nothing of what its children log.
@pytest.fixture(
    params=[
        ("aioserve", "handler"),
        ("aioserve", "filter"),
        ("uvicorn.error", "handler"),
        ("uvicorn.error", "filter"),
        ("", "handler"),
    ],
    ids=lambda param: f"{param[1]} of {param[0] or 'root'}",
)
def broken(
    request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> Iterator[Broken]:
    """Let logging raise, and check that each time a traceback is printed."""
    for name in ("aioserve", "uvicorn.error"):
        caplog.set_level(logging.DEBUG, name)  # so that every record reaches every handler
    broken = Broken(*request.param)
    with broken.installed():
        yield broken
    err = capsys.readouterr().err
    assert err.count("LogError: the disk is full\n") == len(broken.messages)
    assert err.count("Traceback (most recent call last):\n") >= len(broken.messages)
    assert "in fail\n" in err or not broken.messages


def has(broken: Broken, name: str, part: str) -> bool:
    """Whether a message with this part was logged, if the broken handler gets those of a logger with this name."""
    return broken.logger.name not in (name, "root") or any(part in each for each in broken.messages)


async def ask(server: Any) -> None:
    async with connect(server) as client:
        client.ask("/")
        await client.answer()


async def test_server_starts_and_stops_although_logging_raises(broken: Broken) -> None:
    """It is served in between, too."""
    app = App()
    async with asyncio.timeout(10):
        async with serving(app) as server:
            await ask(server)
    assert app.events == ["startup", "GET /", "answered /", "shutdown", "lifespan over"]
    assert server.report is not None
    assert not server.report.was_forced
    assert has(broken, "uvicorn.error", "Uvicorn running on")
    assert has(broken, "uvicorn.error", "Closed")


async def test_forced_stop_ends_although_logging_raises(broken: Broken) -> None:
    """The handlers are cancelled, the lifespan shuts down, and there is a report."""
    app = App()
    async with asyncio.timeout(10):
        async with serving(app, shutdown_timeout=0.01) as server, connect(server) as client:
            client.ask("/hold")
            await app.holding.wait()
    assert app.events == ["startup", "GET /hold", "cancelled /hold", "shutdown", "lifespan over"]
    assert server.report is not None
    assert len(server.report.cancelled) == 1
    assert has(broken, "aioserve", "forced shutdown")


async def test_crash_cancels_the_block_although_logging_raises(broken: Broken) -> None:
    """What comes out is the crash, with the app's own error."""
    app = App()
    async with asyncio.timeout(10):
        with pytest.raises(ServerCrashedError) as raised:
            async with serving(app):
                app.crash.set()
                await asyncio.Event().wait()
    assert raised.value.__cause__ is app.error
    assert has(broken, "uvicorn.error", "Closed")


async def test_crash_of_a_started_server_is_raised_although_logging_raises(broken: Broken) -> None:
    """Without a block the crash is logged, which fails."""
    app = App()
    server = await start(app)
    app.crash.set()
    async with asyncio.timeout(10):
        with pytest.raises(ServerCrashedError) as raised:
            await server.wait_closed()
    assert raised.value.__cause__ is app.error
    assert has(broken, "aioserve", "died while it was serving")


async def test_error_of_the_body_comes_out_although_logging_raises(broken: Broken) -> None:
    """The server fails as well, and that is logged, which fails."""
    error = ValueError("the body's")
    async with asyncio.timeout(10):
        with pytest.raises(ValueError, match="the body's") as raised:
            async with serving(App(shutdown="raises")):
                raise error
    assert raised.value is error
    assert any("the server failed as well" in each for each in error.__notes__)
    assert has(broken, "aioserve", "the app's own")


async def test_error_of_a_shutdown_comes_out_although_logging_raises(broken: Broken) -> None:
    """The lifespan has raised at its end."""
    app = App(shutdown="raises")
    async with asyncio.timeout(10):
        with pytest.raises(ShutdownError) as raised:
            async with serving(app):
                pass
    assert raised.value.__cause__ is app.error


async def test_app_without_a_lifespan_starts_although_logging_raises(broken: Broken) -> None:
    """That it has none is logged, which fails."""
    app = App(startup="raises early")
    async with asyncio.timeout(10):
        async with serving(app) as server:
            await ask(server)
    assert has(broken, "aioserve", "the app has no lifespan")


async def test_stop_signal_ends_the_block_although_logging_raises(broken: Broken) -> None:
    """It ends normally, and counts no cancellation."""
    task = asyncio.current_task()
    assert task is not None
    async with asyncio.timeout(10):
        async with serving(App(), stop_on_signals=[signal.SIGUSR1]):
            signal.raise_signal(signal.SIGUSR1)
            await asyncio.Event().wait()
    assert task.cancelling() == 0
    assert has(broken, "aioserve", "SIGUSR1: cancelling the block")


async def test_stop_signal_closes_a_started_server_although_logging_raises(broken: Broken) -> None:
    """There is no block to cancel."""
    async with asyncio.timeout(10):
        server = await start(App(), stop_on_signals=[signal.SIGUSR1])
        signal.raise_signal(signal.SIGUSR1)
        await server.wait_closed()
    assert has(broken, "aioserve", "SIGUSR1: stopping")


async def test_second_stop_signal_forces_although_logging_raises(broken: Broken) -> None:
    """The first one has begun a stop that waits for a request."""
    app = App()
    async with asyncio.timeout(10):
        server = await start(app, stop_on_signals=[signal.SIGUSR1], shutdown_timeout=None)
        async with connect(server) as client:
            client.ask("/hold")
            await app.holding.wait()
            signal.raise_signal(signal.SIGUSR1)
            await server.stopping.wait()
            signal.raise_signal(signal.SIGUSR1)
            await server.wait_closed()
    assert "cancelled /hold" in app.events
    assert has(broken, "aioserve", "forced shutdown")


async def test_app_is_swapped_although_logging_raises(broken: Broken) -> None:
    """The old one's handler is cancelled, which is logged, which fails."""
    old, new = App(), App()
    swappable = Swappable(old)
    async with asyncio.timeout(10):
        async with serving(swappable) as server, connect(server) as client:
            client.ask("/hold")
            await old.holding.wait()
            await swappable.swap(new, shutdown_timeout=0.01)
            assert old.events == ["startup", "GET /hold", "cancelled /hold", "shutdown", "lifespan over"]
            await ask(server)
            assert "answered /" in new.events
    assert has(broken, "aioserve", "the replaced app: forced shutdown")


async def test_nothing_is_printed_of_a_broken_handler_where_logging_is_told_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`logging.raiseExceptions` is for production."""
    monkeypatch.setattr(logging, "raiseExceptions", False)
    broken = Broken("uvicorn.error", "handler")
    with broken.installed():
        async with serving(App()):
            pass
    assert broken.messages
    assert "LogError" not in capsys.readouterr().err
