"""
A Unix socket at a path: how it is served, and which paths can be used.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import stat
import urllib.parse
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
import websockets

from aioserve import serving
from tests.helpers import not_portable
from tests.helpers.apps import App
from tests.helpers.unix import REQUEST, answers

pytestmark = not_portable.unix_sockets


async def test_server_answers_at_its_unix_path(path: str) -> None:
    """The URL has the path in the place of the host; there is no port."""
    scopes: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scopes.append(scope)
        await App()(scope, receive, send)

    async with serving(app, uds=path, lifespan="off") as server:
        assert server.url == f"http+unix://{path.replace('/', '%2F')}"
        for name in ("host", "port"):
            with pytest.raises(
                AttributeError,
                match=re.escape(f"a server on a Unix socket has no host and no port; its url is {server.url!r}"),
            ):
                getattr(server, name)
        assert server.ws_url == "ws" + server.url.removeprefix("http")
        assert await answers(path)
    assert scopes[0]["server"] == (path, None)
    assert not os.path.lexists(path)


async def test_listening_socket_and_its_duplicates_know_the_path(path: str) -> None:
    """Although the socket was bound elsewhere; so a server that gets a duplicate knows its URL."""
    async with serving(App(), uds=path) as server:
        (sock,) = server.sockets
        assert sock.getsockname() == path
        async with serving(App(), sockets=[sock]) as other:
            assert other.url == server.url


async def test_unix_path_can_be_a_path_object(tmp_path: Path) -> None:
    """As everywhere."""
    async with serving(App(), uds=tmp_path / "app.sock"):
        assert await answers(str(tmp_path / "app.sock"))


async def test_relative_unix_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stays the same when the program changes its working directory."""
    monkeypatch.chdir(tmp_path)
    async with serving(App(), uds="app.sock") as server:
        monkeypatch.chdir("/")
        assert server.url == f"http+unix://{str(tmp_path / 'app.sock').replace('/', '%2F')}"
        assert await answers(str(tmp_path / "app.sock"))
    assert not list(tmp_path.iterdir())


async def test_websocket_works_over_a_unix_socket(path: str) -> None:
    """As everything else of uvicorn."""
    async with serving(App(), uds=path) as server, websockets.unix_connect(path, "ws://test/") as websocket:
        await websocket.send("hello")
        assert await websocket.recv() == "hello"
        server.close()
        with pytest.raises(websockets.ConnectionClosed) as closed:
            await websocket.recv()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1012


async def test_app_knows_the_path_of_a_websocket_over_a_unix_socket(path: str) -> None:
    """Also of a relative path, which is made absolute; the socket itself was bound by another name."""
    scopes: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scopes.append(scope)
        await App()(scope, receive, send)

    config = uvicorn.Config(app, uds=os.path.relpath(path), lifespan="off", log_config=None)
    async with serving(config), websockets.unix_connect(path, "ws://test/") as websocket:
        await websocket.send("hello")
        assert await websocket.recv() == "hello"
    assert [(scope["type"], os.path.realpath(scope["server"][0])) for scope in scopes] == [("websocket", path)]
    assert os.path.isabs(scopes[0]["server"][0])
    assert config.loaded_app is not None


async def test_tls_works_over_a_unix_socket(path: str, tls: Any) -> None:
    """It is unusual, but possible."""
    options, context = tls
    async with serving(App(), uds=path, **options) as server:
        assert server.url.startswith("https+unix://%2F")
        transport = httpx.AsyncHTTPTransport(uds=path, verify=context)
        async with httpx.AsyncClient(transport=transport) as client:
            assert (await client.get("https://127.0.0.1")).text == "hello"


async def test_unix_path_of_a_uvicorn_config_is_served(path: str) -> None:
    """Only the mode is not uvicorn's, which would let everybody connect."""
    async with serving(uvicorn.Config(App(), uds=path, log_config=None)):
        assert stat.S_IMODE(os.lstat(path).st_mode) == 0o600
        assert await answers(path)
    async with serving(uvicorn.Config(App(), uds=path, log_config=None), uds_mode=0o660):
        assert stat.S_IMODE(os.lstat(path).st_mode) == 0o660


async def test_requests_in_the_queue_of_a_unix_socket_are_answered(path: str) -> None:
    """New clients cannot connect any more, but those that have connected are answered."""
    async with serving(App(), uds=path) as server, contextlib.AsyncExitStack() as stack:
        clients = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(100)]
        for client in clients:
            client.connect(path)
            client.sendall(REQUEST)
        await server.aclose()
        for client in clients:
            client.settimeout(10)
            assert client.recv(1000).startswith(b"HTTP/1.1 200")


async def test_full_queue_of_a_unix_socket_is_answered(path: str) -> None:
    """Linux takes one connection more into it than `backlog` says."""
    async with serving(App(), uds=path, backlog=5) as server, contextlib.AsyncExitStack() as stack:
        clients = []
        with contextlib.suppress(BlockingIOError):  # it is full
            while True:
                client = stack.enter_context(socket.socket(socket.AF_UNIX))
                client.setblocking(False)
                client.connect(path)
                client.sendall(REQUEST)
                clients.append(client)
        assert len(clients) >= 5
        await server.aclose()
        for client in clients:
            assert client.recv(1000).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("name", ["with a space", "100%?#", "caf\xe9", "\udcff"])
async def test_unix_path_can_have_any_name(name: str, tmp_path: Path) -> None:
    """The URL has all of it percent-encoded, byte by byte; also a name that is not UTF-8."""
    path = str(tmp_path / name)
    async with serving(App(), uds=path) as server:
        assert urllib.parse.unquote_to_bytes(server.url.removeprefix("http+unix://")) == os.fsencode(path)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
    assert os.listdir(tmp_path) == []


async def test_unix_path_through_a_link_is_resolved_as_the_kernel_does(tmp_path: Path) -> None:
    """The parent of a linked directory is the parent of the link's target."""
    (tmp_path / "real" / "below").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real" / "below")
    path = str(tmp_path / "link" / ".." / "app.sock")
    async with serving(App(), uds=path) as server:
        assert server.url.endswith("link%2F..%2Fapp.sock")
        assert await answers(str(tmp_path / "real" / "app.sock"))
    assert os.listdir(tmp_path / "real") == ["below"]
