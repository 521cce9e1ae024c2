"""
Where a server listens: names, addresses, several of them, and the same port on each.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from aioserve import serving, start
from aioserve._net import listeners as _sockets
from tests.helpers.apps import App
from tests.helpers.clients import connect, get
from tests.helpers.turns import turns

GONE = "192.0.2.1"  # for documentation: RFC 5737


async def answers(url: str) -> bool:
    async with httpx.AsyncClient(trust_env=False, verify=False) as client:  # noqa: S501 (plain HTTP)
        return (await client.get(url)).text == "hello"


async def test_server_listens_on_the_loopback_by_default() -> None:
    """On a free port of the IPv4 loopback."""
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
    """All addresses have one port, none is bound twice, and a wildcard has a URL that a client can use."""
    async with serving(App(), host=host) as server:
        assert server.urls == [url.format(server.port) for url in urls]
        assert {sock.getsockname()[1] for sock in server.sockets} == {server.port}
        for url in server.urls:
            assert await answers(url)


async def test_host_name_is_resolved_and_leaves_no_thread() -> None:
    """A real name, by the system's resolver."""
    name = socket.gethostname()

    async with serving(App(), host=name) as server:
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("aioserve")]
        assert await answers(server.url)


async def test_start_that_is_closed_does_not_wait_for_the_resolver(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when it is garbage, because its loop was closed."""
    go_on = threading.Event()

    def slow(host: str, flags: int) -> Any:
        if flags & socket.AI_NUMERICHOST:
            raise socket.gaierror
        assert go_on.wait(10)
        return []

    monkeypatch.setattr(_sockets, "_getaddrinfo", slow)
    monkeypatch.setattr(_sockets, "_getaddrinfo_cached", slow)
    starting = start(App(), host="slow.test")
    starting.send(None)
    starting.close()
    assert not go_on.is_set()
    go_on.set()
    for thread in threading.enumerate():
        if thread.name.startswith("aioserve-resolve"):
            thread.join(10)
    await turns(5)


async def test_lack_of_descriptors_is_an_error_that_names_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of several could not be bound is told, whatever the reason."""

    def none_left(*args: Any) -> socket.socket:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(socket, "socket", none_left)
        with pytest.raises(OSError, match=r"cannot listen on 127\.0\.0\.1:0: Too many open files"):
            await start(App())


async def test_literal_address_is_resolved_without_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """So is localhost."""

    def no_thread(*args: object, **kwargs: object) -> None:
        raise AssertionError("a thread was made")

    monkeypatch.setattr("concurrent.futures.ThreadPoolExecutor", no_thread)
    for host in ("127.0.0.1", "::1", "localhost", None):
        async with serving(App(), host=host):
            pass


async def test_fixed_port_can_be_bound_again_at_once() -> None:
    """Whoever closed the connections of the first server."""
    async with serving(App()) as server:
        await get(server)
        assert server.port is not None
    async with serving(App(), port=server.port) as again:
        assert again.port == server.port
        assert (await get(again)).text == "hello"


async def test_port_zero_tries_another_port_if_one_is_taken_on_an_address(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first address gives the port; if another address has that port taken, a new one is tried for all."""
    tried: list[tuple[str, int]] = []
    bind = _sockets._bind

    def taken_twice(family: int, sockaddr: tuple[str, int], port: int, *others: Any) -> socket.socket:
        tried.append((sockaddr[0], port))
        if sockaddr[0] == "127.0.0.2" and len(tried) < 5:
            raise OSError(errno.EADDRINUSE, "taken")
        return bind(family, sockaddr, port, *others)

    monkeypatch.setattr(_sockets, "_bind", taken_twice)
    async with serving(App(), host=["127.0.0.1", "127.0.0.2"]) as server:
        assert [sock.getsockname() for sock in server.sockets] == [
            ("127.0.0.1", server.port),
            ("127.0.0.2", server.port),
        ]
    assert [host for host, _ in tried] == ["127.0.0.1", "127.0.0.2"] * 3


async def test_port_zero_gives_up_after_some_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the error of the last attempt, and nothing bound."""

    def taken(*address: Any) -> socket.socket:
        raise OSError(errno.EADDRINUSE, "taken")

    monkeypatch.setattr(_sockets, "_bind", taken)
    with pytest.raises(OSError, match="taken"):
        async with serving(App()):
            raise AssertionError


@pytest.mark.parametrize("host", ["localhost", None], ids=str)
@pytest.mark.parametrize("lacking", [socket.AF_INET, socket.AF_INET6])
async def test_machine_may_lack_one_address_family(
    host: str | None, lacking: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that stands for both families is served on the other one."""
    bind = _sockets._bind

    def without(family: int, *address: Any) -> socket.socket:
        if family == lacking:
            raise OSError(errno.EADDRNOTAVAIL, "no such family here")
        return bind(family, *address)

    monkeypatch.setattr(_sockets, "_bind", without)
    async with serving(App(), host=host) as server:
        (sock,) = server.sockets
        assert sock.family != lacking
        assert await answers(server.url)


async def test_machine_that_lacks_both_address_families_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no address to serve on."""

    def without(*address: Any) -> socket.socket:
        raise OSError(errno.EADDRNOTAVAIL, "no such family here")

    monkeypatch.setattr(_sockets, "_bind", without)
    with pytest.raises(OSError, match="no such family here"):
        async with serving(App(), host=None):
            raise AssertionError


async def test_accepted_connection_has_tcp_nodelay() -> None:
    """Otherwise kept-alive answers take 40 ms."""
    async with serving(App()) as server, connect(server) as client:
        client.ask("/")
        await client.answer()
        (connection,) = server.uvicorn.server_state.connections
        sock = connection.transport.get_extra_info("socket")
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_closed_server_has_no_sockets_and_keeps_its_url() -> None:
    """A log line after the end can still name the server."""
    async with serving(App()) as server:
        assert server.is_serving()
    assert not server.is_serving()
    assert server.sockets == ()
    assert server.url == f"http://127.0.0.1:{server.port}"
    assert repr(server) == f"<aioserve.Server {server.url} closed>"


def link_local() -> str | None:
    """Return a link-local address of this machine with its link."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            digits, _, _, scope, _, link = line.split()
            if scope == "20":
                return f"{':'.join(digits[i : i + 4] for i in range(0, 32, 4))}%{link}"
    return None


async def test_ipv6_address_can_have_a_scope() -> None:
    """It is bound to its link; the URL has the % quoted, as in RFC 6874."""
    address = link_local()
    if address is None:
        pytest.skip("no network interface here has a link-local address")
    async with serving(App(), host=address) as server:
        ((host, port, _, scope),) = [sock.getsockname() for sock in server.sockets]
        link = address.partition("%")[2]
        assert scope == socket.if_nametoindex(link)
        assert server.url == f"http://[{host}%25{link}]:{port}"
        with socket.socket(socket.AF_INET6) as client:
            client.connect((host, port, 0, scope))
            client.sendall(b"GET / HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n")
            await server.aclose()
            assert client.recv(1000).startswith(b"HTTP/1.1 200")


async def test_ipv6_address_that_needs_a_scope_is_an_error_that_says_so() -> None:
    """The error of the kernel alone does not."""
    address = link_local()
    if address is None:
        pytest.skip("no network interface here has a link-local address")
    with pytest.raises(
        OSError, match=r"Invalid argument; a link-local address requires its interface, as in fe80::1%eth0"
    ):
        await start(App(), host=address.partition("%")[0])


async def test_host_that_covers_another_host_is_an_error() -> None:
    """There is no port that is free on both."""
    with pytest.raises(
        OSError,
        match=r"Address already in use; no port is free on all of the addresses; one of them may include another",
    ):
        await start(App(), host=["0.0.0.0", "127.0.0.1"])  # noqa: S104


@pytest.mark.parametrize("name", ["localhost", "LOCALHOST", "localhost."])
async def test_localhost_is_recognised_in_every_spelling(name: str) -> None:
    """Names are case-insensitive, and can end in a dot."""
    async with serving(App(), host=name) as server:
        assert [sock.family for sock in server.sockets] == [socket.AF_INET, socket.AF_INET6]


async def test_one_of_two_hosts_that_cannot_be_bound_frees_the_other() -> None:
    """The address that could be bound is free again."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with pytest.raises(OSError, match=f"cannot listen on {GONE}:{port}: .*this machine does not have that address"):
        await start(App(), host=["127.0.0.1", GONE], port=port)
    with socket.create_server(("127.0.0.1", port)):
        pass
