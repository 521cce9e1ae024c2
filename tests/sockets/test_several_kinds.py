"""
Several kinds of listeners for one app: all of them are open or none is, and one stop ends them.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import stat
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx
import pytest
import uvicorn
import websockets

from aioserve import Swappable, serving, start, start_in_thread
from aioserve._net.listeners import duplicate_sockets
from tests.helpers import not_portable
from tests.helpers.apps import App, Receive, Scope, Send
from tests.helpers.clients import PIPELINING, REQUEST, get
from tests.helpers.turns import turns
from tests.helpers.unix import answers

UNIX = not_portable.unix_sockets


class Held(App):
    """Waits in its startup until it may go on."""

    def __init__(self) -> None:
        super().__init__()
        self.starting, self.go = asyncio.Event(), asyncio.Event()

    async def lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.starting.set()
        await self.go.wait()
        await super().lifespan(scope, receive, send)


class Lent:
    """Sockets of the test's own, which are bound and do not listen."""

    def __init__(self, stack: contextlib.ExitStack, path: Path) -> None:
        self.sockets = [stack.enter_context(socket.socket()) for _ in range(2)]
        for each in self.sockets:
            each.bind(("127.0.0.1", 0))
        self.ports = [each.getsockname()[1] for each in self.sockets]
        self.unix_path = str(path / "lent.sock")
        self.unix = stack.enter_context(socket.socket(socket.AF_UNIX))
        self.unix.bind(self.unix_path)

    def are_open(self) -> bool:
        return all(each.fileno() >= 0 and each.getsockname() for each in (*self.sockets, self.unix))


@pytest.fixture
def lent(tmp_path: Path) -> Iterator[Lent]:
    with contextlib.ExitStack() as stack:
        yield Lent(stack, tmp_path)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


def listens(address: Any) -> bool:
    with socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET) as client:
        return client.connect_ex(address) == 0


async def all_answer(urls: list[str]) -> bool:
    for url in urls:
        scheme, _, address = url.partition("://")
        if scheme == "http+unix":
            assert await answers(unquote(address))
        else:
            async with httpx.AsyncClient(trust_env=False) as client:
                assert (await client.get(url)).text == "hello"
    return True


def options_of(kinds: str, path: str, lent: Lent) -> dict[str, Any]:
    possible: dict[str, Any] = {
        "port": 0,
        "host": "127.0.0.1",
        "uds": path,
        "fd": lent.sockets[0].fileno(),
        "sockets": [lent.sockets[1]],
        "unix": [lent.unix],
    }
    return {"sockets" if kind == "unix" else kind: possible[kind] for kind in kinds.split()}


@pytest.mark.parametrize(
    "kinds",
    [
        pytest.param("uds port", marks=UNIX),
        pytest.param("fd port", marks=UNIX),
        "sockets port",
        pytest.param("sockets uds", marks=UNIX),
        pytest.param("unix fd host", marks=UNIX),
        pytest.param("sockets fd uds port", marks=UNIX),
    ],
)
async def test_kinds_of_listeners_are_served_together_by_one_app(kinds: str, path: str, lent: Lent) -> None:
    """In the order TCP, uds, fd, sockets; what was lent stays with its lender."""
    app = App()
    async with serving(app, **options_of(kinds, path, lent)) as server:
        order = [name for name in ("port", "host", "uds", "fd", "sockets", "unix") if name in kinds.split()]
        unix_url = "http+unix://" + path.replace("/", "%2F")
        expected = {"uds": unix_url, "unix": unix_url.replace("app.sock", "lent.sock")}
        expected |= {"fd": f"http://127.0.0.1:{lent.ports[0]}", "sockets": f"http://127.0.0.1:{lent.ports[1]}"}
        expected |= dict.fromkeys(("port", "host"), server.urls[0])
        assert server.urls == [expected[name] for name in order]
        assert server.url == server.urls[0]
        first = next(url for url in server.urls if "unix" not in url)
        assert (server.host, server.port) == ("127.0.0.1", int(first.rpartition(":")[2]))
        assert len(server.sockets) == len(order)
        assert await all_answer(server.urls)
        if "port" in order:
            assert server.port not in lent.ports
    assert app.events.count("startup") == app.events.count("shutdown") == 1
    assert "port" not in order or not listens(("127.0.0.1", server.port))
    assert not os.path.lexists(path)
    assert lent.are_open()


@UNIX
async def test_tcp_is_opened_only_if_it_is_asked_for_or_nothing_else_is(path: str, lent: Lent) -> None:
    """`reuse_port` asks for it as well."""
    for options, kinds in (
        ({}, "http"),
        ({"uds": path}, "http+unix"),
        ({"sockets": [lent.unix], "uds": path}, "http+unix http+unix"),
        ({"uds": path, "host": None}, "http http http+unix"),
        ({"uds": path, "reuse_port": True}, "http http+unix"),
        ({"uds": path, "reuse_port": False, "fd": None, "sockets": None}, "http+unix"),
    ):
        passed: Any = options
        async with serving(App(), **passed) as server:
            assert " ".join(url.partition("://")[0] for url in server.urls) == kinds


@UNIX
@pytest.mark.parametrize("http", PIPELINING)
async def test_each_request_knows_the_listener_that_it_came_by(
    http: Any, path: str, tmp_path: Path, lent: Lent
) -> None:
    """Also a WebSocket; only connections of the Unix socket have its path, which is not the name it was bound by."""
    servers: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        servers.append(scope["server"])
        await App()(scope, receive, send)

    (tmp_path / "other").mkdir()
    other_path = str(tmp_path / "other" / "other.sock")
    async with serving(App(), uds=other_path) as other:
        sockets = [lent.sockets[1], lent.unix, *other.sockets]
        options: dict[str, Any] = {"http": http, "lifespan": "off", "sockets": sockets}
        async with serving(app, port=0, uds=path, fd=lent.sockets[0].fileno(), **options) as server:
            assert server.urls[5].endswith("other.sock")
            await all_answer(server.urls[:5])
            async with websockets.connect(f"ws://127.0.0.1:{server.port}/", proxy=None):
                pass
            async with websockets.unix_connect(path, "ws://test/"):
                pass
            addresses = [("127.0.0.1", port) for port in (server.port, *lent.ports)]
            unnamed = servers[4]  # by uvicorn, until version 0.40
            assert unnamed in (None, (lent.unix_path, None))
            assert servers == [addresses[0], (path, None), *addresses[1:], unnamed, addresses[0], (path, None)]
            other.close()  # so that its queue is ours alone
            await other.wait_closed()
    assert not os.path.lexists(other_path)


@UNIX
async def test_duplicate_of_another_servers_unix_socket_has_its_path_for_the_app(tmp_path: Path) -> None:
    """Both servers have a socket of that kind, and the two paths are not mixed up."""
    seen: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["server"])
        await App()(scope, receive, send)

    paths = [str(tmp_path / name) for name in ("one.sock", "two.sock")]
    async with serving(app, uds=paths[0], lifespan="off") as one:
        async with serving(app, uds=paths[1], sockets=one.sockets, lifespan="off") as two:
            assert [unquote(url).removeprefix("http+unix://") for url in two.urls] == paths[::-1]
            for _ in range(10):  # one of the two servers accepts
                await all_answer(two.urls)
    assert set(seen) == {(path, None) for path in paths}


@UNIX
async def test_tls_is_for_all_listeners(path: str, tls: Any, lent: Lent) -> None:
    """As the option is the server's."""
    options, context = tls
    async with serving(App(), port=0, uds=path, fd=lent.sockets[0].fileno(), **options) as server:
        assert [url.partition("://")[0] for url in server.urls] == ["https", "https+unix", "https"]
        for url, uds in zip((server.urls[0], "https://127.0.0.1", server.urls[2]), (None, path, None), strict=True):
            transport = httpx.AsyncHTTPTransport(uds=uds, verify=context)
            async with httpx.AsyncClient(transport=transport) as client:
                assert (await client.get(url)).text == "hello"


# One of them fails.


@UNIX
@pytest.mark.parametrize("failing", ["port", "uds", "fd", "sockets", "a closed socket"])
async def test_listener_that_cannot_be_bound_leaves_none_of_the_others(failing: str, path: str, lent: Lent) -> None:
    """The error names it, and the app has not started."""
    app = App()
    with contextlib.ExitStack() as stack:
        taken = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        connection = stack.enter_context(socket.create_connection(taken.getsockname()))
        datagrams = stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
        datagrams.bind(("127.0.0.1", 0))
        closed = socket.socket()
        closed.close()
        port = free_port()
        options: dict[str, Any] = {
            "port": port,
            "uds": path,
            "fd": lent.sockets[0].fileno(),
            "sockets": lent.sockets[1:],
        }
        bad: dict[str, tuple[str, Any, str]] = {
            "port": ("port", taken.getsockname()[1], f"127.0.0.1:{taken.getsockname()[1]}"),
            "uds": ("uds", f"{path}/none", f"{path}/none"),
            "fd": ("fd", datagrams.fileno(), f"descriptor {datagrams.fileno()}"),
            "sockets": ("sockets", [lent.sockets[1], connection], f"fd={connection.fileno()}"),
            "a closed socket": ("sockets", [lent.sockets[1], closed], r"\[closed\]"),
        }
        name, value, named = bad[failing]
        with pytest.raises((OSError, ValueError), match=named):
            await start(app, **{**options, name: value})
        assert app.events == []
        assert not any(map(listens, [("127.0.0.1", port), path, *(("127.0.0.1", each) for each in lent.ports)]))
        assert not os.path.lexists(path)
        assert lent.are_open()
        async with serving(app, **options) as server:
            assert await all_answer(server.urls)


async def test_socket_that_was_closed_in_the_meantime_is_named_by_the_error() -> None:
    """While another listener's name was resolved."""
    closed = socket.socket()
    closed.close()
    with pytest.raises(OSError, match=r"cannot listen on <socket\.socket \[closed\]"):
        await duplicate_sockets([closed])


@asynccontextmanager
async def starting(app: Held, **options: Any) -> AsyncIterator[asyncio.Task[Any]]:
    """Let a server wait in its startup; its start fails in the block."""
    task = asyncio.create_task(start(app, **options))
    await app.starting.wait()
    yield task
    assert task.cancelled() or task.exception() is not None


@UNIX
@pytest.mark.parametrize("failing", ["port", "uds", "fd", "sockets"])
async def test_listener_that_cannot_listen_after_the_startup_leaves_none_of_the_others(
    failing: str, path: str, lent: Lent, caplog: pytest.LogCaptureFixture
) -> None:
    """Another program was quicker; the app is shut down in order."""
    app = Held()
    port = free_port()
    for each in lent.sockets:
        each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    options: dict[str, Any] = {"port": port, "uds": path, "fd": lent.sockets[0].fileno(), "sockets": lent.sockets[1:]}
    where: dict[str, Any] = {"port": ("127.0.0.1", port), "uds": path}
    where |= {"fd": ("127.0.0.1", lent.ports[0]), "sockets": ("127.0.0.1", lent.ports[1])}
    named = {"port": f"127.0.0.1:{port}", "uds": path, "fd": f"descriptor {options['fd']}"}
    with socket.socket(socket.AF_UNIX if failing == "uds" else socket.AF_INET) as quicker:
        async with starting(app, **options) as task:
            if failing != "uds":
                quicker.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            quicker.bind(where[failing])
            quicker.listen()
            app.go.set()
            with pytest.raises(
                OSError, match=f"cannot listen on .*{named.get(failing, str(lent.ports[1]))}.*; |another server is"
            ) as caught:
                await task
        assert caught.value.errno == errno.EADDRINUSE
        assert app.events == ["startup", "shutdown", "lifespan over"]
        assert not any(listens(where[name]) for name in ("port", "uds") if name != failing)
        assert os.path.lexists(path) == (failing == "uds")
        assert lent.are_open()
        assert not any("Uvicorn running" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("failing", ["port", "sockets"])
async def test_tcp_listener_that_cannot_listen_leaves_no_other(failing: str, lent: Lent) -> None:
    """On each loop, also one without `add_reader()`."""
    app, port = Held(), free_port()
    (sock,) = sockets = lent.sockets[1:]
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    with socket.socket() as quicker:
        async with starting(app, port=port, sockets=sockets) as task:
            quicker.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            quicker.bind(("127.0.0.1", port if failing == "port" else lent.ports[1]))
            quicker.listen()
            app.go.set()
            with pytest.raises(OSError, match=r"cannot listen on .*in use; another server"):
                await task
        assert failing == "port" or not listens(("127.0.0.1", port))
        assert app.events == ["startup", "shutdown", "lifespan over"]
    async with serving(App(), port=port, sockets=sockets) as server:
        assert await all_answer(server.urls)


@UNIX
async def test_start_that_is_cancelled_leaves_no_listener(path: str, lent: Lent) -> None:
    """While the app starts."""
    app, port = Held(), free_port()
    async with starting(app, port=port, uds=path, sockets=[lent.unix]) as task:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert not any(map(listens, [("127.0.0.1", port), path, lent.unix_path]))
    assert not os.path.lexists(path)


@not_portable.lent_twice
async def test_one_socket_can_be_lent_twice(lent: Lent) -> None:
    """It has two URLs then, which are the same."""
    (sock,) = lent.sockets[1:]
    async with serving(App(), sockets=[sock, sock]) as server:
        assert server.urls == [server.url] * 2
        for _ in range(5):
            assert (await get(server)).text == "hello"
    assert lent.are_open()


@UNIX
async def test_socket_and_its_descriptor_can_be_lent_together(lent: Lent) -> None:
    """The same."""
    (sock,) = lent.sockets[1:]
    async with serving(App(), sockets=[sock], fd=sock.fileno()) as server:
        assert server.urls == [server.url] * 2
        for _ in range(5):
            assert (await get(server)).text == "hello"
    assert lent.are_open()


@pytest.mark.parametrize("listening", [True, False])
async def test_port_of_a_lent_socket_cannot_be_bound_beside_it(listening: bool, lent: Lent) -> None:
    """The error says where; nothing is left."""
    (sock,) = lent.sockets[1:]
    if listening:
        sock.listen()
    app = App()
    with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{lent.ports[1]}: Address already in use"):
        await start(app, port=lent.ports[1], sockets=[sock])
    assert app.events == []
    assert listens(("127.0.0.1", lent.ports[1])) == listening


# The stop.


@UNIX
async def test_stop_answers_what_waits_on_each_listener_and_leaves_the_queue_of_a_lent_one(
    path: str, lent: Lent
) -> None:
    """All connect within one turn of the loop, as clients of another process can."""
    (sock,) = lent.sockets[1:]
    with contextlib.ExitStack() as stack:

        def ask(address: Any) -> list[socket.socket]:
            family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
            clients = [stack.enter_context(socket.socket(family)) for _ in range(20)]
            for client in clients:
                client.connect(address)
                client.sendall(REQUEST % b"/")
                client.settimeout(10)
            return clients

        async with serving(App(), port=0, uds=path, sockets=[sock]) as server:
            await turns(3)
            own = [*ask(("127.0.0.1", server.port)), *ask(path)]
            others = ask(("127.0.0.1", lent.ports[1]))
            server.close()
        assert all(client.recv(1000).startswith(b"HTTP/1.1 200") for client in own)
        async with serving(App(), sockets=[sock]) as successor:
            while server.stats.served + successor.stats.served < len(own) + len(others):
                await asyncio.sleep(0)
        assert all(client.recv(1000).startswith(b"HTTP/1.1 200") for client in others)
    assert not os.path.lexists(path)


# Who else takes the options.


@pytest.mark.parametrize("own", ["port", "fd", "uds"])
async def test_sockets_beside_a_uvicorn_config_take_the_place_of_its_own_address(
    own: str, path: str, lent: Lent
) -> None:
    """As with uvicorn's `Server.serve(sockets=...)`."""
    taken = {"port": lent.ports[0], "fd": 2, "uds": path}
    config: Any = uvicorn.Config(App(), log_config=None, **{own: taken[own]})
    async with serving(config, sockets=lent.sockets[1:]) as server:
        assert server.urls == [f"http://127.0.0.1:{lent.ports[1]}"]
        assert await all_answer(server.urls)
        assert not os.path.lexists(path)
    with pytest.raises(TypeError, match=r"uds_mode cannot be given together with a uvicorn\.Config"):
        await start(config, sockets=lent.sockets[1:], uds_mode=0o660)
    with pytest.raises(ValueError, match="sockets is an empty sequence"):
        await start(config, sockets=[])


async def test_no_sockets_beside_a_uvicorn_config_leave_it_its_address() -> None:
    """None is none."""
    async with serving(uvicorn.Config(App(), port=0, log_config=None), sockets=None) as server:
        assert (await get(server)).text == "hello"


@UNIX
async def test_swappable_is_swapped_on_all_listeners_at_once(path: str) -> None:
    """It knows nothing of them."""

    async def new(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"3")]})
        await send({"type": "http.response.body", "body": b"new"})

    swappable = Swappable(App())
    async with serving(swappable, port=0, uds=path) as server:
        assert await all_answer(server.urls)
        await swappable.swap(new)
        assert (await get(server)).text == "new"
        assert not await answers(path)


@UNIX
def test_server_in_a_thread_has_several_listeners(path: str) -> None:
    """With the options of `serving()`."""
    with start_in_thread(App, factory=True, port=0, uds=path, uds_mode=0o640) as server:
        assert [url.partition("://")[0] for url in server.urls] == ["http", "http+unix"]
        assert stat.S_IMODE(os.lstat(path).st_mode) == 0o640
        with httpx.Client(transport=httpx.HTTPTransport(uds=path)) as client:
            assert client.get("http://test").text == "hello"
        assert httpx.get(f"http://127.0.0.1:{server.port}", trust_env=False).text == "hello"
    assert not os.path.lexists(path)


@UNIX
async def test_log_names_all_listeners(path: str, caplog: pytest.LogCaptureFixture) -> None:
    """One line for each at the start, and one for all at the end."""
    caplog.set_level("INFO", "uvicorn.error")
    async with serving(App(), port=0, uds=path) as server:
        pass
    lines = [record.getMessage() for record in caplog.records if record.name == "uvicorn.error"]
    assert lines == [
        f"Uvicorn running on {server.url}",
        f"Uvicorn running on unix socket {path}",
        f"Closed {', '.join(server.urls)}",
    ]
