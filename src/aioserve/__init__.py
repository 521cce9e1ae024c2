"""
Run an ASGI app on a real socket inside the event loop you already have.

    async with serving(app, port=8000) as server:
        print(server.url)
        await run_everything_else()

Importing this package costs nothing: each public name is loaded on its first use (PEP 562).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aioserve._errors import ServerCrashedError as ServerCrashedError
    from aioserve._errors import ServingError as ServingError
    from aioserve._errors import ShutdownError as ShutdownError
    from aioserve._errors import StartupError as StartupError
    from aioserve._errors import StartupInterruptedError as StartupInterruptedError
    from aioserve._errors import StartupTimeoutError as StartupTimeoutError
    from aioserve._options import App as App
    from aioserve._options import Options as Options
    from aioserve._process import ServerProcess as ServerProcess
    from aioserve._process import serving_process as serving_process
    from aioserve._server import Server as Server
    from aioserve._server import Stats as Stats
    from aioserve._serving import serve as serve
    from aioserve._serving import serving as serving
    from aioserve._serving import start as start
    from aioserve._shutdown import HeldUp as HeldUp
    from aioserve._shutdown import Report as Report
    from aioserve._swappable import Swappable as Swappable

__all__ = [
    "App",
    "HeldUp",
    "Options",
    "Report",
    "Server",
    "ServerCrashedError",
    "ServerProcess",
    "ServingError",
    "ShutdownError",
    "StartupError",
    "StartupInterruptedError",
    "StartupTimeoutError",
    "Stats",
    "Swappable",
    "serve",
    "serving",
    "serving_process",
    "start",
]

_HOME = {
    "App": "_options",
    "HeldUp": "_shutdown",
    "Options": "_options",
    "Report": "_shutdown",
    "Server": "_server",
    "ServerCrashedError": "_errors",
    "ServerProcess": "_process",
    "ServingError": "_errors",
    "ShutdownError": "_errors",
    "StartupError": "_errors",
    "StartupInterruptedError": "_errors",
    "StartupTimeoutError": "_errors",
    "Stats": "_server",
    "Swappable": "_swappable",
    "serve": "_serving",
    "serving": "_serving",
    "serving_process": "_process",
    "start": "_serving",
}


if not TYPE_CHECKING:  # a checker that saw this would take any misspelling for a name

    def __getattr__(name: str) -> object:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"aioserve.{_HOME[name]}"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
