"""
`aioserve.testing.client()`: an HTTP client for an app or a server.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import anyio
import httpx
import httpx2
import pytest

from aioserve import testing
from aioserve.testing import clients
from tests.helpers import not_portable
from tests.helpers.apps import App


class TestAClient:
    async def test_client_of_an_app_starts_a_server_for_it(self) -> None:
        """And is closed before the server is."""
        app = App()
        async with testing.client(app, headers={"x": "y"}) as client:
            assert (await client.get("/")).text == "hello"
            assert client.headers["x"] == "y"
            assert "shutdown" not in app.events
        assert client.is_closed
        assert app.events[-2:] == ["shutdown", "lifespan over"]

    async def test_client_can_use_a_running_server(self) -> None:
        """And leaves it running."""
        async with testing.server(App()) as server:
            for _ in range(2):
                async with testing.client(server) as client:
                    assert (await client.get("/")).text == "hello"

    async def test_client_streams_a_response(self) -> None:
        """Each part comes when it is sent: the end of an endless body is not waited for."""
        app = App()
        async with testing.client(app) as client, client.stream("GET", "/stream") as response:
            assert await anext(response.aiter_text()) == "data: 0\n\n"
            app.release.set()

    async def test_client_uses_no_proxy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whatever the environment says."""
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
        async with testing.client(App()) as client:
            assert (await client.get("/")).text == "hello"

    async def test_client_trusts_the_certificate_authority_for_tests_only(self) -> None:
        """For another one, pass `verify`."""
        theirs = clients._make_tls.__wrapped__()
        async with testing.server(App(), ssl=testing.tls().server, host="localhost") as server:
            async with testing.client(server) as client:
                assert str(client.base_url).startswith("https://")
                assert (await client.get("/")).text == "hello"
            async with testing.client(server, verify=theirs.client) as client:
                with pytest.raises(httpx2.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                    await client.get("/")
            async with testing.server(App()) as plain, testing.client(plain) as client:
                with pytest.raises(httpx2.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                    await client.get(server.url)

    @pytest.mark.parametrize("scheme", ["http", "https"])
    @not_portable.unix_sockets
    async def test_client_can_use_a_unix_socket(self, tmp_path: Path, scheme: str) -> None:
        """With options of httpx, and with TLS."""
        context = testing.tls().server if scheme == "https" else None
        async with testing.server(App(), uds=str(tmp_path / "a socket"), ssl=context) as server:
            assert server.url.startswith(f"{scheme}+unix://%2F")
            limits = httpx2.Limits(max_keepalive_connections=0)
            async with testing.client(server, limits=limits) as client:
                for _ in range(2):
                    response = await client.get("/")
                    assert response.text == "hello"
                assert response.url == f"{scheme}://localhost/"
                with anyio.fail_after(10):
                    while server.stats.connections:  # until they are closed, because of the limits
                        await asyncio.sleep(0)
            async with testing.client(server, transport=httpx2.MockTransport(lambda _: httpx2.Response(418))) as client:
                assert (await client.get("/")).status_code == 418

    async def test_client_is_of_httpx2_and_without_it_of_httpx(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whatever else is installed."""
        async with testing.client(App()) as client:
            assert isinstance(client, httpx2.AsyncClient)
        monkeypatch.setitem(sys.modules, "httpx2", None)
        async with testing.client(App()) as client:
            assert isinstance(client, httpx.AsyncClient)

    @pytest.mark.parametrize("base", [httpx.AsyncClient, httpx2.AsyncClient])
    @not_portable.unix_sockets
    async def test_client_is_of_the_class_that_is_asked_for(self, base: type[Any], tmp_path: Path) -> None:
        """Also of one that is derived from it, and for a Unix socket."""

        class Derived(base):  # type: ignore[misc]
            pass

        async with testing.server(App(), uds=str(tmp_path / "socket")) as server:
            for client_class in (base, Derived):
                async with testing.client(server, client_class=client_class) as client:
                    assert type(client) is client_class
                    assert (await client.get("/")).text == "hello"

    async def test_client_of_httpx_says_who_has_websockets_and_event_streams(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "httpx2", None)
        async with testing.client(App()) as client:
            for name in ("websocket", "sse"):
                with pytest.raises(AttributeError, match=rf"no {name}\(\); httpx2 has one: pip install"):
                    getattr(client, name)
            assert not hasattr(client, "other")

    async def test_client_without_httpx_and_httpx2_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The one that the extra installs."""
        monkeypatch.setitem(sys.modules, "httpx", None)
        monkeypatch.setitem(sys.modules, "httpx2", None)
        with pytest.raises(
            ModuleNotFoundError,
            match=r"httpx2 is not installed; install it with pip install 'aioserve-asgi\[testing\]'",
        ):
            async with testing.client(App()):
                pass

    async def test_broken_installation_of_httpx2_is_not_taken_for_a_missing_one(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The error names the module that is missing."""
        monkeypatch.delitem(sys.modules, "httpx2")
        monkeypatch.setitem(sys.modules, "httpx2._api", None)
        with pytest.raises(ModuleNotFoundError, match=r"httpx2\._api"):
            async with testing.client(App()):
                pass


async def test_option_of_a_server_is_refused_by_a_client() -> None:
    """The error says where to pass it."""
    with pytest.raises(
        TypeError, match="lifespan is an option of a server, not of a client; start the server first, and pass that"
    ):
        async with testing.client(App(), lifespan="off"):
            raise AssertionError
