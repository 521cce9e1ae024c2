"""What the fixtures of the pytest plugin return."""

from __future__ import annotations

import asyncio
import sys
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import TYPE_CHECKING, Any, Protocol, Self, Unpack, overload

from aioserve._options import App, Options
from aioserve._server import Server
from aioserve._thread import ThreadServer
from aioserve.testing.clients import make_client
from aioserve.testing.servers import hide_our_frames, start_checked, start_checked_in_thread

if TYPE_CHECKING:
    import httpx2

    from aioserve.testing.clients import Client


class ServerFactory(Protocol):
    """The type of the fixture `aioserve_server`."""

    async def __call__(self, app: App, /, **options: Unpack[Options]) -> Server:
        """Serve an app until the end of the fixture's scope; arguments and errors are those of `server()`."""


class ClientFactory(Protocol):
    """
    The type of the fixture `aioserve_client`.

    It opens a client until the end of the fixture's scope; arguments and errors are those of `client()`.
    """

    @overload
    async def __call__(
        self,
        app_or_server: App | Server,
        /,
        *,
        client_class: type[Client],
        raise_app_exceptions: bool = True,
        **options: Any,
    ) -> Client: ...
    @overload
    async def __call__(
        self,
        app_or_server: App | Server,
        /,
        *,
        client_class: None = None,
        raise_app_exceptions: bool = True,
        **options: Any,
    ) -> httpx2.AsyncClient: ...


class LiveServerFactory(Protocol):
    """The type of the fixture `aioserve_live_server`."""

    def __call__(self, app: App, /, **options: Unpack[Options]) -> Server:
        """Serve an app in a thread until the end of the scope; arguments and errors are those of `live_server()`."""


class Opened:
    """Opens servers and clients, and closes all in reverse order; the errors of several are raised as one group."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stack = AsyncExitStack()
        self._errors: list[Exception] = []

    async def server(self, app: App, /, **options: Unpack[Options]) -> Server:
        """Implement `ServerFactory`."""
        __tracebackhide__ = True
        self._check_loop()
        checked = await start_checked(app, options)
        self._stack.push_async_callback(self._close, checked)
        return checked.server

    async def client(
        self,
        app_or_server: App | Server,
        /,
        *,
        client_class: type[Any] | None = None,
        raise_app_exceptions: bool = True,
        **options: Any,
    ) -> Any:
        """Implement `ClientFactory`."""
        __tracebackhide__ = True
        self._check_loop()
        running = app_or_server if isinstance(app_or_server, Server) else await self.server(app_or_server)
        client = make_client(running, options, raise_app_exceptions, client_class)
        self._stack.push_async_callback(self._close, client)
        return client

    async def _close(self, opened: AbstractAsyncContextManager[Any]) -> None:
        __tracebackhide__ = True
        try:
            await opened.__aexit__(None, None, None)
        except Exception as exc:  # noqa: BLE001 (so that the others are closed, too)
            self._errors.append(exc)

    def _check_loop(self) -> None:
        __tracebackhide__ = True
        if asyncio.get_running_loop() is not self._loop:
            raise RuntimeError(
                "this fixture of aioserve runs in another event loop than the test. With pytest-asyncio, give the "
                "tests of a module the loop of the fixture's scope: pytestmark = pytest.mark.asyncio(loop_scope=...), "
                "or asyncio_default_test_loop_scope in the configuration. If anyio's plugin is used as well, set both "
                "anyio_mode and asyncio_mode to strict"
            )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, exc_type: object, exc: object, tb: object) -> None:
        __tracebackhide__ = True
        await self._stack.aclose()
        _raise_all(self._errors)


class LiveServers:
    """Opens servers, each in a thread of its own, and closes all in reverse order; errors are raised as of `Opened`."""

    def __init__(self) -> None:
        self._opened: list[ThreadServer] = []

    def start(self, app: App, /, **options: Unpack[Options]) -> Server:
        """Implement `LiveServerFactory`."""
        __tracebackhide__ = True
        live = start_checked_in_thread(app, options)
        self._opened.append(live)
        return live._server

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: object, exc: object, tb: object) -> None:
        __tracebackhide__ = True
        errors: list[Exception] = []
        for live in reversed(self._opened):
            try:
                live.stop()
            except Exception as raised:  # noqa: BLE001 (so that the others are closed, too)
                errors.append(raised)
        _raise_all(errors)


def _raise_all(errors: list[Exception]) -> None:
    # Of a group, pytest 8 needs a frame that is not hidden.
    __tracebackhide__ = len(errors) == 1 or getattr(sys.modules.get("pytest"), "version_tuple", (9,)) >= (9,)
    for error in errors:
        hide_our_frames(error)
    if len(errors) > 1:
        raise ExceptionGroup(f"{len(errors)} servers or clients failed to close", errors[::-1])
    for error in errors:
        raise error
