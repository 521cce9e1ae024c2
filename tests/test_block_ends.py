"""
Rules 2 to 6 of the exit contract: every way for the body to end, crossed with every way for the app's shutdown to end,
for each of the three doors.
"""

from __future__ import annotations

import asyncio
import itertools
import logging

import anyio
import pytest

from aioserve import Server, ServerCrashedError, ShutdownError
from tests.apps import App
from tests.doors import DOORS

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
        (door, "loses its server", shutdown): "a lifespan that has died cannot be shut down"
        for door in DOORS
        for shutdown in SHUTDOWNS[1:]
    },
}

CELLS = [cell for cell in itertools.product(DOORS, CAUSES, SHUTDOWNS) if cell not in IMPOSSIBLE]


class BodyError(Exception):
    """What a body raises."""


class SiblingError(Exception):
    """What a sibling in a task group raises."""


class Run:
    """One run of a block: what brings it to its end, and what came out."""

    def __init__(self, door: str, cause: str, app: App) -> None:
        self.door = door
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
        if self.door == "serve" or self.cause == "returns":
            return
        await (server.wait_closed() if self.door == "start" else asyncio.Event().wait())

    async def block(self) -> None:
        """Run the block, and note what came out of it, and whether a cancellation is still counted."""
        try:
            await DOORS[self.door](self.app, self.body, shutdown_timeout=0.05)
        except BaseException as exc:
            self.outcome = exc
            raise
        finally:
            task = asyncio.current_task()
            assert task is not None
            self.cancelling = task.cancelling()

    async def end(self) -> None:
        """Bring the block to its end in the way that is to be tried; assert what the world around sees of it."""
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
                elif self.cause == "returns" and self.door == "serve":
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


@pytest.mark.parametrize(("door", "cause", "shutdown"), CELLS)
async def test_what_comes_out_of_a_block(
    door: str, cause: str, shutdown: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The body before the server, a cancellation before both; and nothing is swallowed, wrapped or counted twice."""
    app = App(shutdown=shutdown)
    run = Run(door, cause, app)

    await run.end()

    server_error = run.server.uvicorn.error  # type: ignore[attr-defined]  # what the server has to say, heard or not
    match cause:
        case "returns":
            heard = server_error
            assert run.outcome is server_error
        case "raises":
            heard = None
            assert run.outcome is run.body_error
            assert getattr(run.body_error, "__notes__", []) == (
                []
                if shutdown == "completes"
                else [f"aioserve: the server failed as well: ShutdownError: {server_error}"]
            )
        case "loses its server":
            heard = server_error
            assert run.outcome is server_error
            assert isinstance(server_error, ServerCrashedError)
            assert server_error.__cause__ is app.error
        case _:
            heard = None
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

    # What nobody heard is in the log; what was heard need not be, but for a crash that could not cancel anybody.
    logged = [record for record in caplog.records if record.levelno == logging.ERROR]
    if server_error is None or (heard is not None and (cause == "returns" or door != "start")):
        assert logged == []
    else:
        assert [record.name for record in logged] == ["aioserve"]
        assert str(server_error) in caplog.text

    # The cancellations that the task still counts are those that came from outside.
    cancelled = {"is cancelled natively", "is cancelled by asyncio.timeout", "is cancelled by a failing sibling"}
    if cause != "is cancelled by a scope":  # anyio counts by its own rules
        assert run.cancelling == (1 if cause in cancelled else 0)
    assert app.events[-1] == "lifespan over"


@pytest.mark.parametrize(("cell", "reason"), IMPOSSIBLE.items(), ids=lambda value: "")
def test_what_is_left_out_is_a_cell(cell: tuple[str, str, str], reason: str) -> None:
    """The list of impossible cells names none that does not exist."""
    assert cell in set(itertools.product(DOORS, CAUSES, SHUTDOWNS))
    assert reason
