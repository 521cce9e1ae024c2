"""
What the tests of signals share: a host program with handlers of its own.
"""

from __future__ import annotations

import functools
import signal
from collections.abc import AsyncIterator
from types import FrameType

import pytest


def note(called: list[str], name: str, signum: int, frame: FrameType | None) -> None:
    called.append(name)


@pytest.fixture
async def calls() -> AsyncIterator[list[str]]:
    """Install handlers of a host for SIGUSR1 and SIGTERM, which record their calls."""
    called: list[str] = []
    before = {}
    for each in (signal.SIGUSR1, signal.SIGTERM):
        before[each] = signal.signal(each, functools.partial(note, called, "host"))
    yield called
    for signum, handler in before.items():
        signal.signal(signum, handler)
