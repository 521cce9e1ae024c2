"""
Turns of the loop, which tests wait for instead of the clock.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

# After so many turns, everything has happened that needs no clock.
MANY_TURNS = 50

# A short time in seconds, for tests in which time has to pass; nothing depends on how short it is.
MOMENT = 0.05


def after(turns: int, act: Callable[[], object]) -> None:
    """Do something after a number of turns."""
    if turns == 0:
        act()
    else:
        asyncio.get_running_loop().call_soon(after, turns - 1, act)


async def turns(count: int = MANY_TURNS) -> None:
    for _ in range(count):
        await asyncio.sleep(0)
