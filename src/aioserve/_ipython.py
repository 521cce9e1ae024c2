"""Where IPython runs the loop: in a terminal it does so only while a cell runs, unless it was told otherwise."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from aioserve._log import logger


def warn_if_loop_pauses(url: str) -> None:
    """Log it if the running loop is that of IPython in a terminal, and stands still at the prompt."""
    ipython: Any = sys.modules.get("IPython")
    shell: Any = getattr(ipython, "get_ipython", lambda: None)()
    if not any(each.__name__ == "TerminalInteractiveShell" for each in type(shell).__mro__):
        return  # no IPython, or a notebook, whose loop always runs
    # `get_asyncio_loop()` returns any running loop; this is the one that it has made for the cells.
    its_loop = getattr(sys.modules.get("IPython.core.async_helpers"), "_asyncio_event_loop", None)
    if getattr(shell, "active_eventloop", None) != "asyncio" and asyncio.get_running_loop() is its_loop:
        logger.warning(
            "%s answers only while a cell runs, since IPython's loop stands still at the prompt; enter %%gui asyncio",
            url,
        )
