"""
The loops of the threads: those that `--loop` chooses.
"""

from __future__ import annotations

import asyncio

import pytest

from tests.conftest import LOOPS


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
