"""
`serving_process()`: the exit contract, with an app that runs in a child process.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from typing import Any

import anyio
import httpx
import pytest

from aioserve import (
    ServerCrashedError,
    StartupInterruptedError,
    serving_process,
)
from aioserve._net.acceptor import Acceptor
from aioserve._net.loops import choose_acceptor
from tests.helpers.processes import TALKING, get, is_free, linux_only
from tests.helpers.turns import turns

pytestmark = linux_only


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("SIGKILL", r"the child process \d+ ended \(killed by SIGKILL\) while it was serving"),
        ("/exit", r"the child process \d+ ended \(exit code 7\) while it was serving"),
        ("/crash", "the app's lifespan died while it was serving: AppError: the app's own"),
    ],
)
async def test_death_of_the_child_cancels_the_body(how: str, said: str, capfd: pytest.CaptureFixture[str]) -> None:
    """The error says how the child died; the task counts no cancellation."""
    seen = []
    with pytest.raises(ServerCrashedError, match=said) as caught:
        async with serving_process(TALKING) as server:
            try:
                if how == "SIGKILL":
                    os.kill(server.pid, signal.SIGKILL)
                else:
                    with contextlib.suppress(httpx.HTTPError):
                        await get(server, how)
                await asyncio.Event().wait()
            finally:
                seen.append("unwound")
    assert seen == ["unwound"]
    assert is_free(server.port)
    assert server.returncode == {"SIGKILL": -9, "/exit": 7, "/crash": 1}[how]
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    if how == "/crash":
        assert "tests.helpers.apps.AppError: the app's own" in caught.value.__notes__[0]


async def test_exit_code_is_unknown_where_sigchld_is_ignored() -> None:
    """The system throws it away; 0 would look like a graceful end."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with pytest.raises(ServerCrashedError, match="its exit code is unknown, since SIGCHLD is ignored"):
            async with serving_process("tests.helpers.apps:factory", factory=True) as server:
                os.kill(server.pid, signal.SIGKILL)
                await asyncio.Event().wait()
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert server.returncode is None


async def test_process_forked_by_a_dead_child_is_killed(capfd: pytest.CaptureFixture[str]) -> None:
    """Otherwise it would keep the port."""
    with pytest.raises(ServerCrashedError):
        async with serving_process(TALKING) as server:
            assert (await get(server, "/fork")).text == "hello"
            fork = int(capfd.readouterr().out.split("forked ")[1])
            end = os.pidfd_open(fork)
            os.kill(server.pid, signal.SIGKILL)
            await asyncio.Event().wait()
    await anyio.wait_readable(end)
    os.close(end)
    assert is_free(server.port)


async def test_exception_of_the_body_comes_out_of_serving_process() -> None:
    """The very object; a crash of the child becomes a note of it."""
    error = ValueError("the body's")
    with pytest.raises(ValueError, match="the body's") as caught:
        async with serving_process(TALKING):
            raise error
    assert caught.value is error

    with pytest.raises(ValueError, match="the body's") as caught:
        async with serving_process(TALKING) as server:
            os.kill(server.pid, signal.SIGKILL)
            try:
                await asyncio.Event().wait()
            finally:
                raise error
    assert "the server failed as well: ServerCrashedError" in error.__notes__[0]


async def test_cancelled_body_unwinds_while_the_child_still_answers() -> None:
    """Then the cancellation goes on, counted once."""
    answers: list[str] = []

    async def block() -> None:
        async with serving_process(TALKING) as server:
            try:
                started.set()
                await asyncio.Event().wait()
            finally:
                answers.append((await get(server)).text)

    started = asyncio.Event()
    task = asyncio.create_task(block())
    await started.wait()
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()
    assert task.cancelling() == 1
    assert answers == ["hello"]


@pytest.mark.parametrize("how", ["a signal", "close()", "limit_max_requests"])
async def test_child_that_is_asked_to_stop_is_no_crash(how: str) -> None:
    """The body goes on and can wait for the end, whatever asked for it."""
    options: Any = {"limit_max_requests": 1} if how == "limit_max_requests" else {}
    async with serving_process(TALKING, **options) as server:
        if how == "a signal":
            os.kill(server.pid, signal.SIGTERM)
        elif how == "close()":
            server.close()
        else:
            await get(server)
        await server.wait_closed()
        assert server.returncode == 0
        assert server.report is not None
        await asyncio.sleep(0)
    assert is_free(server.port)


@pytest.mark.parametrize("when", ["body", "startup"])
async def test_stop_on_signals_handles_signals_of_the_parent(when: str) -> None:
    """The block ends normally; before the app has started, the start is given up."""
    before = signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    try:
        if when == "body":
            async with serving_process(TALKING, stop_on_signals=[signal.SIGUSR1]) as server:
                signal.raise_signal(signal.SIGUSR1)
                await asyncio.Event().wait()
            assert server.returncode == 0
        else:
            asyncio.get_running_loop().call_later(0.3, signal.raise_signal, signal.SIGUSR1)
            with pytest.raises(StartupInterruptedError, match="SIGUSR1 stopped the server"):
                async with serving_process("tests.helpers.children:hanging", stop_on_signals=[signal.SIGUSR1]):
                    raise AssertionError("the body ran")
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGUSR1, before)


async def test_stop_signal_before_the_address_is_bound_gives_the_start_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only when the app, which hangs, has started."""
    before = signal.signal(signal.SIGUSR1, signal.SIG_DFL)

    async def choosing() -> type[Acceptor]:
        signal.raise_signal(signal.SIGUSR1)
        await turns()
        return await choose_acceptor()

    monkeypatch.setattr("aioserve._process.parent.choose_acceptor", choosing)
    options: Any = {"stop_on_signals": [signal.SIGUSR1], "startup_timeout": 5}
    try:
        with pytest.raises(StartupInterruptedError, match="SIGUSR1 stopped the server"):
            async with serving_process("tests.helpers.children:hanging", **options):
                raise AssertionError("the body ran")
    finally:
        signal.signal(signal.SIGUSR1, before)
