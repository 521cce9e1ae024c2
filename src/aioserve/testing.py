"""
Tests against a real server, without fixtures: the same pieces as blocks.

    async with testing.client(app) as client:
        assert (await client.get("/")).status_code == 200

Servers for tests differ from others in two defaults:

- ``disconnect_after=0``: when a test is over, nobody reads its endless streams any more;
- ``shutdown_timeout=1``: a handler that is still at work then has been forgotten, or hangs. A second is long for what a
  handler may still do behind its response, and short for whoever waits for the result of a broken test.

And what is only logged elsewhere fails a test here: handlers that had to be cancelled, connections that had to be
dropped. What has gone wrong with a server, or had to be forced, is raised where it is closed; unless the test has
awaited its end itself (`Server.aclose()`, `Server.wait_closed()`), and so has heard of it.

Servers are started by `aioserve.start()`, which cancels nobody if one dies: fixtures share their task with tests.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import ssl
import sys
import threading
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import unquote

import uvicorn
from anyio.from_thread import start_blocking_portal

from aioserve._leaks import assert_nothing_left
from aioserve._options import Options
from aioserve._server import Server
from aioserve._serving import start
from aioserve._shutdown import in_one_line

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping
    from types import TracebackType
    from typing import Self, Unpack

    import httpx
    import trustme
    from anyio.from_thread import BlockingPortal

    from aioserve._options import App

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

SHUTDOWN_TIMEOUT = 1.0


@asynccontextmanager
async def server(app: App, **options: Unpack[Options]) -> AsyncIterator[Server]:
    """
    Serve an ASGI app for a block of a test.

    Args:
        app: As in `aioserve.serving()`.
        options: As in `aioserve.serving()`; but `disconnect_after` is 0 by default, and `shutdown_timeout` 1 second.

    Yields:
        Server: It says where it listens.

    Raises:
        AssertionError: At the end, handlers had to be cancelled, or connections dropped; the message says which.
        ServerCrashedError: The app's lifespan died in the block; this is raised at its end.
        OSError, StartupError, ShutdownError, TypeError, ValueError, RuntimeError: As in `aioserve.serving()`.
    """
    async with _Judged(await start(app, **_for_tests(app, options))) as running:
        yield running


@asynccontextmanager
async def client(app_or_server: App | Server, /, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    """
    Open an HTTP client for an app, which is served meanwhile, or for a server.

        async with testing.client(app) as client:
            response = await client.get("/")

    It is an `httpx.AsyncClient`, or an `httpx2.AsyncClient` where only that is installed, that has the server's address
    as its `base_url`, reaches it also on a Unix socket, trusts the certificate authority of `tls()` and no other, and
    reads no proxies from the environment (``trust_env=False``).

    Args:
        app_or_server: What `server()` takes, or a `Server` that is running already.
        options: Those of `httpx.AsyncClient`. For a server with options, start that first.

    Yields:
        httpx.AsyncClient: It is closed before the server is.

    Raises:
        ModuleNotFoundError: Neither httpx nor httpx2 is installed; the extra ``testing`` has the first.
        AssertionError, ServingError, OSError, TypeError, ValueError, RuntimeError: As in `server()`.
    """
    async with AsyncExitStack() as stack:
        running = app_or_server
        if not isinstance(running, Server):
            running = await stack.enter_async_context(server(running))
        yield await stack.enter_async_context(_make_client(running.url, options))


@contextmanager
def live_server(app: App, **options: Unpack[Options]) -> Iterator[Server]:
    """
    Serve an ASGI app in a thread, for a block of a synchronous test.

        with testing.live_server(app) as live:
            response = requests.get(live.url)

    Args:
        app: As in `aioserve.serving()`.
        options: As in `server()`.

    Yields:
        Server: It says where it listens; of its methods, only `close()` is for other threads than its own.

    Raises:
        AssertionError, ServingError, OSError, TypeError, ValueError: As in `server()`.
    """
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(server(app, **options)) as running:
        yield running


@dataclass(frozen=True)
class TLS:
    """A certificate authority for tests, and both ends of a connection that trusts it."""

    server: ssl.SSLContext
    """With a certificate for ``localhost``, ``127.0.0.1`` and ``::1``: ``start(app, ssl=tls.server)``."""
    client: ssl.SSLContext
    """Trusts this authority and no other: ``httpx.AsyncClient(verify=tls.client)``."""
    ca: trustme.CA
    """
    The authority itself.

    It issues other certificates, and is a file for those who need one: ``with tls.ca.cert_pem.tempfile() as path``.
    """


def tls() -> TLS:
    """
    Return a throw-away certificate authority, the same one in all of the process: making keys takes time.

    Raises:
        ModuleNotFoundError: trustme is not installed; the extra ``testing`` has it.
    """
    return _make_tls()


class ServerFactory(Protocol):
    """The type of the fixture `aioserve_server`."""

    async def __call__(self, app: App, /, **options: Unpack[Options]) -> Server:
        """Start serving an app until the end of the fixture's scope; arguments and errors are those of `server()`."""


class ClientFactory(Protocol):
    """The type of the fixture `aioserve_client`."""

    async def __call__(self, app_or_server: App | Server, /, **options: Any) -> httpx.AsyncClient:
        """Open a client until the end of the fixture's scope; arguments and errors are those of `client()`."""


class LiveServerFactory(Protocol):
    """The type of the fixture `aioserve_live_server`."""

    def __call__(self, app: App, /, **options: Unpack[Options]) -> Server:
        """
        Serve an app in a thread until the end of the fixture's scope; arguments and errors are those of
        `live_server()`.
        """


class Opened:
    """
    Servers and clients that are opened one by one, and closed in reverse order: what the fixtures hand out.

    All are closed, whatever happens to some; what went wrong with several is raised as one group.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stack = AsyncExitStack()
        self._failures: list[Exception] = []

    async def server(self, app: App, /, **options: Unpack[Options]) -> Server:
        """Be a `ServerFactory`."""
        self._check_loop()
        judged = _Judged(await start(app, **_for_tests(app, options)))
        self._stack.push_async_callback(self._close, judged)
        return judged.server

    async def client(self, app_or_server: App | Server, /, **options: Any) -> httpx.AsyncClient:
        """Be a `ClientFactory`."""
        self._check_loop()
        running = app_or_server if isinstance(app_or_server, Server) else await self.server(app_or_server)
        opened = _make_client(running.url, options)
        self._stack.push_async_callback(self._close, opened)
        return opened

    async def _close(self, opened: httpx.AsyncClient | _Judged) -> None:
        __tracebackhide__ = True
        try:
            await opened.__aexit__(None, None, None)
        except Exception as exc:  # noqa: BLE001 (the others are to be closed, too)
            self._failures.append(exc)

    def _check_loop(self) -> None:
        if asyncio.get_running_loop() is not self._loop:
            raise RuntimeError(
                "this fixture of aioserve lives in another event loop than the test. With pytest-asyncio, give the "
                "tests of a module the loop of the fixture's scope: pytestmark = pytest.mark.asyncio(loop_scope=...), "
                "or asyncio_default_test_loop_scope in its configuration. With anyio's plugin beside it, set both "
                "anyio_mode and asyncio_mode to strict"
            )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        __tracebackhide__ = True
        await self._stack.aclose()
        if len(self._failures) > 1:
            raise ExceptionGroup("not all has ended well", self._failures[::-1])
        for failure in self._failures:
            raise failure


class LiveServers:
    """The same for servers in a thread, which starts with the first of them."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._starting = threading.Lock()
        self._portal: BlockingPortal | None = None
        self._opened: Opened

    def start(self, app: App, /, **options: Unpack[Options]) -> Server:
        """Be a `LiveServerFactory`."""
        with self._starting:
            if self._portal is None:
                portal = self._stack.enter_context(start_blocking_portal())
                opened = portal.call(Opened)
                self._opened = self._stack.enter_context(portal.wrap_async_context_manager(opened))
                self._portal = portal
        return self._portal.call(functools.partial(self._opened.server, app, **options))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        __tracebackhide__ = True
        self._stack.close()


class _Judged:
    """A server at whose end it is an error if something had to be forced."""

    def __init__(self, server: Server) -> None:
        self.server = server

    async def __aenter__(self) -> Server:
        return self.server

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        __tracebackhide__ = True
        if self.server._awaited:
            return
        try:
            await self.server.__aexit__(exc_type, exc, tb)
        except BaseException as failure:
            failure.add_note(f"aioserve: this happened to {self.server.url}")
            if forced := self._forced():
                failure.add_note(f"aioserve: {forced}")
            raise
        if not (forced := self._forced()):
            return
        if exc is None:
            raise AssertionError(
                f"{forced}. End in the test what it began, find out why the handler does not end, or give the server "
                "more shutdown_timeout"
            )
        exc.add_note(f"aioserve: {forced}")

    def _forced(self) -> str | None:
        report = self.server.report
        if report is None or not (report.aborted or report.cancelled):
            return None  # a lifespan that is stuck has been raised
        line = in_one_line(self.server.url, report.aborted, report.persuaded, report.cancelled)
        if any(handler.stuck for handler in report.cancelled) and sys.__stderr__ is not None:
            # What pytest captures is not shown before the test ends; and it may not, since a loop waits at its end.
            print(f"\naioserve: {line}", file=sys.__stderr__, flush=True)
        return line


def _for_tests(app: App, options: Options) -> Options:
    """Complete the options with the defaults for tests."""
    defaults: Options = {"disconnect_after": 0}
    if not (isinstance(app, uvicorn.Config) and app.timeout_graceful_shutdown is not None):
        defaults["shutdown_timeout"] = SHUTDOWN_TIMEOUT
    return {**defaults, **options}


def _make_client(url: str, options: Mapping[str, Any]) -> httpx.AsyncClient:
    module = _import("httpx", "httpx2")
    for name in options.keys() & Options.__optional_keys__ - inspect.signature(module.AsyncClient).parameters.keys():
        raise TypeError(f"{name} is an option of a server, not of a client: start the server first, and give it in")
    scheme, _, where = url.partition("://")
    if "verify" not in options:
        options = {**options, "verify": tls().client if scheme.startswith("https") else _trusting_nobody()}
    if scheme.endswith("+unix"):
        url = f"{scheme.removesuffix('+unix')}://localhost"
        said = {name: options[name] for name in ("verify", "http1", "http2", "limits") if name in options}
        options = {"transport": module.AsyncHTTPTransport(uds=unquote(where), trust_env=False, **said), **options}
    made: httpx.AsyncClient = module.AsyncClient(**{"base_url": url, "trust_env": False, **options})
    return made


@functools.cache
def _trusting_nobody() -> ssl.SSLContext:
    """A context for clients of plain HTTP: loading the usual certificates takes longer than a server's whole life."""
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


@functools.cache
def _make_tls() -> TLS:
    ca = _import("trustme").CA()
    made = TLS(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), ca)
    ca.issue_cert("localhost", "127.0.0.1", "::1").configure_cert(made.server)
    ca.configure_trust(made.client)
    return made


def _import(*names: str) -> Any:
    """Import the first of these modules that is installed."""
    for name in names:
        try:
            return import_module(name)
        except ModuleNotFoundError as exc:
            if exc.name != name:
                raise
    raise ModuleNotFoundError(
        f"{names[0]} is not installed; pip install 'aioserve-asgi[testing]' brings it", name=names[0]
    )
