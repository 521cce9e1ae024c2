"""
Signal handlers: when the servers have closed, they are what they were.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

from aioserve import _signals, start
from aioserve._signals import Signals
from tests.helpers.apps import App
from tests.signals.conftest import note


async def test_two_servers_restore_the_signal_handlers_in_either_order(calls: list[str]) -> None:
    """The handlers are restored when the second one has closed."""
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    for first in (0, 1):
        servers = [await start(App(), stop_on_signals=True), await start(App(), stop_on_signals=True)]
        await servers[first].aclose()
        assert {each: signal.getsignal(each) for each in before} != before
        await servers[1 - first].aclose()
        assert {each: signal.getsignal(each) for each in before} == before


def interleavings() -> Iterator[tuple[str, ...]]:
    """Yield all orders of two servers, and of a host that sets a handler, and may restore what it found."""
    for steps in (("A+", "A-", "B+", "B-", "H+"), ("A+", "A-", "B+", "B-", "H+", "H-")):
        for order in itertools.permutations(steps):
            if all(order.index(f"{each}+") < order.index(f"{each}-") for each in "ABH" if f"{each}-" in order):
                yield order


async def test_signal_handlers_are_restored_in_every_order(calls: list[str]) -> None:
    """A handler that the host sets in the meantime stays; one that it restores does what the original one did."""
    tried = 0
    original = signal.getsignal(signal.SIGUSR1)
    hosts = functools.partial(note, calls, "newer")
    for order in interleavings():
        asking: dict[str, Signals] = {}
        found: Any = None
        for step in order:
            match step:
                case "H+":
                    found = signal.signal(signal.SIGUSR1, hosts)
                case "H-":
                    signal.signal(signal.SIGUSR1, found)
                case "A+" | "B+":
                    asking[step[0]] = Signals([signal.SIGUSR1])
                    asking[step[0]].install()
                case "A-" | "B-":
                    asking.pop(step[0]).release()
            # Each server gets the signal, if the installed handler is that of aioserve.
            signal.raise_signal(signal.SIGUSR1)
            if asking and isinstance(signal.getsignal(signal.SIGUSR1), _signals._Handler):
                assert calls == [], order
                assert all(each.count for each in asking.values()), order
            else:
                assert len(calls) == 1, order
            calls.clear()

        last = signal.getsignal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGUSR1)
        assert calls == ["newer" if "H-" not in order else "host"], order
        if "H-" not in order:
            assert last is hosts, order
        elif not isinstance(
            last, _signals._Handler
        ):  # the host has restored a handler of aioserve that is no longer needed
            assert last is original, order
        calls.clear()

        # And the next server restores the original handler.
        last_one = Signals([signal.SIGUSR1])
        last_one.install()
        last_one.release()
        if "H-" in order:
            assert signal.getsignal(signal.SIGUSR1) is original, order
        signal.signal(signal.SIGUSR1, original)
        tried += 1
    assert tried == 30 + 90


async def test_host_that_chains_to_a_handler_of_aioserve_reaches_the_original_one(calls: list[str]) -> None:
    """After the server has closed, the handler of aioserve passes the signal to the one that it had replaced."""
    ours = Signals([signal.SIGUSR1])
    ours.install()
    found = signal.getsignal(signal.SIGUSR1)
    assert callable(found)

    def chaining(signum: int, frame: FrameType | None) -> None:
        calls.append("chaining")
        found(signum, frame)

    signal.signal(signal.SIGUSR1, chaining)
    signal.raise_signal(signal.SIGUSR1)
    assert (calls, ours.count) == (["chaining"], 1)
    ours.release()
    signal.raise_signal(signal.SIGUSR1)
    assert (calls, ours.count) == (["chaining", "chaining", "host"], 1)


def test_handler_of_an_asyncio_runner_is_not_restored_after_its_run() -> None:
    """`asyncio.Runner` handles SIGINT during one `run()`; a server that lives longer must not restore that handler."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    try:
        with asyncio.Runner() as runner:
            server = runner.run(start(App(), stop_on_signals=True))
            assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
            runner.run(server.aclose())
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_server_that_is_never_closed_restores_the_signal_handlers() -> None:
    """It ends with its loop."""
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    asyncio.run(leave())
    after = {each: signal.getsignal(each) for each in before}
    assert after == {**before, signal.SIGINT: before[signal.SIGINT]}


async def leave() -> None:
    await start(App(), stop_on_signals=True)
