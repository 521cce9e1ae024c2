"""
TLS: a ready context, uvicorn's options, client certificates, and new certificates while the server runs.
"""

from __future__ import annotations

import inspect
import ssl
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme
import uvicorn

from aioserve import Server, serving
from tests.helpers.apps import App
from tests.helpers.clients import Connection, connect_tls

HOST = "127.0.0.1"


def certify(authority: trustme.CA) -> ssl.SSLContext:
    """Make a server's context."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(HOST).configure_cert(context)
    return context


async def answers(server: Server, context: ssl.SSLContext) -> bool:
    async with httpx.AsyncClient(verify=context, trust_env=False) as client:
        return (await client.get(server.url)).text == "hello"


def serial(connection: Connection) -> str:
    """Return the serial number of the server's certificate."""
    certificate = connection.writer.get_extra_info("peercert")
    return str(certificate["serialNumber"])


async def test_ssl_context_is_served(authority: trustme.CA, trusting: ssl.SSLContext) -> None:
    """And the URL begins with https."""
    async with serving(App(), ssl=certify(authority)) as server:
        assert server.url == f"https://127.0.0.1:{server.port}"
        assert await answers(server, trusting)


async def test_tls_options_of_uvicorn_are_served(tls_options: dict[str, Any], trusting: ssl.SSLContext) -> None:
    """The files of a certificate and its key."""
    async with serving(App(), **tls_options) as server:
        assert server.url == f"https://127.0.0.1:{server.port}"
        assert await answers(server, trusting)


async def test_client_certificate_can_be_required_by_an_ssl_context(
    authority: trustme.CA, trusting: ssl.SSLContext
) -> None:
    """A client without one is refused in the handshake or at its first byte; none of its requests is handled."""
    demanding = certify(authority)
    demanding.verify_mode = ssl.CERT_REQUIRED
    authority.configure_trust(demanding)
    app = App()

    async with serving(app, ssl=demanding) as server:
        with pytest.raises(httpx.TransportError):
            await answers(server, trusting)
        assert app.events == ["startup"]

        authority.issue_cert("client@example.org").configure_cert(trusting)
        assert await answers(server, trusting)


async def test_client_certificate_can_be_required_by_tls_options_of_uvicorn(
    authority: trustme.CA, tls_options: dict[str, Any], trusting: ssl.SSLContext, tmp_path: Path
) -> None:
    """The certificates are in files."""
    trusted = str(tmp_path / "authority.pem")
    authority.cert_pem.write_to_path(trusted)
    demanded: dict[str, Any] = {
        "ssl_cert_reqs": int(ssl.CERT_REQUIRED),
        "ssl_ca_certs": str(tmp_path / "authority.pem"),
    }

    async with serving(App(), **tls_options, **demanded) as server:
        with pytest.raises(httpx.TransportError):
            await answers(server, trusting)
        authority.issue_cert("client@example.org").configure_cert(trusting)
        assert await answers(server, trusting)


async def test_ssl_context_factory_is_called(authority: trustme.CA, trusting: ssl.SSLContext) -> None:
    """It is uvicorn's option, where uvicorn has it: called once, with a function that makes the default context."""
    if "ssl_context_factory" not in inspect.signature(uvicorn.Config).parameters:
        with pytest.raises(TypeError, match="needs a newer uvicorn"):
            async with serving(App(), ssl_context_factory=lambda config, default: default()):
                raise AssertionError
        return
    async with serving(App(), ssl_context_factory=lambda config, default: certify(authority)) as server:
        assert await answers(server, trusting)


async def test_new_certificate_is_used_for_new_connections(authority: trustme.CA, trusting: ssl.SSLContext) -> None:
    """It is loaded into the running context; existing connections go on."""
    context = certify(authority)
    async with serving(App(), ssl=context) as server, connect_tls(server, trusting) as before:
        authority.issue_cert(HOST).configure_cert(context)
        async with connect_tls(server, trusting) as after:
            assert serial(before) != serial(after)
            for connection in (before, after):
                connection.ask("/")
                assert b"200 OK" in await connection.answer()


async def test_invalid_certificate_is_an_ssl_error(tmp_path: Path) -> None:
    """It keeps its message, and names the files."""
    (tmp_path / "bad.pem").write_text("no certificate")
    with pytest.raises(ssl.SSLError, match=r"PEM.*ssl_certfile='.*bad\.pem'"):
        async with serving(App(), ssl_certfile=str(tmp_path / "bad.pem")):
            raise AssertionError
