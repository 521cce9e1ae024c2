"""HTTP clients for tests, and certificates that they trust."""

from __future__ import annotations

import functools
import inspect
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from aioserve._options import App, Options
from aioserve._server import Server
from aioserve.testing.servers import server

if TYPE_CHECKING:
    import httpx
    import trustme


@asynccontextmanager
async def client(app_or_server: App | Server, /, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    """
    Open an HTTP client for an app, which is served for the block, or for a running server.

        async with testing.client(app) as client:
            response = await client.get("/")

    It is an `httpx.AsyncClient`, or an `httpx2.AsyncClient` if only that is installed. Its `base_url` is the server's;
    it also reaches a server on a Unix socket. It trusts the certificate authority of `tls()` and no other, and reads no
    proxies from the environment (``trust_env=False``).

    Args:
        app_or_server: What `server()` takes, or a `Server` that is running already.
        options: Those of `httpx.AsyncClient`. For options of the server, start that first.

    Yields:
        httpx.AsyncClient: It is closed before the server is.

    Raises:
        ModuleNotFoundError: Neither httpx nor httpx2 is installed; the extra ``testing`` installs httpx.
        AssertionError, ServingError, OSError, TypeError, ValueError, RuntimeError: As in `server()`.
    """
    async with AsyncExitStack() as stack:
        running = app_or_server
        if not isinstance(running, Server):
            running = await stack.enter_async_context(server(running))
        yield await stack.enter_async_context(make_client(running.url, options))


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


def make_client(url: str, options: Mapping[str, Any]) -> httpx.AsyncClient:
    """Return a client for the server at this URL, with the options of `client()`."""
    module = _import("httpx", "httpx2")
    for name in options.keys() & Options.__optional_keys__ - inspect.signature(module.AsyncClient).parameters.keys():
        raise TypeError(f"{name} is an option of a server, not of a client; start the server first, and pass that")
    scheme, _, address = url.partition("://")
    if "verify" not in options:
        options = {**options, "verify": tls().client if scheme.startswith("https") else _empty_context()}
    if scheme.endswith("+unix"):
        url = f"{scheme.removesuffix('+unix')}://localhost"
        passed = {name: options[name] for name in ("verify", "http1", "http2", "limits") if name in options}
        options = {"transport": module.AsyncHTTPTransport(uds=unquote(address), trust_env=False, **passed), **options}
    made: httpx.AsyncClient = module.AsyncClient(**{"base_url": url, "trust_env": False, **options})
    return made


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
    for name in names:
        try:
            return import_module(name)
        except ModuleNotFoundError as exc:
            if exc.name != name:
                raise
    raise ModuleNotFoundError(
        f"{names[0]} is not installed; install it with pip install 'aioserve-asgi[testing]'", name=names[0]
    )
