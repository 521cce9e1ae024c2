"""
Sockets that are lent, as objects or as descriptors: they are served, and stay open.
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

from aioserve import StartupError, serving, start
from tests.helpers import not_portable
from tests.helpers.apps import App
from tests.helpers.clients import get


def tcp4() -> socket.socket:
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    return sock


def tcp6() -> socket.socket:
    sock = socket.socket(socket.AF_INET6)
    sock.bind(("::1", 0))
    return sock


def dual_stack() -> socket.socket:
    """Make one socket for both families."""
    sock = socket.socket(socket.AF_INET6)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind(("::", 0))
    return sock


def unix() -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(os.path.join(tempfile.mkdtemp(), "app.sock"))
    return sock


def abstract() -> socket.socket:
    """Make a socket with a name in no file system."""
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(f"\0aioserve-test-{os.getpid()}")
    return sock


KINDS = [tcp4, tcp6, dual_stack, unix, abstract]

kinds = pytest.mark.parametrize(
    "kind", [*KINDS[:3], *(pytest.param(kind, marks=not_portable.unix_sockets) for kind in KINDS[3:])]
)


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
    """Send a request to a URL."""
    transport = httpx.AsyncHTTPTransport()
    if url.startswith("http+unix://"):
        transport = httpx.AsyncHTTPTransport(uds=unquote(url.removeprefix("http+unix://")))
        url = "http://test"
    async with httpx.AsyncClient(transport=transport) as client:
        return (await client.get(url)).text


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("listening", [True, False], ids=["listening", "bound only"])
@kinds
async def test_lent_socket_is_served_and_stays_open(kind: Kind, listening: bool, way: Any) -> None:
    """In its place, and non-blocking: to restore "blocking" would freeze another owner's loop."""
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


@kinds
async def test_connection_of_a_lent_socket_has_tcp_nodelay(kind: Kind) -> None:
    """Whatever the protocol number of the lent socket: otherwise kept-alive answers took 40 ms."""
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


@not_portable.unix_sockets
async def test_lent_sockets_of_every_kind_are_served_at_once() -> None:
    """Each has a URL of its own; host and port are those of the first one."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(lending(kind)) for kind in KINDS]
        async with serving(App(), sockets=sockets) as server:
            assert (server.host, server.port) == sockets[0].getsockname()
            assert len(server.urls) == len(sockets)
            for url in server.urls:
                assert await ask(url) == "hello"


async def test_abstract_unix_socket_has_a_url() -> None:
    """With the null byte at its beginning."""
    with lending(abstract) as sock:
        async with serving(App(), sockets=[sock]) as server:
            assert server.url == f"http+unix://%00aioserve-test-{os.getpid()}"


async def test_descriptor_of_a_uvicorn_config_is_served() -> None:
    """The Config is served as it is."""
    with lending(tcp4) as sock:
        async with serving(uvicorn.Config(App(), fd=sock.fileno(), log_config=None)) as server:
            assert server.port == sock.getsockname()[1]
            assert (await get(server)).text == "hello"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("app", [lambda: App("raises"), lambda: "tests.helpers.broken_module:app"])
@not_portable.unix_sockets
async def test_lent_socket_stays_open_when_the_start_fails(app: Callable[[], Any], way: Any) -> None:
    """It belongs to its owner."""
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
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.connect(sock.getsockname())  # to itself
    return sock


def closed() -> socket.socket:
    sock = socket.socket()
    sock.close()
    return sock


def with_tls() -> socket.socket:
    return ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).wrap_socket(tcp4(), server_side=True)


async def test_descriptor_that_is_refused_stays_non_blocking() -> None:
    """All duplicates share that, so the loop of its owner would be blocked."""
    with datagrams() as lent:
        lent.setblocking(False)
        with pytest.raises(ValueError, match="only TCP sockets"):
            await start(App(), fd=lent.fileno())
        assert not os.get_blocking(lent.fileno())


UNFIT = [
    (unbound_tcp, ValueError, "is not bound; bind it first"),
    (unbound_unix, ValueError, "is not bound; bind it first"),
    (datagrams, ValueError, "only TCP sockets and Unix stream sockets can be served"),
    (connected, OSError, "cannot listen on .*: Invalid argument; it is a connection"),
]


@pytest.mark.parametrize(
    ("kind", "error", "text"), [(closed, ValueError, "is closed"), (with_tls, TypeError, "as ssl")]
)
async def test_socket_object_that_cannot_be_lent_is_an_error(kind: Kind, error: type[Exception], text: str) -> None:
    """The error that duplicating it would raise is less clear."""
    with kind() as sock, pytest.raises(error, match=text):
        await start(App(), sockets=[sock])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("kind", "error", "text"), UNFIT)
async def test_socket_that_cannot_be_served_is_an_error(
    kind: Kind, error: type[Exception], text: str, way: Any
) -> None:
    """And the app is not started."""
    app = App()
    with kind() as sock:
        with pytest.raises(error, match=text) as raised:
            await start(app, **way(sock))
        assert ("descriptor" if way is by_descriptor else "<socket") in str(raised.value)
    assert app.events == []


async def test_descriptor_that_is_no_open_socket_is_an_error(tmp_path: Path) -> None:
    """Neither a file nor a closed descriptor can be served."""
    with (tmp_path / "file").open("w") as file:
        before = os.listdir("/dev/fd")
        with pytest.raises(OSError, match=rf"cannot listen on descriptor {file.fileno()}: .*non-socket") as raised:
            await start(App(), fd=file.fileno())
        assert raised.value.errno == errno.ENOTSOCK
        assert os.listdir("/dev/fd") == before
    with pytest.raises(OSError, match=r"cannot listen on descriptor \d+: Bad file descriptor") as raised:
        await start(App(), fd=2**31 - 1)
    assert raised.value.errno == errno.EBADF


async def test_one_lent_socket_that_cannot_be_served_fails_the_start() -> None:
    """Nothing is half-started."""
    with lending(tcp4) as fit, connected() as unfit:
        with pytest.raises(OSError, match="Invalid argument"):
            await start(App(), sockets=[fit, unfit])
        async with serving(App(), sockets=[fit]) as server:
            assert await ask(server.url) == "hello"
