"""
HTTP/2 beside HTTP/1 on one port: in clear text by prior knowledge, and over TLS by ALPN; wherever a server listens.
"""

from __future__ import annotations

import asyncio
import shutil
import socket
import ssl
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme
import uvicorn

from aioserve import Server, StartupError, Swappable, serving, serving_process, start, start_in_thread, testing
from tests.helpers import clients, not_portable
from tests.helpers.apps import App
from tests.helpers.http2 import StreamApp, connect, needs_http2
from tests.helpers.processes import linux_only
from tests.helpers.threads import in_thread
from tests.helpers.ways import WAYS, Way

pytestmark = [needs_http2, pytest.mark.usefixtures("quiet")]
Tls = tuple[dict[str, Any], ssl.SSLContext]

CURL = shutil.which("curl")
CURL_VERSION = "" if CURL is None else subprocess.run([CURL, "-V"], capture_output=True, text=True, check=False).stdout  # noqa: S603
needs_curl = pytest.mark.skipif("HTTP2" not in CURL_VERSION, reason="there is no curl, or it has no HTTP/2")


async def get(server: Server, **options: Any) -> str:
    """Ask twice on one connection; return the version."""
    async with httpx.AsyncClient(base_url=server.url, http2=True, trust_env=False, **options) as client:
        assert (await client.get("/")).text == "hello"
        return (await client.get("/")).http_version


PRIOR_KNOWLEDGE: dict[str, Any] = {"http1": False, "verify": False}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
async def test_each_way_to_start_speaks_http2(way: Way) -> None:
    asked: list[asyncio.Task[str]] = []

    async def body(server: Server) -> None:
        async def ask() -> str:
            try:
                return await get(server, **PRIOR_KNOWLEDGE)
            finally:
                server.close()

        asked.append(asyncio.create_task(ask()))
        if way is not WAYS["serve"]:
            await asked[0]

    await way(App(), body, http2=True)
    assert await asked[0] == "HTTP/2"


async def test_both_versions_are_served_on_one_port() -> None:
    app = StreamApp()
    async with serving(app, http2=True) as server:
        assert await get(server, **PRIOR_KNOWLEDGE) == "HTTP/2"
        assert (await clients.get(server)).http_version == "HTTP/1.1"
    assert [each["http_version"] for each in app.scopes] == ["2", "2", "1.1"]
    assert {each["scheme"] for each in app.scopes} == {"http"}


async def test_tls_chooses_the_version_by_alpn(tls: Tls) -> None:
    options, trusting = tls
    app = StreamApp()
    async with serving(app, http2=True, **options) as server:
        reader, writer = await asyncio.open_connection(server.host, server.port, ssl=trusting)  # no ALPN
        writer.write(b"GET / HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 200")
        writer.close()
        await writer.wait_closed()
        assert await get(server, verify=trusting) == "HTTP/2"
        assert (await clients.get(server)).http_version == "HTTP/1.1"
    assert {each["scheme"] for each in app.scopes} == {"https"}


async def test_ready_context_speaks_http2(authority: trustme.CA, trusting: ssl.SSLContext) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    async with serving(App(), http2=True, ssl=context) as server:
        assert await get(server, verify=trusting) == "HTTP/2"
        assert (await clients.get(server)).http_version == "HTTP/1.1"


@not_portable.unix_sockets
async def test_unix_socket_speaks_http2_and_names_itself(tmp_path: Path) -> None:
    app, path = StreamApp(), str(tmp_path / "app.sock")
    async with serving(app, http2=True, uds=path) as server, connect(server) as client:
        assert (await client.answer(client.ask())).body == b"hello"
        stream = client.ask("/hold")
        await app.come(2)
        server.close()
        app.release.set()
        await client.is_told()
    assert client.answers[stream].is_complete
    assert app.scopes[0]["server"] == (path, None)


@not_portable.lent_twice
@pytest.mark.parametrize("how", ["sockets", "fd"])
async def test_lent_socket_speaks_http2(how: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as lent:
        options: dict[str, Any] = {"sockets": [lent]} if how == "sockets" else {"fd": lent.fileno()}
        for _ in range(2):
            async with serving(StreamApp(), http2=True, **options) as server, connect(server) as client:
                assert (await client.answer(client.ask())).body == b"hello"
                server.close()
                await client.is_told()


@pytest.mark.parametrize("protocol", ["auto_zttp_impl:AutoZttpProtocol", "zttp_h2_impl:ZttpH2Protocol"])
async def test_protocols_of_http2_can_be_named(protocol: str) -> None:
    app = StreamApp()
    async with serving(app, http=f"uvicorn.protocols.http.{protocol}") as server, connect(server) as client:
        client.ask("/hold")
        await app.come(1)
        server.close()
        app.release.set()
        await client.is_told()
    assert client.all_is_answered()


async def test_config_with_http2_is_served() -> None:
    config = uvicorn.Config(StreamApp(), port=0, http2=True, http="zttp", log_config=None)
    async with serving(config) as server, connect(server) as client:
        assert (await client.answer(client.ask())).body == b"hello"
        server.close()
        await client.is_told()


def test_thread_speaks_http2() -> None:
    with start_in_thread("tests.helpers.apps:factory", factory=True, http2=True) as server:
        with httpx.Client(base_url=server.url, http2=True, trust_env=False, **PRIOR_KNOWLEDGE) as client:
            assert client.get("/").http_version == "HTTP/2"


@linux_only
@not_portable.child_processes
@pytest.mark.parametrize("with_tls", [False, True])
async def test_child_process_speaks_http2(with_tls: bool, request: pytest.FixtureRequest) -> None:
    options, verify = request.getfixturevalue("tls") if with_tls else ({}, False)
    async with serving_process("tests.helpers.apps:factory", factory=True, http2=True, **options) as server:
        async with httpx.AsyncClient(
            base_url=server.url, http2=True, http1=with_tls, trust_env=False, verify=verify
        ) as client:
            assert (await client.get("/")).http_version == "HTTP/2"
    assert server.report is not None
    assert not server.report.was_forced


async def test_swap_loses_no_stream() -> None:
    """The streams in flight are the old app's; those that come are the new one's, on the same connection."""
    old, new = StreamApp(), StreamApp()
    swappable = Swappable(old)
    async with serving(swappable, http2=True) as server, connect(server) as client:
        held = [client.ask("/hold") for _ in range(5)]
        await old.come(5)
        swapping = asyncio.create_task(swappable.swap(new))
        while swappable.app is not new:
            await asyncio.sleep(0)
        assert (await client.answer(client.ask())).status == 200
        old.release.set()
        await swapping
        for stream in held:
            assert (await client.answer(stream)).status == 200
        assert (new.count, old.count) == (1, 5)
        assert not client.goaways
        server.close()
        await client.is_told()


async def test_client_for_tests_speaks_http2() -> None:
    async with testing.server(App(), http2=True) as server:
        async with testing.client(server, client_class=httpx.AsyncClient, http1=False, http2=True) as client:
            assert (await client.get("/")).http_version == "HTTP/2"


async def test_client_for_tests_raises_what_leaves_the_app_of_http2(caplog: pytest.LogCaptureFixture) -> None:
    app = StreamApp()
    app.release.set()
    async with testing.server(app, http2=True) as server:
        async with testing.client(server, client_class=httpx.AsyncClient, http1=False, http2=True) as client:
            with pytest.raises(ZeroDivisionError):
                await client.get("/raise")
    caplog.clear()


@needs_curl
@pytest.mark.parametrize("how", ["prior knowledge", "alpn", "http1", "upgrade"])
async def test_curl_speaks_http2(how: str, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> None:
    """`--http2` without TLS asks for an upgrade, which a server may ignore; it then answers with HTTP/1.1."""
    assert CURL is not None
    options = {"prior knowledge": ["--http2-prior-knowledge"], "alpn": ["--http2", "-k"], "upgrade": ["--http2"]}
    served = request.getfixturevalue("tls_options") if how == "alpn" else {}
    app = StreamApp()
    async with serving(app, http2=True, **served) as server:
        command = [CURL, "-s", "-m", "10", "--noproxy", "*", "-w", " %{http_version}", *options.get(how, [])]
        command.append(f"{server.url}/big-hold")
        running = in_thread(lambda: subprocess.run(command, stdout=subprocess.PIPE, check=True))  # noqa: S603
        await app.come(1)
        server.close()
        app.release.set()
        output = (await running).stdout
    if how == "upgrade":
        caplog.clear()  # uvicorn says that it has ignored it
    assert output == bytes(StreamApp.BIG) + (b" 2" if how in ("prior knowledge", "alpn") else b" 1.1")


async def test_http2_with_another_protocol_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^http2 requires http='zttp', which is then the default, not 'h11'$"):
        await start(App(), http2=True, http="h11")


async def test_http2_without_zttp_is_refused_before_the_app_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [each for each in sys.modules if each.startswith("uvicorn.protocols.http.") and "zttp" in each]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "zttp", None)
    app = App()
    with pytest.raises(StartupError, match=r"^http2=True needs zttp, which is not installed$"):
        await start(app, http2=True)
    assert app.events == []
