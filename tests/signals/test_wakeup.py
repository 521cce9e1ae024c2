"""
A stop signal wakes the loop, also one that does not interrupt its sleep; and Python's wake-up descriptor is restored.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from aioserve import serving, start
from tests.helpers import not_portable
from tests.helpers.apps import App
from tests.helpers.programs import Program


def current() -> int:
    """Return the wake-up descriptor, which can only be read by replacing it."""
    fd = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(fd, warn_on_full_buffer=False)
    return fd


IN_A_THREAD = """
import asyncio, signal, sys, threading
from aioserve import serving
from tests.conftest import LOOPS
from tests.helpers.apps import App

def work():
    sys.stdin.read(1)
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

async def main():
    async with serving(App(), stop_on_signals=True):
        if sys.argv[2:]:
            asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, print)
        threading.Thread(target=work).start()
        print("serving")
        await asyncio.Event().wait()
    print("closed")

with asyncio.Runner(**LOOPS[sys.argv[1]]) as runner:
    runner.run(main())
"""


@pytest.mark.parametrize("own", [[], ["and a handler of the program's"]], ids=["", "beside another"])
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.skipif(sys.platform != "linux", reason="it has to know when the program is asleep")
def test_stop_signal_that_another_thread_gets_wakes_the_loop(loop: str, own: list[str]) -> None:
    """
    The kernel may give a signal to any thread; then the sleep of the loop, in the main thread, is not interrupted.

    So it is with a signal that comes right before that sleep.
    """
    reading, writing = os.pipe()
    with (
        os.fdopen(writing, "wb", buffering=0) as stdin,
        Program("-c", IN_A_THREAD, loop, *own, stdin=reading) as program,
    ):
        os.close(reading)
        program.wait_for("serving")
        program.wait_until_asleep()
        stdin.write(b"!")
        assert program.end() == (0, "")
    assert program.said == ["serving", "closed"]


async def test_wakeup_descriptor_is_restored(calls: list[str]) -> None:
    """It is the same before and after, and no descriptor is left open."""
    before = current()
    async with serving(App()):
        assert current() == before
    async with serving(App(), stop_on_signals=True):
        assert current() != -1
    assert current() == before


async def test_wakeup_descriptor_stays_until_the_last_server_has_closed(calls: list[str]) -> None:
    """In whichever order they close."""
    before = current()
    for first in (0, 1):
        servers = [await start(App(), stop_on_signals=True), await start(App(), stop_on_signals=[signal.SIGTERM])]
        await servers[first].aclose()
        assert current() != -1
        await servers[1 - first].aclose()
        assert current() == before


async def test_wakeup_descriptor_of_somebody_else_is_left_alone(calls: list[str]) -> None:
    """One that was there before, and one that comes later."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    before = signal.set_wakeup_fd(theirs.fileno())
    async with serving(App(), stop_on_signals=True):
        assert current() == theirs.fileno()
    assert signal.set_wakeup_fd(before, warn_on_full_buffer=False) == theirs.fileno()

    async with serving(App(), stop_on_signals=True):
        signal.set_wakeup_fd(theirs.fileno())
    assert signal.set_wakeup_fd(before, warn_on_full_buffer=False) == theirs.fileno()

    async with serving(App(), stop_on_signals=True):
        signal.set_wakeup_fd(theirs.fileno())
        theirs.close()  # its owner has forgotten it
    signal.set_wakeup_fd(before, warn_on_full_buffer=False)
    ours.close()


@not_portable.loops_signals
async def test_signal_handlers_of_the_loop_work_during_and_after_a_server(calls: list[str]) -> None:
    """asyncio's loop sets its wake-up descriptor with its first handler, and unsets it with its last."""
    loop = asyncio.get_running_loop()
    before = current()
    for when in ("before", "during"):
        if when == "before":
            loop.add_signal_handler(signal.SIGUSR1, calls.append, when)
        async with serving(App(), stop_on_signals=True):
            if when == "during":
                loop.add_signal_handler(signal.SIGUSR1, calls.append, when)
            await called(calls, when)
        await called(calls, when)
        loop.remove_signal_handler(signal.SIGUSR1)
    async with serving(App(), stop_on_signals=True):
        loop.add_signal_handler(signal.SIGUSR1, calls.append, "")
        loop.remove_signal_handler(signal.SIGUSR1)
    assert current() == before


async def called(calls: list[str], when: str) -> None:
    signal.raise_signal(signal.SIGUSR1)
    while calls != [when]:
        await asyncio.sleep(0)
    calls.clear()


def test_signal_after_the_loop_was_closed_under_its_server_is_written_to_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop's descriptors are closed, and their numbers are those of other files."""

    async def leave() -> int:
        await start(App(), stop_on_signals=[signal.SIGUSR1], lifespan="off")
        number: int = asyncio.get_running_loop()._csock.fileno()  # type: ignore[attr-defined]
        return number

    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # nobody reads what Python writes
    calls: list[int] = []
    handler = signal.signal(signal.SIGUSR1, lambda signum, _: calls.append(signum))
    before = current()
    loop = asyncio.new_event_loop()
    number = loop.run_until_complete(leave())
    loop.close()
    with ExitStack() as files:
        for name in range(number):
            files.enter_context((tmp_path / str(name)).open("wb"))
        os.fstat(number)
        signal.raise_signal(signal.SIGUSR1)
    assert calls == [signal.SIGUSR1]
    assert [each.read_bytes() for each in tmp_path.iterdir() if each.read_bytes()] == []
    gc.collect()
    assert current() == before
    signal.signal(signal.SIGUSR1, handler)
