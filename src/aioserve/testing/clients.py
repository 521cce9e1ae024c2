"""HTTP clients for tests, and certificates that they trust."""

from __future__ import annotations

import functools
import inspect
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar, overload
from urllib.parse import unquote

from aioserve._options import App, Options
from aioserve._server import Server
from aioserve.testing.app_errors import RaisingTransport
from aioserve.testing.servers import server

if TYPE_CHECKING:
    import httpx
    import httpx2
    import trustme

    Client = TypeVar("Client", bound=httpx.AsyncClient | httpx2.AsyncClient)

_OF_TRANSPORT = ("verify", "cert", "http1", "http2", "limits")


@overload
def client(
    app_or_server: App | Server, /, *, client_class: type[Client], raise_app_exceptions: bool = True, **options: Any
) -> AbstractAsyncContextManager[Client]: ...
@overload
def client(
    app_or_server: App | Server, /, *, client_class: None = None, raise_app_exceptions: bool = True, **options: Any
) -> AbstractAsyncContextManager[httpx2.AsyncClient]: ...


@asynccontextmanager
async def client(
    app_or_server: App | Server,
    /,
    *,
    client_class: type[Any] | None = None,
    raise_app_exceptions: bool = True,
    **options: Any,
) -> AsyncIterator[Any]:
    """
    Open an HTTP client for an app, which is served for the block, or for a running server.

        async with testing.client(app) as client:
            response = await client.get("/")

    It is an `httpx2.AsyncClient`, or an `httpx.AsyncClient` if httpx2 is not installed. Its `base_url` is the server's;
    it also reaches a server on a Unix socket. It trusts the certificate authority of `tls()` and no other, and reads no
    proxies from the environment (``trust_env=False``).

    An exception that leaves the app is raised by the request that caused it, as with `httpx.ASGITransport`: the very
    object, also where a 500 was sent before, or a part of the response. If the response is a 500, or breaks off, the
    end of the app's call is awaited for that, for 1 second at most; else nothing is, so that background tasks and
    endless streams delay no test, and an exception that comes after the response was read is not raised. pytest's
    report of a test that fails shows that one in a section of its own; also what was raised for other clients, or in
    WebSockets.

    Args:
        app_or_server: What `server()` takes, or a `Server` that is running already.
        client_class: `httpx.AsyncClient`, `httpx2.AsyncClient`, or a class derived from one of them.
        raise_app_exceptions: Whether to raise what leaves the app; `False` returns the 500 that other clients get. It
            is `False` for requests that go through a `transport` of your own, a `proxy` or `mounts`, unless the
            transport is an `AsyncHTTPTransport`.
        options: Those of the client class. For options of the server, start that first.

    Yields:
        httpx2.AsyncClient: It is closed before the server is.

    Raises:
        ModuleNotFoundError: Neither httpx2 nor httpx is installed; the extra ``testing`` installs httpx2.
        Exception: What leaves the app.
        AssertionError, ServingError, OSError, TypeError, ValueError, RuntimeError: As in `server()`.
    """
    __tracebackhide__ = True
    async with AsyncExitStack() as stack:
        running = app_or_server
        if not isinstance(running, Server):
            running = await stack.enter_async_context(server(running))
        yield await stack.enter_async_context(make_client(running, options, raise_app_exceptions, client_class))


@dataclass(frozen=True)
class TLS:
    """A certificate authority for tests, and contexts for both ends of a connection."""

    server: ssl.SSLContext
    """With a certificate for ``localhost``, ``127.0.0.1`` and ``::1``: ``start(app, ssl=tls.server)``."""
    client: ssl.SSLContext
    """Trusts only this authority: ``httpx.AsyncClient(verify=tls.client)``."""
    ca: trustme.CA
    """Issues other certificates; as a file, its own is ``with tls.ca.cert_pem.tempfile() as path``."""


def tls() -> TLS:
    """
    Return a certificate authority for tests; the same one every time in a process, since making keys takes time.

    Raises:
        ModuleNotFoundError: trustme is not installed; the extra ``testing`` installs it.
    """
    return _make_tls()


def make_client(
    server: Server, options: Mapping[str, Any], raise_app_exceptions: bool, client_class: type[Any] | None
) -> Any:
    """Return a client for a server, with the options of `client()`."""
    __tracebackhide__ = True
    client_class = client_class or _default_client_class()
    base = next(each for each in client_class.__mro__ if each.__name__ == "AsyncClient")
    module = import_module(base.__module__.partition(".")[0])
    for name in options.keys() & Options.__optional_keys__:
        if name not in inspect.signature(base).parameters:
            raise TypeError(f"{name} is an option of a server, not of a client; start the server first, and pass that")
    url = server.url
    scheme, _, address = url.partition("://")
    if "verify" not in options:
        options = {**options, "verify": tls().client if scheme.startswith("https") else _empty_context()}
    if scheme.endswith("+unix"):
        url = f"{scheme.removesuffix('+unix')}://localhost"
    transport = options.get("transport")
    if transport is None:
        passed = {name: options[name] for name in _OF_TRANSPORT if name in options}
        path = unquote(address) if scheme.endswith("+unix") else None
        transport = module.AsyncHTTPTransport(uds=path, trust_env=False, **passed)
    if raise_app_exceptions and isinstance(transport, module.AsyncHTTPTransport):
        transport = RaisingTransport(transport, module, server)
    return client_class(**{"base_url": url, "trust_env": False, **options, "transport": transport})


def _default_client_class() -> Any:
    module = _import("httpx2", "httpx")
    return module.AsyncClient if module.__name__ == "httpx2" else _client_of_httpx(module.AsyncClient)


@functools.cache
def _client_of_httpx(base: type[Any]) -> type[Any]:
    """Return the class with errors that say what only httpx2 has."""

    class ClientOfHttpx(base):  # type: ignore[misc]
        def __getattr__(self, name: str) -> Any:
            also = "; httpx2 has one: pip install 'aioserve-asgi[testing]'" if name in ("sse", "websocket") else ""
            raise AttributeError(f"httpx's client has no {name}(){also}", name=name, obj=self)

    return ClientOfHttpx


@functools.cache
def _empty_context() -> ssl.SSLContext:
    """Return a context for plain HTTP; loading the usual certificates would take longer than a start and stop."""
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
    __tracebackhide__ = True
    for name in names:
        try:
            return import_module(name)
        except ModuleNotFoundError as exc:
            if exc.name != name:
                raise
    raise ModuleNotFoundError(
        f"{names[0]} is not installed; install it with pip install 'aioserve-asgi[testing]'", name=names[0]
    )
