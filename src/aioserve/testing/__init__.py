"""
Real servers and clients for tests, as context managers. The pytest plugin has fixtures for the same.

    async with testing.client(app) as client:
        assert (await client.get("/")).status_code == 200

Two defaults are different for servers in tests:

- ``disconnect_after=0``: endless streams end with the test, since nobody reads them any more.
- ``shutdown_timeout=1``: a handler that runs longer hangs, or was forgotten. One second is enough for work after the
  response, and short if a test is broken.

A test fails if its server had to cancel handlers or drop connections, which are only logged elsewhere, and if its
server failed. The error is raised when the server closes, unless the test itself has awaited that with
`Server.aclose()` or `Server.wait_closed()`.

What leaves the app is raised by the client whose request caused it, as with `httpx.ASGITransport`; see `client()`.

A server that crashes does not cancel the test, because fixtures and tests can share a task.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aioserve.testing.clients import TLS, client, tls
    from aioserve.testing.fixtures import ClientFactory, LiveServerFactory, ServerFactory
    from aioserve.testing.leaks import assert_nothing_left
    from aioserve.testing.servers import live_server, server

__all__ = [
    "ClientFactory",
    "LiveServerFactory",
    "ServerFactory",
    "TLS",
    "assert_nothing_left",
    "client",
    "live_server",
    "server",
    "tls",
]


if not TYPE_CHECKING:  # or a type checker would accept any name

    def __getattr__(name: str) -> object:
        if name in __all__:
            for module in ("leaks", "servers", "clients", "fixtures"):  # what imports least, first
                if hasattr(found := import_module(f"{__name__}.{module}"), name):
                    value = globals()[name] = getattr(found, name)
                    return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
