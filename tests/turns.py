"""
The clock of these tests: the turns of the loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

MANY_TURNS = 50


def after(turns: int, act: Callable[[], object]) -> None:
    """Do something when the loop has turned so many times."""
    if turns == 0:
        act()
    else:
        asyncio.get_running_loop().call_soon(after, turns - 1, act)


async def turns(count: int = MANY_TURNS) -> None:
    for _ in range(count):
        await asyncio.sleep(0)
