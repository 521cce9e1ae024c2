"""
The loop ends before the server: what can be closed without it is closed, and one line of log says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import re
import signal
import socket
import ssl
import sys
import threading
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

from aioserve import Server, ServerProcess, Swappable, serving, serving_process, start
from tests.helpers.apps import App, Receive, Scope, Send
from tests.helpers.clients import PIPELINING, REQUEST, UPGRADE
from tests.helpers.processes import TALKING, linux_only
from tests.helpers.programs import Program
from tests.helpers.turns import turns

pytestmark = [
    pytest.mark.usefixtures("short_grace"),
    # Python, asyncio and uvloop warn of a socket that is open when its loop is closed.
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]

LOST = "its sockets are closed, but requests in flight are lost, and the app's lifespan was not shut down"
LOGGED = r"{}: its event loop has ended before the server: {}; leave the block, or await aclose\(\), while it runs"


class Simple(App):
    """An app without any task of its own, whose end asyncio would report."""

    async def lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        self.events.append("shutdown")
        await send({"type": "lifespan.shutdown.complete"})


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def loop(request: pytest.FixtureRequest) -> Iterator[asyncio.AbstractEventLoop]:
    """Make a loop that the test runs itself, and may close."""
    made = request.param()
    yield made
    made.close()
    gc.collect()  # so that nothing of this test is finalized in another one


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what was logged at level WARNING or above."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def drive(coroutine: Coroutine[Any, Any, Any]) -> None:
    """Run a coroutine to its end without a loop; it must not wait for anything."""
    with pytest.raises(StopIteration):
        coroutine.send(None)


def ask(server: Server, request: bytes) -> socket.socket:
    client = socket.socket(socket.AF_UNIX if "+unix:" in server.url else socket.AF_INET)
    client.settimeout(10)
    listener = server.sockets[0]
    client.connect(listener.getsockname())
    client.sendall(request)
    return client


# Who runs the loop closes it.


@pytest.mark.parametrize("swappable", [False, True], ids=["", "in a Swappable"])
@pytest.mark.parametrize("moment", ["idle", "starting", "in a request", "in a WebSocket", "stopping"])
@pytest.mark.parametrize("http", PIPELINING)
def test_server_whose_loop_was_closed_is_reported_once(
    loop: asyncio.AbstractEventLoop, moment: str, http: Any, swappable: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """
    When it is garbage. asyncio says nothing of its tasks, and uvicorn nothing of its handlers. (The legacy protocol of
    the library `websockets` has tasks of its own, which asyncio reports.)
    """

    async def run(clients: list[socket.socket]) -> None:
        app: Any = App(startup="hangs") if moment == "starting" else Simple()
        starting = asyncio.ensure_future(start(Swappable(app) if swappable else app, http=http, ws="wsproto"))
        if moment == "starting":
            starting._log_destroy_pending = False  # type: ignore[attr-defined]  # this one is the test's
            await turns()
            return
        server = await starting
        gc.collect()  # so the server is older than its handlers, and is finalized before them
        if moment in ("in a request", "stopping"):
            clients.append(ask(server, REQUEST % b"/hold"))
            await app.holding.wait()
        elif moment == "in a WebSocket":
            clients.append(ask(server, UPGRADE))
            await turns()
        if moment == "stopping":
            server.close()
            await turns()

    clients: list[socket.socket] = []
    loop.run_until_complete(run(clients))
    loop.close()
    gc.collect()
    (message,) = logged(caplog)
    assert re.fullmatch(LOGGED.format(r"http://127\.0\.0\.1:\d+", LOST), message)
    for client in clients:
        with client:
            while client.recv(1000):
                pass


def test_server_says_that_its_loop_was_closed(
    loop: asyncio.AbstractEventLoop, caplog: pytest.LogCaptureFixture
) -> None:
    """It is neither serving nor closed; in a notebook it is no link. It can be closed from any loop."""
    server = loop.run_until_complete(start(Simple()))
    loop.close()
    assert repr(server) == f"<aioserve.Server {server.url} its loop was closed>"
    assert server._repr_html_() == f"aioserve.Server {server.url} <em>its loop was closed</em>"
    assert not server.is_serving()
    server.close()

    async def close() -> None:
        await server.aclose()
        async with server:
            pass

    asyncio.run(close())
    assert logged(caplog) == [LOGGED.replace("\\", "").format(server.url, LOST)]
    with socket.socket() as client:
        assert client.connect_ex((server.host, server.port)) != 0


# Its tasks take steps although asyncio knows no running loop, as qasync lets them when Qt has ended the loop.


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="asyncio refuses steps of tasks without a running loop")
@pytest.mark.parametrize("loop", [asyncio.new_event_loop], ids=["asyncio"], indirect=True)
@pytest.mark.parametrize("moment", ["idle", "partial", "in a request", "in a WebSocket", "forced", "failed"])
@pytest.mark.parametrize("http", PIPELINING)
def test_stop_needs_no_running_loop(
    loop: Any, moment: str, http: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It closes everything and ends the lifespan; only what was forced is logged."""
    app = Simple()
    server = loop.run_until_complete(start(app, http=http, ws="wsproto", shutdown_timeout=0.1))
    clients: list[socket.socket] = []
    if moment != "idle":
        request = {"partial": b"GET / HT", "in a WebSocket": UPGRADE}.get(moment, REQUEST % b"/hold")
        clients.append(ask(server, request))
        loop.run_until_complete(app.holding.wait() if b"/hold" in request else turns())
    if moment == "failed":
        monkeypatch.setattr(server._engine.shutdown, "_stop_accepting", lambda: 1 / 0)
    address = server.host, server.port

    server.close(timeout=0 if moment == "forced" else None)
    while not server._engine.closed.is_set():
        loop.call_soon(lambda: None)
        loop._run_once()

    assert "shutdown" in app.events
    for client in clients:
        with client:
            while client.recv(1000):
                pass
    with socket.socket() as late:
        assert late.connect_ex(address) != 0
    messages = logged(caplog)
    if moment == "failed":
        failure = "the server's own task failed while it was stopping: ZeroDivisionError: division by zero"
        assert messages == [f"{server.url}: {failure}"]
    elif moment in ("in a request", "forced"):
        (message,) = messages
        assert "forced" in message
    else:
        assert messages == []


# Who has entered the block leaves it when no loop runs.


@pytest.fixture
def ignored() -> Iterator[Any]:
    """Set a handler for SIGUSR1, which is to be there at the end."""

    def handler(signum: int, frame: object) -> None:
        raise AssertionError

    before = signal.signal(signal.SIGUSR1, handler)
    yield handler
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("closed", [False, True], ids=["stopped", "closed"])
@pytest.mark.parametrize("uds", [False, True], ids=["TCP", "a Unix socket"])
@pytest.mark.parametrize("way", ["serving", "start"])
@pytest.mark.parametrize("http", PIPELINING)
def test_block_can_be_left_when_no_loop_runs(
    loop: asyncio.AbstractEventLoop,
    http: Any,
    way: str,
    uds: bool,
    closed: bool,
    ignored: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As the last step of qasync does: sockets, connections, the socket's file and the signal handlers are gone."""
    app = Simple()
    where = {"uds": tmp_path / "app.sock"} if uds else {}
    options: Any = {"http": http, "stop_on_signals": [signal.SIGUSR1], **where}
    block: Any = serving(app, **options) if way == "serving" else loop.run_until_complete(start(app, **options))
    server = loop.run_until_complete(block.__aenter__())
    address = server.sockets[0].getsockname()
    with ask(server, REQUEST % b"/hold") as client, ask(server, b"") as idle, ask(server, b"GET / HT") as partial:
        loop.run_until_complete(app.holding.wait())
        loop.run_until_complete(turns())
        waiting = ask(server, REQUEST % b"/")  # nobody has accepted this one
        if closed:
            loop.close()

        drive(block.__aexit__(None, None, None))

        for each in (client, idle, partial):
            assert each.recv(1000) == b""
        with waiting, pytest.raises(ConnectionResetError):
            waiting.recv(1000)
        with socket.socket(client.family) as late:
            assert late.connect_ex(address) != 0
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGUSR1) is ignored
    assert logged(caplog) == [LOGGED.replace("\\", "").format(server.url, LOST)]
    drive(block.__aexit__(None, None, None))

    if closed:
        assert repr(server) == f"<aioserve.Server {server.url} its loop was closed>"
        del block, server, app
        gc.collect()
    else:  # and if it runs again, the rest follows
        loop.run_until_complete(server.wait_closed())
        loop.run_until_complete(turns())
        assert app.events == ["GET /hold", "cancelled /hold", "shutdown", "lifespan over"]
    assert len(logged(caplog)) <= 2


@pytest.mark.parametrize("closed", [False, True], ids=["stopped", "closed"])
@pytest.mark.parametrize("inside_another", [False, True], ids=["", "inside another loop"])
def test_block_that_is_garbage_is_left_without_its_loop(
    loop: asyncio.AbstractEventLoop, closed: bool, inside_another: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """No `RuntimeError` is raised in a coroutine that is closed, wherever that happens."""

    async def main(servers: list[Server]) -> None:
        async with serving(Simple()) as server:
            servers.append(server)
            await asyncio.Event().wait()

    servers: list[Server] = []
    task = loop.create_task(main(servers))
    loop.run_until_complete(turns())
    coroutine: Any = task.get_coro()
    task._log_destroy_pending = False  # type: ignore[attr-defined]  # this one is the test's
    if closed:
        loop.close()

    async def close() -> None:
        coroutine.close()

    if inside_another:
        asyncio.run(close())
    else:
        coroutine.close()
    assert logged(caplog) == [LOGGED.replace("\\", "").format(servers[0].url, LOST)]
    with socket.socket() as client:
        assert client.connect_ex((servers[0].host, servers[0].port)) != 0
    if not closed:
        loop.run_until_complete(servers[0].wait_closed())


def test_server_of_a_loop_that_only_pauses_cannot_be_closed_in_another_loop(loop: asyncio.AbstractEventLoop) -> None:
    """As with two loops in pytest-asyncio: there, `aclose()` raises, and the server lives on."""
    server = loop.run_until_complete(start(Simple()))
    with pytest.raises(RuntimeError, match=r"call aclose\(\) in the event loop that the server runs in"):
        asyncio.run(server.aclose())
    assert server.is_serving()
    loop.run_until_complete(server.aclose())


@pytest.mark.parametrize("closed", [False, True], ids=["stopped", "closed"])
def test_connections_with_tls_end_when_no_loop_runs(
    loop: asyncio.AbstractEventLoop, closed: bool, tls: tuple[dict[str, Any], ssl.SSLContext]
) -> None:
    """Also one in its handshake; but where the loop is closed, that is asyncio's."""

    def ask_for_ever(port: int) -> None:
        with context.wrap_socket(
            socket.create_connection(("127.0.0.1", port), 10), server_hostname="127.0.0.1"
        ) as sock:
            sock.sendall(REQUEST % b"/hold")
            with contextlib.suppress(OSError):
                while sock.recv(1000):
                    pass

    options, context = tls
    app = Simple()
    block = serving(app, **options)
    server = loop.run_until_complete(block.__aenter__())
    thread = threading.Thread(target=ask_for_ever, args=(server.port,))
    thread.start()
    loop.run_until_complete(app.holding.wait())
    if closed:
        loop.close()
        drive(block.__aexit__(None, None, None))
        thread.join()
        return
    with ask(server, b"") as client:
        loop.run_until_complete(turns())
        drive(block.__aexit__(None, None, None))
        thread.join()
        loop.run_until_complete(server.wait_closed())
        assert client.recv(1000) == b""


def test_swappable_is_silent_when_its_loop_is_closed(
    loop: asyncio.AbstractEventLoop, caplog: pytest.LogCaptureFixture
) -> None:
    """Under another server, which runs its lifespan in a task of its own."""
    scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}
    messages: list[dict[str, Any]] = [{"type": "lifespan.startup"}]

    async def receive() -> dict[str, Any]:
        if not messages:
            await asyncio.Event().wait()
        return messages.pop()

    async def send(message: dict[str, Any]) -> None:
        sent.append(message["type"])

    sent: list[str] = []
    task = loop.create_task(Swappable(Simple())(scope, receive, send))
    task._log_destroy_pending = False  # type: ignore[attr-defined]  # this one is the other server's
    loop.run_until_complete(turns())
    assert sent == ["lifespan.startup.complete"]
    loop.close()
    del task
    gc.collect()  # and pytest fails the test for an exception that nobody can catch
    assert logged(caplog) == []


@linux_only
@pytest.mark.parametrize("closed", [False, True], ids=["stopped", "closed"])
def test_child_process_is_stopped_when_no_loop_runs(
    loop: asyncio.AbstractEventLoop, closed: bool, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """It stops as always, and the end of the block waits for it."""
    block = serving_process(TALKING)
    server: ServerProcess = loop.run_until_complete(block.__aenter__())
    if closed:
        loop.close()
        assert repr(server) == f"<aioserve.ServerProcess {server.pid} {server.url} its loop was closed>"

    drive(block.__aexit__(None, None, None))

    assert server.returncode == 0
    assert repr(server) == f"<aioserve.ServerProcess {server.pid} {server.url} closed>"
    assert capfd.readouterr().out.splitlines() == [f"starting {server.pid}", "lifespan over"]
    ended = f"process {server.pid} was told to stop, and has ended"
    assert logged(caplog) == [LOGGED.replace("\\", "").format(server.url, ended)]


@linux_only
@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")  # of subprocess, and true
def test_child_process_that_is_garbage_leaves_no_descriptor(
    loop: asyncio.AbstractEventLoop, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nobody leaves its block, and its loop is closed; its lifeline ends with it, so that it stops."""
    before = set(os.listdir("/dev/fd"))
    block = serving_process(TALKING)
    server: ServerProcess = loop.run_until_complete(block.__aenter__())
    pid, url = server.pid, server.url
    loop.close()
    del block, server
    gc.collect()
    assert set(os.listdir("/dev/fd")) <= before
    assert os.waitpid(pid, 0)[1] == 0
    assert capfd.readouterr().out.splitlines() == [f"starting {pid}", "lifespan over"]
    (line,) = logged(caplog)
    assert line.startswith(f"{url}: its event loop was closed before the server: process {pid} is told to stop")


FORKING = """
import asyncio, os, sys
from aioserve import serving
from tests.conftest import LOOPS
from tests.helpers.apps import App
from tests.helpers.clients import connect
from tests.helpers.turns import turns

app = App()
block = serving(app)
runner = asyncio.Runner(**LOOPS[sys.argv[1]])
server = runner.run(block.__aenter__())

async def ask():
    global connection, stack
    stack = connect(server)
    connection = await stack.__aenter__()
    connection.ask("/hold")
    await app.holding.wait()

async def answer():
    app.release.set()
    print((await connection.answer())[-5:].decode())
    await stack.__aexit__(None, None, None)
    await block.__aexit__(None, None, None)

runner.run(ask())
if not (pid := os.fork()):
    try:
        block.__aexit__(None, None, None).send(None)
    except StopIteration:
        os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
runner.run(answer())
runner.close()
"""


@pytest.mark.parametrize("loop_name", ["asyncio", "uvloop"])
def test_fork_that_leaves_a_block_closes_nothing_of_its_parent(loop_name: str) -> None:
    """The connections of the two are the same."""
    with Program("-c", FORKING, loop_name) as program:
        code, err = program.end()
    assert (code, program.said, err) == (0, ["7", "hello"], "")
