"""
Sockets that are lent, as objects or by their descriptors: they are used, and otherwise left alone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import ssl
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx
import pytest
import uvicorn

from aioserve import Server, StartupError, serving, start
from tests.apps import App
from tests.clients import get

GONE = "192.0.2.1"  # for documentation: RFC 5737


def tcp4() -> socket.socket:
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    return sock


def tcp6() -> socket.socket:
    sock = socket.socket(socket.AF_INET6)
    sock.bind(("::1", 0))
    return sock


def dual_stack() -> socket.socket:
    """One socket for both families."""
    sock = socket.socket(socket.AF_INET6)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind(("::", 0))
    return sock


def unix() -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(os.path.join(tempfile.mkdtemp(), "app.sock"))
    return sock


def abstract() -> socket.socket:
    """A name that is in no file system."""
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(f"\0aioserve-test-{os.getpid()}")
    return sock


KINDS = [tcp4, tcp6, dual_stack, unix, abstract]
Kind = Callable[[], socket.socket]


def by_object(sock: socket.socket) -> dict[str, Any]:
    return {"sockets": [sock]}


def by_descriptor(sock: socket.socket) -> dict[str, Any]:
    return {"fd": sock.fileno()}


WAYS = [by_object, by_descriptor]


@contextlib.contextmanager
def lending(kind: Kind) -> Iterator[socket.socket]:
    with kind() as sock:
        yield sock
        name = sock.getsockname()
    if isinstance(name, str):
        os.unlink(name)
        os.rmdir(os.path.dirname(name))


def connect(sock: socket.socket) -> socket.socket:
    client = socket.socket(sock.family)
    name = sock.getsockname()
    client.connect(("::1", *name[1:]) if name[0] == "::" else name)
    return client


async def ask(url: str) -> str:
    """A request by the URL alone."""
    transport = httpx.AsyncHTTPTransport()
    if url.startswith("http+unix://"):
        transport = httpx.AsyncHTTPTransport(uds=unquote(url.removeprefix("http+unix://")))
        url = "http://test"
    async with httpx.AsyncClient(transport=transport) as client:
        return (await client.get(url)).text


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("listening", [True, False], ids=["listening", "bound only"])
@pytest.mark.parametrize("kind", KINDS)
async def test_it_is_served_and_given_back(kind: Kind, listening: bool, way: Any) -> None:
    """Open and in its place; and non-blocking, since to put that back would freeze whoever else has it."""
    with lending(kind) as sock:
        if listening:
            sock.listen()
        for _ in range(2):
            async with serving(App(), **way(sock)) as server:
                assert await ask(server.url) == "hello"
            assert not os.get_blocking(sock.fileno())
            if way is by_object:
                assert sock.gettimeout() == 0
            with connect(sock):  # it goes into the queue
                pass


@pytest.mark.parametrize("kind", KINDS)
async def test_every_connection_is_without_delay(kind: Kind) -> None:
    """Whatever the protocol's number in the socket that it came from: kept-alive answers took 40 ms otherwise."""
    with lending(kind) as sock:
        assert sock.proto == 0
        async with serving(App(), sockets=[sock]) as server:
            with connect(sock) as client:
                while not server.uvicorn.server_state.connections:
                    await ask(server.url)
                (protocol, *_) = server.uvicorn.server_state.connections
                connection = protocol.transport.get_extra_info("socket")
                if sock.family != socket.AF_UNIX:
                    assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                client.close()


async def test_many_of_all_kinds_at_once() -> None:
    """Each at its own URL; host and port are the first one's."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(lending(kind)) for kind in KINDS]
        async with serving(App(), sockets=sockets) as server:
            assert (server.host, server.port) == sockets[0].getsockname()
            assert len(server.urls) == len(sockets)
            for url in server.urls:
                assert await ask(url) == "hello"


async def test_a_name_in_no_file_system_has_a_url_too() -> None:
    """With the null that it begins with."""
    with lending(abstract) as sock:
        async with serving(App(), sockets=[sock]) as server:
            assert server.url == f"http+unix://%00aioserve-test-{os.getpid()}"


async def test_the_descriptor_of_a_config_is_served() -> None:
    """A Config keeps its word."""
    with lending(tcp4) as sock:
        async with serving(uvicorn.Config(App(), fd=sock.fileno(), log_config=None)) as server:
            assert server.port == sock.getsockname()[1]
            assert (await get(server)).text == "hello"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("app", [lambda: App("raises"), lambda: "tests.broken_module:app"])
async def test_it_outlives_a_start_that_fails(app: Callable[[], Any], way: Any) -> None:
    """It was never ours."""
    with lending(unix) as sock:
        with pytest.raises(StartupError):
            await start(app(), **way(sock))
        async with serving(App(), **way(sock)) as server:
            assert await ask(server.url) == "hello"


def unbound_tcp() -> socket.socket:
    return socket.socket()


def unbound_unix() -> socket.socket:
    return socket.socket(socket.AF_UNIX)


def datagrams() -> socket.socket:
    return socket.socket(type=socket.SOCK_DGRAM)


def connected() -> socket.socket:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return socket.create_connection(server.getsockname())


def closed() -> socket.socket:
    sock = socket.socket()
    sock.close()
    return sock


def with_tls() -> socket.socket:
    return ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).wrap_socket(tcp4(), server_side=True)


UNFIT = [
    (unbound_tcp, ValueError, "is not bound; bind it first"),
    (unbound_unix, ValueError, "is not bound; bind it first"),
    (datagrams, ValueError, "only TCP sockets and Unix stream sockets can be served"),
    (connected, OSError, "cannot listen on .*: Invalid argument; is it a connection"),
]


@pytest.mark.parametrize(
    ("kind", "error", "text"), [(closed, ValueError, "is closed"), (with_tls, TypeError, "as ssl")]
)
async def test_an_object_that_cannot_be_lent_is_told(kind: Kind, error: type[Exception], text: str) -> None:
    """What duplicating it would say is less clear."""
    with kind() as sock, pytest.raises(error, match=text):
        await start(App(), sockets=[sock])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("kind", "error", "text"), UNFIT)
async def test_what_cannot_be_served_is_told(kind: Kind, error: type[Exception], text: str, way: Any) -> None:
    """And the app is not started."""
    app = App()
    with kind() as sock:
        with pytest.raises(error, match=text) as raised:
            await start(app, **way(sock))
        assert ("descriptor" if way is by_descriptor else "<socket") in str(raised.value)
    assert app.events == []


async def test_a_descriptor_that_is_no_socket_is_told(tmp_path: Path) -> None:
    """Nor is one that is closed."""
    with (tmp_path / "file").open("w") as file:
        before = os.listdir("/dev/fd")
        with pytest.raises(OSError, match=rf"cannot listen on descriptor {file.fileno()}: .*non-socket") as raised:
            await start(App(), fd=file.fileno())
        assert raised.value.errno == errno.ENOTSOCK
        assert os.listdir("/dev/fd") == before
    with pytest.raises(OSError, match=r"cannot listen on descriptor \d+: Bad file descriptor") as raised:
        await start(App(), fd=2**31 - 1)
    assert raised.value.errno == errno.EBADF


async def test_one_of_many_that_cannot_be_served_spoils_all() -> None:
    """Nothing is half-started."""
    with lending(tcp4) as fit, connected() as unfit:
        with pytest.raises(OSError, match="Invalid argument"):
            await start(App(), sockets=[fit, unfit])
        async with serving(App(), sockets=[fit]) as server:
            assert await ask(server.url) == "hello"


# Ports that are shared.


async def until_both_have_served(first: Server, second: Server) -> None:
    """The kernel gives each connection to one of them, by its addresses."""
    for _ in range(200):
        assert (await get(first)).text == "hello"
        if first.stats.served and second.stats.served:
            return
    raise AssertionError((first.stats, second.stats))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", None], ids=str)
async def test_two_servers_can_share_a_port(host: str | None) -> None:
    """Each gets its part; and what is left by one goes to the other."""
    async with serving(App(), host=host, reuse_port=True) as first:
        port: Any = first.port
        async with serving(App(), host=host, port=port, reuse_port=True) as second:
            assert second.port == port
            await until_both_have_served(first, second)
        assert (await get(first)).text == "hello"


@pytest.mark.parametrize(("first", "second"), [(True, False), (False, True), (False, False)])
async def test_both_have_to_agree_on_it(first: bool, second: bool) -> None:
    """Otherwise the port is busy."""
    async with serving(App(), reuse_port=first) as server:
        port: Any = server.port
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            await start(App(), port=port, reuse_port=second)


async def test_who_cannot_share_ports_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not every system can."""
    monkeypatch.delattr(socket, "SO_REUSEPORT")
    with pytest.raises(ValueError, match="reuse_port is not to be had on this system"):
        await start(App(), reuse_port=True)


# Addresses of IPv6.


def link_local() -> str | None:
    """An address of this machine that is good on one of its links only, with that link."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            digits, _, _, scope, _, link = line.split()
            if scope == "20":
                return f"{':'.join(digits[i : i + 4] for i in range(0, 32, 4))}%{link}"
    return None


async def test_an_address_can_have_a_scope() -> None:
    """Bound to its link; in the URL its % is quoted, as RFC 6874 has it."""
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


async def test_an_address_that_needs_a_scope_says_so() -> None:
    """Which nothing in the kernel's answer would."""
    address = link_local()
    if address is None:
        pytest.skip("no network interface here has a link-local address")
    with pytest.raises(OSError, match=r"Invalid argument; .* needs its interface, as in fe80::1%eth0"):
        await start(App(), host=address.partition("%")[0])


async def test_a_host_that_covers_another_is_told() -> None:
    """No port at all is free on both then."""
    with pytest.raises(OSError, match=r"Address already in use; no port is free on all .* does one of them cover"):
        await start(App(), host=["0.0.0.0", "127.0.0.1"])  # noqa: S104


@pytest.mark.parametrize("name", ["localhost", "LOCALHOST", "localhost."])
async def test_localhost_is_known_in_every_spelling(name: str) -> None:
    """Names know no case, and can end in a dot."""
    async with serving(App(), host=name) as server:
        assert [sock.family for sock in server.sockets] == [socket.AF_INET, socket.AF_INET6]


async def test_of_two_hosts_that_fail_together_none_is_served() -> None:
    """The address that could be had is free again."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with pytest.raises(OSError, match=f"cannot listen on {GONE}:{port}: .*not an address of this machine"):
        await start(App(), host=["127.0.0.1", GONE], port=port)
    with socket.create_server(("127.0.0.1", port)):
        pass
