"""
The sockets are bound before the app's startup, and listen after it: whoever connects earlier is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from aioserve import Server, StartupError, serving, serving_process, start
from tests.helpers import not_portable
from tests.helpers.apps import App, Receive, Scope, Send
from tests.helpers.clients import get
from tests.helpers.processes import linux_only
from tests.helpers.programs import Program
from tests.helpers.turns import turns

pytestmark = pytest.mark.usefixtures("short_grace")


class Held(App):
    """An app whose startup waits for an event."""

    def __init__(self) -> None:
        super().__init__()
        self.starting = asyncio.Event()
        self.go = asyncio.Event()

    async def lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.state = scope["state"]
        self.starting.set()
        await self.go.wait()
        await super().lifespan(scope, receive, send)


@asynccontextmanager
async def starting(app: Held, **options: Any) -> AsyncIterator[asyncio.Task[Server]]:
    """Let a server wait in its startup for the length of the block; then it starts, and stops."""
    task = asyncio.create_task(start(app, **options))
    await app.starting.wait()
    try:
        yield task
    finally:
        app.go.set()
        with contextlib.suppress(OSError, StartupError):
            await (await task).aclose()


def free_port(host: str = "127.0.0.1") -> int:
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
        port: int = sock.getsockname()[1]
        return port


def connect(address: Any) -> socket.socket:
    """Connect at once, or raise what says that nobody listens."""
    sock = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
    try:
        sock.connect(address)
    except BaseException:
        sock.close()
        raise
    return sock


async def test_client_that_connects_during_the_startup_is_refused() -> None:
    """Its request is not executed later, when nobody waits for the answer any more."""
    app = Held()
    address = ("127.0.0.1", free_port())
    async with starting(app, port=address[1]) as task:
        with pytest.raises(ConnectionRefusedError):
            connect(address)
        app.go.set()
        server = await task
        assert (await get(server)).text == "hello"
        assert server.stats.served == 1


async def test_client_of_a_startup_that_fails_is_refused() -> None:
    """It is not accepted and then reset."""
    app = Held()
    app.startup = "raises"
    address = ("127.0.0.1", free_port())
    async with starting(app, port=address[1]) as task:
        with pytest.raises(ConnectionRefusedError):
            connect(address)
        app.go.set()
        with pytest.raises(StartupError):
            await task


async def test_unix_socket_appears_when_it_can_be_connected_to(tmp_path: Path) -> None:
    """Until then there is no file, and a stale one stays as it is."""
    app = Held()
    path = str(tmp_path / "app.sock")
    async with starting(app, uds=path) as task:
        assert os.listdir(tmp_path) == []
        app.go.set()
        await task
        connect(path).close()
    assert os.listdir(tmp_path) == []


async def test_stale_unix_socket_is_replaced_when_the_app_has_started(tmp_path: Path) -> None:
    """A startup that fails leaves it alone."""
    path = str(tmp_path / "app.sock")
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(path)
    inode = os.stat(path).st_ino
    with pytest.raises(StartupError):
        await start(App("raises"), uds=path)
    assert os.stat(path).st_ino == inode
    async with serving(App(), uds=path):
        connect(path).close()


@pytest.mark.parametrize("fit", ["missing/app.sock", "file", "x" * 200])
async def test_unix_socket_that_cannot_appear_is_an_error_before_the_app_starts(fit: str, tmp_path: Path) -> None:
    """Of a directory that is missing, of a file that is no socket, of a path that is too long."""
    (tmp_path / "file").write_text("")
    app = App()
    with pytest.raises(OSError, match="cannot listen on") as raised:
        await start(app, uds=tmp_path / fit)
    assert raised.value.errno in (errno.ENOENT, errno.EADDRINUSE, errno.ENAMETOOLONG)
    assert app.events == []


async def test_lent_socket_that_is_only_bound_listens_after_the_startup() -> None:
    """Whoever lends it can be reached by it only when the app has started."""
    app = Held()
    with socket.socket() as lent:
        lent.bind(("127.0.0.1", 0))
        async with starting(app, sockets=[lent]) as task:
            with pytest.raises(ConnectionRefusedError):
                connect(lent.getsockname())
            app.go.set()
            assert (await get(await task)).text == "hello"


async def test_lent_socket_that_listens_already_keeps_what_waits_in_its_queue() -> None:
    """A restart loses no connection that arrives during the startup."""
    app = Held()
    with socket.create_server(("127.0.0.1", 0)) as lent:
        async with starting(app, sockets=[lent]) as task:
            reader, writer = await asyncio.open_connection(*lent.getsockname())
            writer.write(b"GET / HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n")
            await turns(10)
            app.go.set()
            await task
            assert (await reader.read()).endswith(b"hello")
            writer.close()
            await writer.wait_closed()


async def test_second_server_that_starts_on_the_same_port_is_shut_down_in_order() -> None:
    """Both have bound it, and the first one to have started listens; the app of the other one had started."""
    first, second = Held(), Held()
    port = free_port()
    async with starting(first, port=port) as one, starting(second, port=port) as other:
        first.go.set()
        assert (await get(await one)).text == "hello"
        second.go.set()
        with pytest.raises(
            OSError, match=rf"cannot listen on 127\.0\.0\.1:{port}: .*; another server has begun"
        ) as raised:
            await other
        assert raised.value.errno == errno.EADDRINUSE
        assert second.events == ["startup", "shutdown", "lifespan over"]
        assert (await get(await one)).text == "hello"


async def test_second_server_that_starts_at_the_same_path_is_shut_down_in_order(tmp_path: Path) -> None:
    """The first one keeps its socket."""
    first, second = Held(), Held()
    path = str(tmp_path / "app.sock")
    async with starting(first, uds=path) as one, starting(second, uds=path) as other:
        first.go.set()
        await one
        second.go.set()
        with pytest.raises(OSError, match="another server is listening there"):
            await other
        assert second.events == ["startup", "shutdown", "lifespan over"]
        connect(path).close()
    assert os.listdir(tmp_path) == []


async def test_port_that_somebody_listens_on_is_an_error_before_the_app_starts() -> None:
    """As with any server."""
    app = App()
    with socket.create_server(("127.0.0.1", 0)) as sock, pytest.raises(OSError, match="cannot listen on"):
        await start(app, port=sock.getsockname()[1])
    assert app.events == []


async def test_port_that_the_kernel_has_chosen_is_bound_by_nobody_else() -> None:
    """With SO_REUSEADDR, another program could bind it as well, and one of them would fail to listen."""
    app = Held()
    async with starting(app):
        assert app.state is not None
        with socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with pytest.raises(OSError, match="in use"):
                other.bind(("127.0.0.1", app.state["aioserve"].port))


async def test_port_that_the_kernel_has_chosen_can_be_bound_again_at_once() -> None:
    """Also while connections of the first server linger in the kernel."""
    async with serving(App()) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"GET / HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n")
        assert (await reader.read()).endswith(b"hello")  # the server has closed first, so its side lingers
        writer.close()
        await writer.wait_closed()
        port = server.port
    assert port is not None
    async with serving(App(), port=port) as again:
        assert (await get(again)).text == "hello"


async def test_starting_server_takes_no_connections_of_another_one_on_the_port() -> None:
    """With `reuse_port`, the kernel gives each listening socket its share."""
    app = Held()
    async with serving(App(), reuse_port=True) as server:
        async with starting(app, port=server.port, reuse_port=True):
            for _ in range(30):
                assert (await get(server)).text == "hello"
        assert server.stats.served == 30


async def test_stop_that_is_asked_for_during_the_startup_comes_after_it() -> None:
    """Nothing is left."""
    app = Held()
    async with starting(app) as task:
        assert app.state is not None
        app.state["aioserve"].close()
        app.go.set()
        await (await task).wait_closed()


SLOW = """
import asyncio, contextlib, sys
from pathlib import Path

@contextlib.asynccontextmanager
async def lifespan(scope):
    print("starting", file=sys.stderr, flush=True)
    while not Path({flag!r}).exists():
        await asyncio.sleep(0.01)
    yield

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        async with lifespan(scope):
            await send({{"type": "lifespan.startup.complete"}})
            await receive()
        await send({{"type": "lifespan.shutdown.complete"}})
        return
    await send({{"type": "http.response.start", "status": 200, "headers": []}})
    await send({{"type": "http.response.body", "body": b"hello"}})
"""


@linux_only
@pytest.mark.parametrize("kind", ["port", "uds"])
@not_portable.child_processes
async def test_child_process_listens_when_its_app_has_started(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The parent binds, the child listens; a Unix socket is gone at the end, also if the child was killed."""
    flag, path = tmp_path / "flag", tmp_path / "app.sock"
    (tmp_path / "slow_app.py").write_text(SLOW.format(flag=str(flag)))
    monkeypatch.syspath_prepend(tmp_path)
    address: Any = ("127.0.0.1", free_port()) if kind == "port" else str(path)
    options: dict[str, Any] = {"port": address[1]} if kind == "port" else {"uds": path}

    async def body() -> None:
        async with serving_process("slow_app:app", **options) as server:
            connect(address).close()
            os.kill(server.pid, 9)
            await asyncio.Event().wait()

    task = asyncio.create_task(body())
    while "starting" not in capfd.readouterr().err:
        await asyncio.sleep(0.01)
    with pytest.raises((ConnectionRefusedError, FileNotFoundError)):
        connect(address)
    flag.write_text("")
    with pytest.raises(Exception, match="killed by SIGKILL"):
        await task
    assert not path.exists()


@linux_only
@not_portable.child_processes
async def test_child_process_that_cannot_listen_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Another server has begun to listen on the port during the startup."""
    flag = tmp_path / "flag"
    (tmp_path / "slow_app.py").write_text(SLOW.format(flag=str(flag)))
    monkeypatch.syspath_prepend(tmp_path)
    port = free_port()

    async def body() -> None:
        async with serving_process("slow_app:app", port=port):
            raise AssertionError

    task = asyncio.create_task(body())
    while "starting" not in capfd.readouterr().err:
        await asyncio.sleep(0.01)
    async with serving(App(), port=port) as server:
        flag.write_text("")
        with pytest.raises(OSError, match=rf"cannot listen on 127\.0\.0\.1:{port}"):
            await task
        assert (await get(server)).text == "hello"


def test_command_line_listens_when_the_app_has_started(tmp_path: Path) -> None:
    """A probe that connects earlier is refused."""
    flag = tmp_path / "flag"
    (tmp_path / "slow_app.py").write_text(SLOW.format(flag=str(flag)))
    port = free_port()
    with Program("-m", "aioserve", "--port", str(port), "slow_app:app", cwd=tmp_path) as program:
        assert program.process.stderr is not None
        while "starting" not in program.process.stderr.readline():
            pass
        with pytest.raises(ConnectionRefusedError):
            connect(("127.0.0.1", port))
        flag.write_text("")
        program.wait_for("http://")
        connect(("127.0.0.1", port)).close()
        program.send(signal.SIGINT)
        assert program.end()[0] == 0
