"""
Rule 7 of the exit contract: what a stop signal ends, and what comes out of the block.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import signal
import threading
from typing import Any

import anyio
import pytest

from aioserve import Server, StartupInterruptedError, serve, serving, start
from tests.helpers.apps import App
from tests.helpers.clients import connect
from tests.helpers.ways import WAYS, Way, by_serving, by_start


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
async def test_stop_signal_counts_no_cancellation(way: Way, calls: list[str]) -> None:
    """And the host's handler is not called, until the server has closed."""
    app = App()

    async def body(server: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        await server.wait_closed() if way is WAYS["start"] else await asyncio.Event().wait()

    await way(app, body, stop_on_signals=True)

    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    await asyncio.sleep(0)
    assert app.events == ["startup", "shutdown", "lifespan over"]
    assert calls == []
    signal.raise_signal(signal.SIGTERM)
    assert calls == ["host"]


async def test_exception_of_the_body_wins_over_a_stop_signal(calls: list[str]) -> None:
    """The body raised it while it was unwinding."""
    with pytest.raises(ValueError, match="the body's"):
        async with serving(App(), stop_on_signals=True):
            signal.raise_signal(signal.SIGTERM)
            try:
                await asyncio.Event().wait()
            finally:
                raise ValueError("the body's")


@pytest.mark.parametrize("native", [True, False], ids=["natively", "by a scope"])
async def test_cancellation_wins_over_a_stop_signal(native: bool, calls: list[str]) -> None:
    """Both come in the same turn of the loop; the cancellation from outside goes on."""

    async def block() -> None:
        task = asyncio.current_task()
        assert task is not None
        with scope:
            async with serving(App(), stop_on_signals=True):
                signal.raise_signal(signal.SIGTERM)
                asyncio.get_running_loop().call_soon(task.cancel if native else scope.cancel)
                await asyncio.Event().wait()
            came_out.append("of the block")

    came_out: list[str] = []
    scope = anyio.CancelScope()
    task = asyncio.create_task(block())
    await asyncio.wait({task})

    assert task.cancelled() == native
    assert came_out == []
    assert task.cancelling() == int(native)


@pytest.mark.parametrize("way", [by_serving, by_start])
async def test_second_stop_signal_says_that_it_forces(
    way: Way, calls: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """By its own name, in a warning, which is seen where no logging is set up."""
    app = App()
    tasks = []
    url = ""

    async def body(server: Server) -> None:
        nonlocal url
        url = server.url
        tasks.append(asyncio.create_task(ask(server)))
        await app.holding.wait()

    async def ask(server: Server) -> None:
        async with connect(server) as client:
            client.ask("/hold")
            await server.stopping.wait()
            signal.raise_signal(signal.SIGTERM)
            await asyncio.sleep(0)
            signal.raise_signal(signal.SIGINT)
            await client.rest()

    await way(app, body, stop_on_signals=True)
    await asyncio.wait(tasks)
    lines = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert lines[0] == f"SIGINT: a second signal forces the stop of {url}"
    assert lines[1].startswith(f"{url}: forced shutdown: ")


async def test_second_stop_signal_cancels_the_body_again(calls: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """Otherwise a clean-up that hangs could only be killed."""
    seen = []

    async with serving(App(), stop_on_signals=True) as server:
        try:
            signal.raise_signal(signal.SIGTERM)
            await asyncio.Event().wait()
        finally:
            signal.raise_signal(signal.SIGTERM)
            try:
                await asyncio.Event().wait()
            finally:
                seen.append("over")

    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    assert seen == ["over"]
    assert f"SIGTERM: a second signal forces the stop of {server.url}" in caplog.messages


async def test_stop_signal_ends_a_block_whose_server_has_closed(calls: list[str]) -> None:
    """The signals are handled as long as the block runs."""
    async with serving(App(), stop_on_signals=True) as server:
        server.close()
        await server.wait_closed()
        signal.raise_signal(signal.SIGTERM)
        await asyncio.Event().wait()
    assert calls == []


async def test_stop_signal_ends_all_servers_that_handle_it(calls: list[str]) -> None:
    """And no other server."""
    both = await start(App(), stop_on_signals=True)
    another = await start(App(), stop_on_signals=[signal.SIGUSR1])
    async with serving(App(), stop_on_signals=[signal.SIGTERM]), serving(App()) as without:
        signal.raise_signal(signal.SIGTERM)
        await both.wait_closed()
        assert another.is_serving()
        assert without.is_serving()
        await asyncio.Event().wait()
    await another.aclose()


async def test_stop_signal_during_the_start_raises_in_a_waiting_task_group(calls: list[str]) -> None:
    """`serve()` returns only where nobody waits for the server: here there is no server to return."""
    with pytest.raises(ExceptionGroup) as caught:
        async with anyio.create_task_group() as group:
            app = App(startup="hangs")
            asyncio.get_running_loop().call_later(0.01, signal.raise_signal, signal.SIGTERM)
            await group.start(functools.partial(serve, app, stop_on_signals=True))
    assert caught.group_contains(StartupInterruptedError, match="SIGTERM stopped")


async def test_stop_signal_while_a_host_name_is_resolved_gives_the_start_up(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing has been bound."""
    asked = threading.Event()
    answer = threading.Event()
    literal = os.strerror  # any function will do: the name is resolved in a thread

    def slowly(host: str, flags: int) -> Any:
        if threading.current_thread() is threading.main_thread():
            raise OSError(literal(22))
        asked.set()
        answer.wait()
        return []

    monkeypatch.setattr("aioserve._net.listeners._getaddrinfo", slowly)
    monkeypatch.setattr("aioserve._net.listeners._parse", lambda host: (_ for _ in ()).throw(UnicodeError))
    starting = asyncio.create_task(start(App(), host="slow.test", stop_on_signals=True))
    while not asked.is_set():
        await asyncio.sleep(0)
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(StartupInterruptedError, match="SIGTERM stopped the server before it had started"):
        await starting
    answer.set()
    for thread in threading.enumerate():
        if thread.name.startswith("aioserve-resolve"):
            thread.join()
