"""
Where a server listens: names, addresses, several of them, and the same port on each.
"""

from __future__ import annotations

import errno
import socket
import threading
from typing import Any

import httpx
import pytest

from aioserve import _sockets, serving
from tests.apps import App
from tests.clients import connect, get


async def answers(url: str) -> bool:
    async with httpx.AsyncClient(trust_env=False, verify=False) as client:  # noqa: S501 (plain HTTP)
        return (await client.get(url)).text == "hello"


async def test_by_default_it_listens_on_this_machine_only() -> None:
    """A free port, on the IPv4 loopback."""
    async with serving(App()) as server:
        assert server.host == "127.0.0.1"
        assert server.port
        assert server.url == f"http://127.0.0.1:{server.port}"
        assert server.urls == [server.url]
        assert [sock.getsockname() for sock in server.sockets] == [("127.0.0.1", server.port)]
        assert await answers(server.url)


@pytest.mark.parametrize(
    ("host", "urls"),
    [
        ("127.0.0.1", ["http://127.0.0.1:{}"]),
        ("::1", ["http://[::1]:{}"]),
        ("localhost", ["http://127.0.0.1:{}", "http://[::1]:{}"]),
        ("0.0.0.0", ["http://127.0.0.1:{}"]),  # noqa: S104 (for the length of a test)
        ("::", ["http://[::1]:{}"]),
        (None, ["http://127.0.0.1:{}", "http://[::1]:{}"]),
        (["127.0.0.1", "127.0.0.2", "::1"], ["http://127.0.0.1:{}", "http://127.0.0.2:{}", "http://[::1]:{}"]),
        (("localhost", "127.0.0.1"), ["http://127.0.0.1:{}", "http://[::1]:{}"]),
    ],
    ids=str,
)
async def test_every_form_of_host_answers_at_every_url(host: Any, urls: list[str]) -> None:
    """One port for all of them, nothing bound twice, and wildcards have an URL that a client can use."""
    async with serving(App(), host=host) as server:
        assert server.urls == [url.format(server.port) for url in urls]
        assert {sock.getsockname()[1] for sock in server.sockets} == {server.port}
        for url in server.urls:
            assert await answers(url)


async def test_a_host_name_is_resolved_and_leaves_no_thread() -> None:
    """A real name, by the system's resolver."""
    name = socket.gethostname()

    async with serving(App(), host=name) as server:
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("aioserve")]
        assert await answers(server.url)


async def test_a_literal_needs_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does localhost."""

    def no_thread(*args: object, **kwargs: object) -> None:
        raise AssertionError("a thread was made")

    monkeypatch.setattr("concurrent.futures.ThreadPoolExecutor", no_thread)
    for host in ("127.0.0.1", "::1", "localhost", None):
        async with serving(App(), host=host):
            pass


async def test_a_fixed_port_can_be_used_again_at_once() -> None:
    """Nothing of the first server is in the way of the second, whoever closed the connection."""
    async with serving(App()) as server:
        await get(server)
        assert server.port is not None
    async with serving(App(), port=server.port) as again:
        assert again.port == server.port
        assert (await get(again)).text == "hello"


async def test_port_zero_tries_again_where_the_port_is_taken_on_another_address(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first address gives the port; should another have no such port free, a new one is taken for all."""
    tried: list[tuple[str, int]] = []
    listen_on = _sockets._listen_on

    def taken_twice(address: Any, port: int, backlog: int, **options: Any) -> socket.socket:
        tried.append((address.sockaddr[0], port))
        if address.sockaddr[0] == "127.0.0.2" and len(tried) < 5:
            raise OSError(errno.EADDRINUSE, "taken")
        return listen_on(address, port, backlog, **options)

    monkeypatch.setattr(_sockets, "_listen_on", taken_twice)
    async with serving(App(), host=["127.0.0.1", "127.0.0.2"]) as server:
        assert [sock.getsockname() for sock in server.sockets] == [
            ("127.0.0.1", server.port),
            ("127.0.0.2", server.port),
        ]
    assert [host for host, _ in tried] == ["127.0.0.1", "127.0.0.2"] * 3


async def test_port_zero_gives_up_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the error of the last try, and nothing bound."""

    def taken(address: Any, port: int, backlog: int, **options: Any) -> socket.socket:
        raise OSError(errno.EADDRINUSE, "taken")

    monkeypatch.setattr(_sockets, "_listen_on", taken)
    with pytest.raises(OSError, match="taken"):
        async with serving(App()):
            raise AssertionError


@pytest.mark.parametrize("host", ["localhost", None], ids=str)
@pytest.mark.parametrize("lacking", [socket.AF_INET, socket.AF_INET6])
async def test_a_machine_may_lack_one_family(host: str | None, lacking: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that stands for both is served on the other one."""
    listen_on = _sockets._listen_on

    def without(address: Any, port: int, backlog: int, **options: Any) -> socket.socket:
        if address.family == lacking:
            raise OSError(errno.EADDRNOTAVAIL, "no such family here")
        return listen_on(address, port, backlog, **options)

    monkeypatch.setattr(_sockets, "_listen_on", without)
    async with serving(App(), host=host) as server:
        (sock,) = server.sockets
        assert sock.family != lacking
        assert await answers(server.url)


async def test_a_machine_that_lacks_both_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing to serve on then."""

    def without(address: Any, port: int, backlog: int, **options: Any) -> socket.socket:
        raise OSError(errno.EADDRNOTAVAIL, "no such family here")

    monkeypatch.setattr(_sockets, "_listen_on", without)
    with pytest.raises(OSError, match="no such family here"):
        async with serving(App(), host=None):
            raise AssertionError


async def test_accepted_connections_do_not_wait_for_full_packets() -> None:
    """TCP_NODELAY is set, or kept-alive answers take 40 ms."""
    async with serving(App()) as server, connect(server) as client:
        client.ask("/")
        await client.answer()
        (connection,) = server.uvicorn.server_state.connections
        sock = connection.transport.get_extra_info("socket")
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_the_sockets_are_gone_when_it_is_closed_but_the_url_stays() -> None:
    """So that a log line after the end can still say which server it was."""
    async with serving(App()) as server:
        assert server.is_serving()
    assert not server.is_serving()
    assert server.sockets == ()
    assert server.url == f"http://127.0.0.1:{server.port}"
    assert repr(server) == f"<aioserve.Server {server.url} closed>"
