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
    from aioserve._errors import (
        ServerCrashedError,
        ServingError,
        ShutdownError,
        StartupError,
        StartupInterruptedError,
        StartupTimeoutError,
    )
    from aioserve._options import App, Options
    from aioserve._process.parent import ServerProcess, serving_process
    from aioserve._report import Report, Stats, UnfinishedHandler
    from aioserve._server import Server
    from aioserve._serving import serve, serving, start
    from aioserve._swappable import Swappable
    from aioserve._thread import ThreadServer, start_in_thread

    __version__: str

__all__ = [
    "App",
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
    "ThreadServer",
    "UnfinishedHandler",
    "serve",
    "serving",
    "serving_process",
    "start",
    "start_in_thread",
]

_NAMES = {
    "_errors": tuple(name for name in __all__ if name.endswith("Error")),
    "_options": ("App", "Options"),
    "_process.parent": ("ServerProcess", "serving_process"),
    "_report": ("Report", "Stats", "UnfinishedHandler"),
    "_server": ("Server",),
    "_serving": ("serve", "serving", "start"),
    "_swappable": ("Swappable",),
    "_thread": ("ThreadServer", "start_in_thread"),
}


if not TYPE_CHECKING:  # or a type checker would accept any name

    def __getattr__(name: str) -> object:
        for path, names in _NAMES.items():
            if name in names:
                module = import_module(f"{__name__}.{path}")
                # All of them, since the hints of one class can name another.
                globals().update((each, getattr(module, each)) for each in names)
                return globals()[name]
        if name == "__version__":
            from importlib.metadata import version  # which takes longer than all else here

            globals()[name] = version("aioserve-asgi")
            return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*__all__, "__version__"})
