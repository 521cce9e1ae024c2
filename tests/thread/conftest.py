"""
The loops of the threads: those that `--loop` chooses; and interruptions of the main thread.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from tests.conftest import LOOPS
from tests.helpers.apps import AppError


@pytest.fixture(autouse=True)
def loop_of_the_thread(loop_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let threads have the chosen loop, as the policy of a program would."""
    options = LOOPS[loop_name]
    make = options.get("loop_factory", asyncio.new_event_loop)

    def new_event_loop() -> asyncio.AbstractEventLoop:
        loop: asyncio.AbstractEventLoop = make()
        loop.set_debug(options.get("debug", False))
        return loop

    monkeypatch.setattr("asyncio.events.new_event_loop", new_event_loop)


@pytest.fixture
def interrupt() -> Iterator[Callable[[], None]]:
    """
    Have a function that lets a signal's handler raise `AppError` once in the main thread, called in another one.

    It repeats the signal until it has been handled: one that comes just before CPython waits for a lock, and so after
    it has looked for signals, does not interrupt that wait.
    """
    is_handled = threading.Event()

    def handle(signum: int, _: object) -> None:
        if not is_handled.is_set():
            is_handled.set()
            raise AppError(signal.Signals(signum).name)

    def interrupt_main_thread() -> None:
        while not is_handled.is_set():
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
            is_handled.wait(0.01)

    before = signal.signal(signal.SIGUSR1, handle)
    yield interrupt_main_thread
    with suppress(AppError):  # of a test that has failed before the signal came
        signal.signal(signal.SIGUSR1, before)
