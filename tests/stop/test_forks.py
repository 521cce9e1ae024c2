"""
Processes that are forked while a server runs keep neither its port nor its connections, although they live on.
"""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import os
import resource
import signal
import socket
import ssl
import stat
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest

from aioserve import serving, start
from aioserve._net import forks, unix
from tests.helpers import not_portable
from tests.helpers.apps import App, Receive, Scope, Send
from tests.helpers.clients import REQUEST, UPGRADE, connect, connect_tls, get
from tests.helpers.forking import in_child, in_thread, open_at
from tests.helpers.processes import is_free, linux_only
from tests.helpers.turns import MOMENT, turns
from tests.helpers.unix import answers, make_stale

pytestmark = [pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"), not_portable.forks]


class Forker(App):
    """Forks in its lifespan as well."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.kept: list[tuple[str, int]] = []

    async def lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def fork_before(message: dict[str, Any]) -> None:
            self.kept.append((message["type"], in_child(lambda: open_at(self.path))))
            await send(message)

        await super().lifespan(scope, receive, fork_before)


@pytest.mark.parametrize("secure", [False, True])
async def test_child_has_no_socket_of_a_server_in_whatever_turn_it_is_forked(
    path: str, secure: bool, tls_options: dict[str, Any], trusting: ssl.SSLContext
) -> None:
    """A server starts and stops; its connections are accepted, made, upgraded and closed."""

    async def visit() -> None:
        tls: dict[str, Any] = {"ssl": trusting, "server_hostname": "127.0.0.1"} if secure else {}
        async with serving(app, uds=path, **(tls_options if secure else {})):
            _, silent = await asyncio.open_unix_connection(path)  # with TLS, it stays in its handshake
            reader, writer = await asyncio.open_unix_connection(path, **tls)
            writer.write(REQUEST % b"/")
            await reader.readuntil(b"hello")
            most.append(open_at(path))
            writer.write(UPGRADE)
            await reader.readuntil(b"\r\n\r\n")
            writer.transport.abort()
            silent.transport.abort()
            await turns(5)

    app = Forker(path)
    most: list[int] = []
    task = asyncio.create_task(visit())
    kept = set()
    while not task.done():
        if open_at(path):
            kept.add(in_child(lambda: open_at(path)))
        await asyncio.sleep(0)
    await task
    assert most == [3]
    assert kept == {0}
    assert app.kept == [("lifespan.startup.complete", 0), ("lifespan.shutdown.complete", 0)]


async def test_child_has_no_socket_of_a_closing_tls_connection(tls: Any) -> None:
    """Not the duplicate either by which it is watched, where its client does not read."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": bytes(20_000_000)})

    options, context = tls
    server = await start(app, **options)
    address = (server.host, server.port)
    async with connect_tls(server, context) as client:
        client.ask("/")
        await client.reader.readuntil(b"\r\n\r\n")
        transport: Any = client.writer.transport
        transport.pause_reading()
        closing = asyncio.create_task(server.aclose())
        while server.is_serving() or open_at(address) != 2:
            await asyncio.sleep(0)
        assert in_child(lambda: open_at(address)) == 0
    await closing


@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_child_keeps_what_was_lent(kind: str, path: str) -> None:
    """And clients can connect to it when the server has closed; not the connections that the server has accepted."""
    with socket.socket() if kind == "tcp" else socket.socket(socket.AF_UNIX) as lent:
        lent.bind(("127.0.0.1", 0) if kind == "tcp" else path)
        address = lent.getsockname()
        async with serving(App(), sockets=[lent]):
            with socket.socket(lent.family) as client:
                client.connect(address)
                while open_at(address) != 3:
                    await asyncio.sleep(0)
                assert in_child(lambda: [open_at(address), lent.getsockname() == address]) == [1, True]
        with socket.socket(lent.family) as client:
            client.connect(address)


async def test_child_keeps_none_of_several_listeners(path: str) -> None:
    """But for what was lent, which is listened on by a duplicate."""
    with socket.socket() as lent:
        lent.bind(("127.0.0.1", 0))
        async with serving(App(), port=0, uds=path, sockets=[lent]) as server:
            addresses = [("127.0.0.1", server.port), path, lent.getsockname()]
            assert [open_at(each) for each in addresses] == [1, 1, 2]
            assert in_child(lambda: [open_at(each) for each in addresses]) == [0, 0, 1]


async def test_child_keeps_a_socket_that_is_meant_for_it() -> None:
    """A duplicate is the program's; and one that is inheritable is meant for children."""
    async with serving(App()) as server:
        address = (server.host, server.port)
        with server.sockets[0].dup():
            assert in_child(lambda: open_at(address)) == 1
        server.sockets[0].set_inheritable(True)
        assert in_child(lambda: open_at(address)) == 1


async def test_subprocess_gets_a_socket_that_is_passed_to_it() -> None:
    """On uvloop as well, which forks with Python's knowledge even for a subprocess."""
    program = "import socket, sys; print(socket.socket(fileno=int(sys.argv[1])).getsockname()[1])"
    async with serving(App()) as server:
        number = server.sockets[0].fileno()
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", program, str(number), pass_fds=[number], stdout=asyncio.subprocess.PIPE
        )
        out, _ = await process.communicate()
        assert int(out) == server.port
        assert (await get(server)).text == "hello"


async def test_no_other_thread_forks_while_a_connection_is_accepted_or_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child would have a connection that nobody knows yet, or any more."""
    tried = []

    def fork_in_a_thread() -> None:
        thread, kept = in_thread(lambda: in_child(lambda: open_at(address)))
        thread.join(MOMENT)
        tried.append((thread, kept))

    class Accepting(socket.socket):
        def accept(self) -> tuple[socket.socket, Any]:
            accepted = super().accept()
            fork_in_a_thread()
            return accepted

    def close_slowly(sock: socket.socket) -> None:
        if sock.fileno() < 0 or sock.getsockname() != address:
            close(sock)
            return
        number = sock.detach()
        fork_in_a_thread()
        os.close(number)

    with Accepting() as lent:
        lent.bind(("127.0.0.1", 0))
        address, close = lent.getsockname(), socket.socket.close
        monkeypatch.setattr(socket.socket, "close", close_slowly)
        async with serving(App(), sockets=[lent]) as server, connect(server) as connection:
            connection.ask("/")
            await connection.answer()
        for thread, kept in tried:
            thread.join()
            assert kept == [1]  # the lent one
        monkeypatch.undo()
    assert len(tried) > 1


@pytest.mark.parametrize("nothing", [os.devnull, "/missing"])
async def test_child_needs_no_free_descriptor_to_let_go(nothing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It makes room for the one that it opens: /dev/null, or the root directory where that is missing."""
    monkeypatch.setattr(os, "devnull", nothing)
    async with serving(App()) as server, connect(server) as connection:
        connection.ask("/")
        await connection.answer()
        numbers = [int(each) for each in os.listdir("/dev/fd")]
        tracked = [each() for each in forks._tracked]
        ours = [each.fileno() for each in tracked if each is not None and each.fileno() >= 0]
        assert len(ours) == 2
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(numbers) + 1, limits[1]))
        with ExitStack() as stack:
            stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
            with pytest.raises(OSError, match="Too many open files"):
                while True:
                    stack.callback(os.close, os.open("/", os.O_RDONLY))
            child = os.fork()
            if child == 0:
                os._exit(sum(map(is_socket, ours)))
            assert os.waitpid(child, 0)[1] == 0  # noqa: ASYNC222 (it ends at once)


def is_socket(number: int) -> bool:
    return stat.S_ISSOCK(os.fstat(number).st_mode)


# Forks that Python does not know of, and moments in which a child could keep something else.


@linux_only
@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_child_that_c_code_has_forked_keeps_no_port(kind: str, path: str) -> None:
    """Its copy of the listening socket does not listen any more; and the parent listens if the child closes it."""

    def fork_by_c(act: Callable[[], object]) -> int:
        child: int = ctypes.PyDLL(None).fork()
        if child == 0:
            try:
                act()
            finally:
                os._exit(0)
        return child

    options: dict[str, Any] = {} if kind == "tcp" else {"uds": path}
    server = await start(App(), **options)
    (listener,) = server._engine.listeners
    os.waitpid(fork_by_c(listener.close), 0)  # noqa: ASYNC222 (it ends at once)
    living = fork_by_c(signal.pause)
    try:
        if kind == "tcp":
            assert (await get(server)).text == "hello"
            await server.aclose()
            assert is_free(server.port)
            async with serving(App(), port=server.port or 0) as again:
                assert (await get(again)).text == "hello"
        else:
            assert await answers(path)
            os.link(path, f"{path}2")  # which is not removed
            await server.aclose()
            with socket.socket(socket.AF_UNIX) as client, pytest.raises(ConnectionRefusedError):
                client.connect(f"{path}2")
    finally:
        os.kill(living, signal.SIGKILL)
        os.waitpid(living, 0)  # noqa: ASYNC222 (it ends at once)


async def test_child_does_not_keep_the_lock_at_a_unix_path(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is forked by another thread while a server replaces a stale socket there."""
    children = []

    def fork_and_remove(*args: Any) -> None:
        if not (child := os.fork()):
            signal.pause()
        children.append(child)
        os.link(f"{directory}/.app.sock.lock", f"{directory}/copy")
        remove(*args)

    directory = os.path.dirname(path)
    remove = unix._remove_stale
    monkeypatch.setattr(unix, "_remove_stale", fork_and_remove)
    make_stale(path)
    try:
        async with serving(App(), uds=path):
            with open(f"{directory}/copy") as lock:  # noqa: ASYNC230
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)  # noqa: ASYNC222 (it ends at once)
    assert children
