"""
`serving_process()`: how the child stops, what is reported, and when it is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal

import pytest

from aioserve import (
    ServerCrashedError,
    ServerProcess,
    ShutdownError,
    _limits,
    serving_process,
)
from tests.helpers.processes import TALKING, asking, get, is_free, linux_only

pytestmark = linux_only


async def test_report_of_a_child_names_the_handlers_that_were_cancelled(capfd: pytest.CaptureFixture[str]) -> None:
    """As `Server.report` does."""
    async with contextlib.AsyncExitStack() as stack:
        async with serving_process("tests.helpers.apps:factory", factory=True, shutdown_timeout=0) as server:
            reader = await stack.enter_async_context(asking(server, "/stream"))
            await reader.readuntil(b"data: 0")
    assert server.returncode == 1
    assert server.report is not None
    (handler,) = server.report.cancelled
    assert (handler.method, handler.path, handler.stuck) == ("GET", "/stream", False)
    assert handler.client is not None
    assert handler.client[0] == "127.0.0.1"
    assert any("apps.py" in each for each in handler.where)
    assert ": forced shutdown: " in capfd.readouterr().err


async def test_crash_of_a_child_that_is_stopping_is_a_crash() -> None:
    """Its app was not told to shut down before: it was draining."""
    with pytest.raises(ServerCrashedError, match="the app's lifespan died before it was told to shut down: AppError"):
        async with serving_process(TALKING, drain_delay=60) as server:
            server.close()
            while "connection" not in (response := await get(server)).headers:
                pass
            assert response.headers["connection"] == "close"
            await get(server, "/crash")
            await server.wait_closed()


@pytest.mark.parametrize("how", ["a second cancellation", "close(timeout=0)", "close(timeout=0.1)"])
async def test_stop_of_a_child_can_be_forced(how: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Without a limit it would take for ever."""

    async def block() -> None:
        async with serving_process("tests.helpers.apps:factory", factory=True, shutdown_timeout=None) as server:
            servers.append(server)
            reader = await stack.enter_async_context(asking(server, "/stream"))
            await reader.readuntil(b"data: 0")
            if how != "a second cancellation":
                server.close(timeout=float(how[14:-1]))
                await server.wait_closed()
            else:
                streaming.set()
                await asyncio.Event().wait()

    servers: list[ServerProcess] = []
    streaming = asyncio.Event()
    async with contextlib.AsyncExitStack() as stack:
        task = asyncio.create_task(block())
        if how == "a second cancellation":
            await streaming.wait()
            task.cancel()
            await asyncio.sleep(0)
            task.cancel()
        await asyncio.wait({task})
        assert task.cancelled() == (how == "a second cancellation")
        if not task.cancelled():
            task.result()
    assert servers[0].report is not None
    assert [each.path for each in servers[0].report.cancelled] == ["/stream"]


@pytest.mark.usefixtures("short_exit", "both_ways")
async def test_child_that_blocks_its_loop_is_killed(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """When its time, which is bounded, is over; and that is an error."""
    monkeypatch.setattr(_limits, "longest_stop", lambda *timeouts: 0.1)
    with pytest.raises(ShutdownError, match=r"\(killed by SIGKILL\): it did not stop within 0\.2"):
        async with contextlib.AsyncExitStack() as stack, serving_process(TALKING) as server:
            await stack.enter_async_context(asking(server, "/block"))
            while "blocking" not in capfd.readouterr().out:
                await asyncio.sleep(0.001)
    assert is_free(server.port)


@pytest.mark.usefixtures("short_exit")
async def test_child_whose_thread_does_not_end_is_killed() -> None:
    """Its server has stopped and said so; but the work of the thread is lost, and an error says that."""
    with pytest.raises(ShutdownError, match=r"\(killed by SIGKILL\): the server had stopped, but its process did not"):
        async with serving_process(TALKING, shutdown_timeout=0.1) as server:
            assert (await get(server, "/thread")).text == "hello"
    assert server.returncode == -signal.SIGKILL
    assert server.report is not None


async def test_child_has_the_shutdown_timeout_for_its_exit_hooks() -> None:
    """Exporters and profilers use such hooks."""
    async with serving_process("tests.helpers.children:late") as server:
        pass
    assert server.returncode == 0


@pytest.mark.usefixtures("short_exit")
async def test_child_without_a_shutdown_timeout_has_all_the_time_for_its_exit_hooks() -> None:
    """`None` is no limit."""
    async with serving_process("tests.helpers.children:late", shutdown_timeout=None) as server:
        pass
    assert server.returncode == 0


@pytest.mark.usefixtures("short_exit")
async def test_child_that_has_left_its_process_group_is_killed(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """By its own process id."""
    monkeypatch.setattr(_limits, "longest_stop", lambda *timeouts: 0.1)
    with pytest.raises(ShutdownError, match="killed by SIGKILL"):
        async with contextlib.AsyncExitStack() as stack, serving_process(TALKING) as server:
            assert (await get(server, "/leave")).text == "hello"
            await stack.enter_async_context(asking(server, "/block"))


async def test_lifespan_of_a_child_that_does_not_end_is_a_shutdown_error(capfd: pytest.CaptureFixture[str]) -> None:
    """It has the same message as with `serving()`."""
    with pytest.raises(ShutdownError, match="did not shut down within"):
        async with serving_process("tests.helpers.children:clinging_in_a_hurry", factory=True, shutdown_timeout=0):
            pass


@pytest.mark.parametrize("name", ["by_the_loop", "by_a_function"])
async def test_child_whose_app_has_taken_over_sigterm_stops(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """The app's handler is called as well."""
    async with serving_process(f"tests.helpers.taking:{name}", factory=True) as server:
        pass
    assert server.returncode == 0
    assert server.report is not None
    assert capfd.readouterr().out.splitlines() == ["starting", "the app's handler: SIGTERM", "lifespan over"]


async def test_child_that_gets_sighup_stops_gracefully() -> None:
    """From a supervisor, which may send it along with SIGTERM; it does not force."""
    async with serving_process(TALKING) as server:
        os.kill(server.pid, signal.SIGHUP)
        await server.wait_closed()
    assert server.returncode == 0
    assert server.report is not None
