"""
Rules 2 to 6 of the exit contract in one table: each end of the body, with each end of the app's shutdown, for each of
the three ways to start.
"""

from __future__ import annotations

import asyncio
import itertools
import logging

import anyio
import pytest

from aioserve import Server, ServerCrashedError, ShutdownError
from tests.helpers.apps import App
from tests.helpers.ways import WAYS

pytestmark = pytest.mark.usefixtures("short_grace")

CAUSES = (
    "returns",
    "raises",
    "is cancelled natively",
    "is cancelled by a scope",
    "is cancelled by asyncio.timeout",
    "is cancelled by a failing sibling",
    "loses its server",
)
SHUTDOWNS = ("completes", "raises", "fails", "hangs")

IMPOSSIBLE: dict[tuple[str, str, str], str] = {
    **{("serve", "raises", shutdown): "serve() has no body of the user's that could raise" for shutdown in SHUTDOWNS},
    **{
        (way, "loses its server", shutdown): "a lifespan that has died cannot be shut down"
        for way in WAYS
        for shutdown in SHUTDOWNS[1:]
    },
}

CELLS = [cell for cell in itertools.product(WAYS, CAUSES, SHUTDOWNS) if cell not in IMPOSSIBLE]


class BodyError(Exception):
    """What a body raises."""


class SiblingError(Exception):
    """What a sibling in a task group raises."""


class Run:
    """One run of a block: what ends it, and what comes out."""

    def __init__(self, way: str, cause: str, app: App) -> None:
        self.way = way
        self.cause = cause
        self.app = app
        self.started = asyncio.Event()
        self.server: Server
        self.body_error = BodyError()
        self.outcome: BaseException | None = None
        self.cancelling = -1

    async def body(self, server: Server) -> None:
        self.server = server
        self.started.set()
        if self.cause == "raises":
            raise self.body_error
        if self.way == "serve" or self.cause == "returns":
            return
        await (server.wait_closed() if self.way == "start" else asyncio.Event().wait())

    async def block(self) -> None:
        """Run the block; store what comes out of it, and how many cancellations the task still counts."""
        try:
            await WAYS[self.way](self.app, self.body, shutdown_timeout=0.05)
        except BaseException as exc:
            self.outcome = exc
            raise
        finally:
            task = asyncio.current_task()
            assert task is not None
            self.cancelling = task.cancelling()

    async def end(self) -> None:
        """End the block as `cause` says; assert what the code around it sees."""
        match self.cause:
            case "is cancelled by a scope":
                with anyio.CancelScope() as scope:
                    async with anyio.create_task_group() as task_group:
                        task_group.start_soon(self.block)
                        await self.started.wait()
                        scope.cancel()
                assert scope.cancelled_caught
            case "is cancelled by asyncio.timeout":
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(None) as timeout:
                        expiring = asyncio.create_task(self.expire(timeout))
                        await self.block()
                await expiring
            case "is cancelled by a failing sibling":
                with pytest.raises(ExceptionGroup) as caught:
                    async with asyncio.TaskGroup() as group:
                        group.create_task(self.block())
                        group.create_task(self.fail())
                (only,) = caught.value.exceptions
                assert isinstance(only, SiblingError)
            case _:
                task = asyncio.create_task(self.block())
                await self.started.wait()
                if self.cause == "is cancelled natively":
                    task.cancel()
                elif self.cause == "loses its server":
                    self.app.crash.set()
                elif self.cause == "returns" and self.way == "serve":
                    self.server.close()
                await asyncio.wait({task})
                assert task.cancelled() == isinstance(self.outcome, asyncio.CancelledError)
                if not task.cancelled():
                    assert task.exception() is self.outcome

    async def expire(self, timeout: asyncio.Timeout) -> None:
        await self.started.wait()
        timeout.reschedule(0)

    async def fail(self) -> None:
        await self.started.wait()
        raise SiblingError


@pytest.mark.parametrize(("way", "cause", "shutdown"), CELLS)
async def test_block_raises_what_the_exit_contract_says(
    way: str, cause: str, shutdown: str, caplog: pytest.LogCaptureFixture
) -> None:
    """
    The body's exception wins over the server's, a cancellation over both; nothing is swallowed, wrapped or counted
    twice.
    """
    app = App(shutdown=shutdown)
    run = Run(way, cause, app)

    await run.end()

    server_error = run.server._engine.error  # the server's error, raised or not
    match cause:
        case "returns":
            raised = server_error
            assert run.outcome is server_error
        case "raises":
            raised = None
            assert run.outcome is run.body_error
            assert getattr(run.body_error, "__notes__", []) == (
                []
                if shutdown == "completes"
                else [f"aioserve: the server failed as well: ShutdownError: {server_error}"]
            )
        case "loses its server":
            raised = server_error
            assert run.outcome is server_error
            assert isinstance(server_error, ServerCrashedError)
            assert server_error.__cause__ is app.error
        case _:
            raised = None
            assert isinstance(run.outcome, asyncio.CancelledError)

    if cause != "loses its server":
        match shutdown:
            case "completes":
                assert server_error is None
            case "hangs":
                assert isinstance(server_error, ShutdownError)
                assert isinstance(server_error.__cause__, TimeoutError)
            case _:
                assert isinstance(server_error, ShutdownError)
                assert server_error.__cause__ is app.error

    # An error that was not raised is logged. One that was raised is not, except for a crash that could cancel nobody.
    logged = [record for record in caplog.records if record.levelno == logging.ERROR]
    if server_error is None or (raised is not None and (cause == "returns" or way != "start")):
        assert logged == []
    else:
        assert [record.name for record in logged] == ["aioserve"]
        assert str(server_error) in caplog.text

    # The task still counts the cancellations from outside, and no other.
    cancelled = {"is cancelled natively", "is cancelled by asyncio.timeout", "is cancelled by a failing sibling"}
    if cause != "is cancelled by a scope":  # anyio counts by its own rules
        assert run.cancelling == (1 if cause in cancelled else 0)
    assert app.events[-1] == "lifespan over"


@pytest.mark.parametrize(("cell", "reason"), IMPOSSIBLE.items(), ids=lambda value: "")
def test_each_cell_that_is_left_out_exists(cell: tuple[str, str, str], reason: str) -> None:
    """The list of impossible cells names none that does not exist."""
    assert cell in set(itertools.product(WAYS, CAUSES, SHUTDOWNS))
    assert reason
