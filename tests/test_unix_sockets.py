"""
A Unix socket at a path: it is never more open than was asked, takes nobody's place, and is gone at the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
import uvicorn
import websockets

from aioserve import Server, ServerCrashedError, StartupError, _acceptor, _unix, serving, start
from tests.apps import App, Receive, Scope, Send
from tests.conftest import WARNINGS_ARE_ERRORS
from tests.doors import DOORS, Door
from tests.privileges import unprivileged
from tests.turns import after, turns

REQUEST = b"GET / HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n"


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "app.sock")


async def answers(path: str) -> bool:
    async with httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=path)) as client:
        return (await client.get("http://test")).text == "hello"


def make_stale(path: str) -> None:
    """Leave a socket behind, as a program does that is killed."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)


def identity(path: str) -> tuple[int, int]:
    found = os.lstat(path)
    return found.st_dev, found.st_ino


# What it is like.


async def test_it_answers_at_its_path(path: str) -> None:
    """The URL has the path in the place of the host; there is no port."""
    scopes: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scopes.append(scope)
        await App()(scope, receive, send)

    async with serving(app, uds=path, lifespan="off") as server:
        assert server.url == f"http+unix://{path.replace('/', '%2F')}"
        assert (server.host, server.port) == (None, None)
        assert await answers(path)
    assert scopes[0]["server"] in ((path, None), None)  # an older uvicorn does not say
    assert not os.path.lexists(path)


async def test_a_path_can_be_a_path_object(tmp_path: Path) -> None:
    """As everywhere."""
    async with serving(App(), uds=tmp_path / "app.sock"):
        assert await answers(str(tmp_path / "app.sock"))


async def test_a_relative_path_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the program goes elsewhere."""
    monkeypatch.chdir(tmp_path)
    async with serving(App(), uds="app.sock") as server:
        monkeypatch.chdir("/")
        assert server.url == f"http+unix://{str(tmp_path / 'app.sock').replace('/', '%2F')}"
        assert await answers(str(tmp_path / "app.sock"))
    assert not list(tmp_path.iterdir())


async def test_a_websocket_works_over_it(path: str) -> None:
    """As does the rest of uvicorn."""
    async with serving(App(), uds=path) as server, websockets.unix_connect(path, "ws://test/") as websocket:
        await websocket.send("hello")
        assert await websocket.recv() == "hello"
        server.close()
        with pytest.raises(websockets.ConnectionClosed) as closed:
            await websocket.recv()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1012


async def test_tls_works_over_it(path: str, tls: Any) -> None:
    """Odd, but possible."""
    options, context = tls
    async with serving(App(), uds=path, **options) as server:
        assert server.url.startswith("https+unix://%2F")
        transport = httpx.AsyncHTTPTransport(uds=path, verify=context)
        async with httpx.AsyncClient(transport=transport) as client:
            assert (await client.get("https://127.0.0.1")).text == "hello"


async def test_a_config_keeps_its_word(path: str) -> None:
    """Only the mode is ours to know: uvicorn's would let everybody in."""
    async with serving(uvicorn.Config(App(), uds=path, log_config=None)):
        assert stat.S_IMODE(os.lstat(path).st_mode) == 0o600
        assert await answers(path)
    async with serving(uvicorn.Config(App(), uds=path, log_config=None), uds_mode=0o660):
        assert stat.S_IMODE(os.lstat(path).st_mode) == 0o660


async def test_what_waits_in_the_queue_is_answered(path: str) -> None:
    """Nobody can come any more, but who had come gets his answer."""
    async with serving(App(), uds=path) as server, contextlib.AsyncExitStack() as stack:
        clients = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(100)]
        for client in clients:
            client.connect(path)
            client.sendall(REQUEST)
        await server.aclose()
        for client in clients:
            client.settimeout(10)
            assert client.recv(1000).startswith(b"HTTP/1.1 200")


async def test_a_full_queue_is_answered_to_the_last(path: str) -> None:
    """Linux takes one more into it than was asked for."""
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


# What stands at its path.


def alive(path: str, stack: contextlib.ExitStack) -> None:
    sock = stack.enter_context(socket.socket(socket.AF_UNIX))
    sock.bind(path)
    sock.listen()


def alive_and_full(path: str, stack: contextlib.ExitStack) -> None:
    """No connection more goes into its queue."""
    sock = stack.enter_context(socket.socket(socket.AF_UNIX))
    sock.bind(path)
    sock.listen(0)
    stack.enter_context(socket.socket(socket.AF_UNIX)).connect(path)


def of_datagrams(path: str, stack: contextlib.ExitStack) -> None:
    stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)).bind(path)


def link_to(target: Callable[[str, contextlib.ExitStack], None] | None) -> Any:
    def make(path: str, stack: contextlib.ExitStack) -> None:
        os.symlink(f"{path}.target", path)
        if target is not None:
            target(f"{path}.target", stack)

    return make


def regular_file(path: str, stack: contextlib.ExitStack) -> None:
    Path(path).write_text("precious")


def stale(path: str, stack: contextlib.ExitStack) -> None:
    make_stale(path)


IN_THE_WAY = {
    "a live server": (alive, "another server is listening there"),
    "a live server with a full queue": (alive_and_full, "another server is listening there"),
    "a socket for datagrams": (of_datagrams, "another server is listening there"),
    "a regular file": (regular_file, "no socket, and is left alone"),
    "a directory": (lambda path, stack: os.mkdir(path), "no socket, and is left alone"),
    "a pipe": (lambda path, stack: os.mkfifo(path), "no socket, and is left alone"),
    "a link to nothing": (link_to(None), "no socket, and is left alone"),
    "a link to a file": (link_to(regular_file), "no socket, and is left alone"),
    "a link to a stale socket": (link_to(stale), "no socket, and is left alone"),
    "a link to a live server": (link_to(alive), "no socket, and is left alone"),
}


@pytest.mark.parametrize(("make", "text"), IN_THE_WAY.values(), ids=IN_THE_WAY)
async def test_what_is_in_the_way_stays_as_it_is(make: Any, text: str, tmp_path: Path, path: str) -> None:
    """The app is not started."""
    app = App()
    with contextlib.ExitStack() as stack:
        make(path, stack)
        before = {name: identity(str(tmp_path / name)) for name in os.listdir(tmp_path)}
        with pytest.raises(OSError, match=f"cannot listen on {path}: .*{text}") as raised:
            await start(app, uds=path)
        assert raised.value.errno == errno.EADDRINUSE
        assert {name: identity(str(tmp_path / name)) for name in os.listdir(tmp_path)} == before
    assert app.events == []


async def test_a_live_server_of_ours_is_left_alone(path: str) -> None:
    """It goes on answering, and takes the file with it in its own time."""
    async with serving(App(), uds=path):
        with pytest.raises(OSError, match="another server is listening there"):
            await start(App(), uds=path)
        assert await answers(path)
    assert not os.path.lexists(path)


async def test_a_stale_socket_is_replaced(path: str, tmp_path: Path) -> None:
    """There is nothing left of it."""
    make_stale(path)
    async with serving(App(), uds=path):
        assert os.listdir(tmp_path) == ["app.sock"]
        assert await answers(path)
    assert os.listdir(tmp_path) == []


async def test_a_path_that_is_too_long_is_told(tmp_path: Path) -> None:
    """Which nothing in the kernel's answer would."""
    with pytest.raises(OSError, match=r"cannot listen on .*: AF_UNIX path too long"):
        await start(App(), uds=tmp_path / ("x" * 108))
    assert os.listdir(tmp_path) == []


async def test_a_directory_that_is_not_there_is_told(tmp_path: Path) -> None:
    """With the error's own class."""
    with pytest.raises(FileNotFoundError, match=r"cannot listen on .*/none/app.sock: No such file"):
        await start(App(), uds=tmp_path / "none" / "app.sock")


STARTER = """
import asyncio, os, socket, sys
from aioserve import serving
from tests.apps import App, Receive, Scope, Send

async def is_ours(server, path):
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(b"GET / HTTP/1.1\\r\\nhost: test\\r\\nconnection: close\\r\\n\\r\\n")
    answer = await reader.read()
    writer.close()
    return answer.endswith(b"hello") and server.stats.served == 1

async def churn(path, rounds):
    served = amiss = 0
    for _ in range(rounds):
        try:
            async with serving(App(), uds=path) as server:
                served += 1
                amiss += not await is_ours(server, path)
        except OSError as exc:
            amiss += "another server" not in str(exc)
    print(served, "of", rounds, "and none amiss" if not amiss else f"and {amiss} amiss", sep=" ", flush=True)

async def main():
    path, rounds = sys.argv[1], int(sys.argv[2])
    print("ready", flush=True)
    sys.stdin.readline()
    if rounds:
        await churn(path, rounds)
        return
    try:
        async with serving(App(), uds=path):
            print("serving", flush=True)
            await asyncio.to_thread(sys.stdin.readline)
    except OSError as exc:
        print(exc, flush=True)

asyncio.run(main())
"""


def starters(path: str, count: int, rounds: int = 0) -> contextlib.AbstractContextManager[list[subprocess.Popen[str]]]:
    @contextlib.contextmanager
    def run() -> Iterator[list[subprocess.Popen[str]]]:
        command = [sys.executable, *WARNINGS_ARE_ERRORS, "-c", STARTER, path, str(rounds)]
        with contextlib.ExitStack() as stack:
            programs = [
                stack.enter_context(
                    subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # noqa: S603
                )
                for _ in range(count)
            ]
            assert [said(program) for program in programs] == ["ready"] * count
            yield programs
            for program in programs:
                program.communicate("\n")
            assert [program.returncode for program in programs] == [0] * count

    return run()


def said(program: subprocess.Popen[str]) -> str:
    assert program.stdout is not None
    return program.stdout.readline().strip()


def tell(program: subprocess.Popen[str]) -> None:
    assert program.stdin is not None
    program.stdin.write("\n")
    program.stdin.flush()


def test_of_many_that_start_at_once_on_a_stale_socket_one_serves(path: str, tmp_path: Path) -> None:
    """And the others are told so; whoever is first."""
    make_stale(path)
    with starters(path, 8) as programs:
        for program in programs:
            tell(program)
        words = [said(program) for program in programs]
        assert words.count("serving") == 1, words
        assert all(word == "serving" or "another server" in word for word in words), words
        assert asyncio.run(answers(path))
    assert os.listdir(tmp_path) == []


def test_what_is_left_by_a_kill_is_replaced_by_the_next(path: str) -> None:
    """Nobody has to clean up by hand."""
    with starters(path, 1) as (program,):
        tell(program)
        assert said(program) == "serving"
        program.send_signal(signal.SIGKILL)
        program.wait()
        assert os.path.lexists(path)
        asyncio.run(serve_once(path))
        program.returncode = 0
    assert not os.path.lexists(path)


async def serve_once(path: str) -> None:
    async with serving(App(), uds=path):
        assert await answers(path)


@pytest.mark.parametrize("listens", [True, False])
async def test_what_has_come_while_it_was_looked_at_stays(
    listens: bool, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The socket of a server that is none of ours, and so knows nothing of the lock."""
    make_stale(path)
    is_alive = _unix._is_alive
    with contextlib.ExitStack() as stack:
        others: list[tuple[int, int]] = []

        def too_early(at: str) -> bool:
            found = is_alive(at)
            os.unlink(path)
            if listens:
                alive(path, stack)
            else:
                make_stale(path)
                os.utime(path, (0, 0))
            others.append(identity(path))
            return found

        monkeypatch.setattr(_unix, "_is_alive", too_early)
        with pytest.raises(OSError, match="another server was quicker to take its place"):
            await start(App(), uds=path)
        assert [identity(path)] == others


def test_many_that_start_and_stop_never_take_each_others_place(path: str) -> None:
    """Each that serves is the one that answers at the path; the others are told so."""
    with starters(path, 4, rounds=100) as programs:
        for program in programs:
            tell(program)
        words = [said(program) for program in programs]
    assert all(word.endswith(" of 100 and none amiss") for word in words), words
    assert any(not word.startswith("0 ") for word in words)


async def test_whoever_takes_a_place_waits_for_whoever_does(path: str, tmp_path: Path) -> None:
    """The lock is on the directory."""
    directory = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(directory, fcntl.LOCK_EX)
    starting = asyncio.create_task(start(App(), uds=path))
    await turns(10)
    assert not starting.done()
    assert not os.path.lexists(path)
    os.close(directory)
    async with await starting:
        assert await answers(path)


async def test_a_lock_that_is_never_free_is_told(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody holds it for reasons of his own."""
    monkeypatch.setattr(_unix, "_LOCKED_AT_MOST", 0.01)
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        with pytest.raises(OSError, match=f"cannot listen on {path}: another program holds a lock on its directory"):
            await start(App(), uds=path)
    finally:
        os.close(directory)


async def test_where_there_are_no_locks_it_does_without(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on some file systems."""

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    await serve_once(path)


async def test_a_directory_that_we_may_only_write_in_will_do() -> None:
    """It cannot be locked then."""
    if os.geteuid() != 0:
        pytest.skip("only root can be somebody else for a moment")
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o733)  # noqa: S103
        with unprivileged():
            await serve_once(f"{directory}/app.sock")
        assert os.listdir(directory) == []


@pytest.mark.parametrize("name", ["with a space", "100%?#", "caf\xe9", "\udcff"])
async def test_a_name_can_be_any(name: str, tmp_path: Path) -> None:
    """In the URL all of it is percent-encoded, byte by byte; also what is no UTF-8."""
    path = str(tmp_path / name)
    async with serving(App(), uds=path) as server:
        assert urllib.parse.unquote_to_bytes(server.url.removeprefix("http+unix://")) == os.fsencode(path)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
    assert os.listdir(tmp_path) == []


async def test_behind_a_link_the_parent_is_the_targets(tmp_path: Path) -> None:
    """So a path is taken as the kernel takes it."""
    (tmp_path / "real" / "below").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real" / "below")
    path = str(tmp_path / "link" / ".." / "app.sock")
    async with serving(App(), uds=path) as server:
        assert server.url.endswith("link%2F..%2Fapp.sock")
        assert await answers(str(tmp_path / "real" / "app.sock"))
    assert os.listdir(tmp_path / "real") == ["below"]


async def test_a_short_name_in_a_long_path_can_be_stale() -> None:
    """Nothing longer is needed on the way."""
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        directory = Path(short) / ("d" * (104 - len(short)))
        directory.mkdir()
        path = str(directory / "s")
        assert len(path) == 107
        make_stale(path)
        await serve_once(path)
        assert os.listdir(directory) == []


async def test_a_fork_leaves_the_file_to_its_parent(path: str) -> None:
    """It has a copy of everything, but nothing of it is its own."""
    server = await start(App(), uds=path)
    (listener,) = server._engine.listeners
    child = os.fork()
    if child == 0:
        listener.withdraw()
        os._exit(0)
    os.waitpid(child, 0)  # noqa: ASYNC222 (it ends at once)
    assert await answers(path)
    await server.aclose()
    assert not os.path.lexists(path)


async def test_one_that_vanishes_while_it_is_looked_at_is_not_in_the_way(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another starter has removed it."""
    make_stale(path)
    is_alive = _unix._is_alive

    def vanish(at: str) -> bool:
        os.unlink(path)
        return is_alive(at)

    monkeypatch.setattr(_unix, "_is_alive", vanish)
    async with serving(App(), uds=path):
        assert await answers(path)


async def test_a_place_that_is_taken_before_anybody_could_come_is_given_up(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between bind() and listen() a socket looks stale; who was thrown out then notices."""

    def replaced(sock: Any, backlog: int) -> None:
        os.unlink(path)
        make_stale(path)
        os.utime(path, (0, 0))

    monkeypatch.setattr(socket.socket, "listen", replaced, raising=False)
    with pytest.raises(OSError, match="something else has just taken its place"):
        await start(App(), uds=path)
    assert os.listdir(tmp_path) == ["app.sock"]


# Who may connect.


@pytest.fixture(params=[0, 0o022, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.usefixtures("umask")
@pytest.mark.parametrize("mode", [None, 0o600, 0o660, 0o666, 0o622, 0], ids=str)
async def test_it_is_as_open_as_asked_and_never_more(
    mode: int | None, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the umask is; from the moment that it is there, and to the bit when one can connect."""
    seen: list[tuple[str, int]] = []

    def watch(name: str) -> None:
        method = getattr(socket.socket, name)

        def watched(sock: socket.socket, *args: Any) -> Any:
            result = method(sock, *args)
            seen.append((name, stat.S_IMODE(os.lstat(path).st_mode)))
            return result

        monkeypatch.setattr(socket.socket, name, watched, raising=False)

    watch("bind")
    watch("listen")
    options: dict[str, Any] = {} if mode is None else {"uds_mode": mode}
    server = await start(App(), uds=path, **options)
    monkeypatch.undo()
    await server.aclose()

    asked = 0o600 if mode is None else mode
    (_, when_bound), (_, when_open) = seen
    assert when_bound & ~asked == 0
    assert when_open == asked


async def test_by_default_others_cannot_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unlike on a loopback port."""
    if os.geteuid() != 0:
        pytest.skip("only root can be somebody else for a moment")
    with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX) as other:
        os.chmod(directory, 0o755)  # noqa: S103
        path = f"{directory}/app.sock"
        async with serving(App(), uds=path):
            with unprivileged(), pytest.raises(PermissionError):
                other.connect(path)
        async with serving(App(), uds=path, uds_mode=0o666):
            with unprivileged():
                other.connect(path)


async def test_who_cannot_tell_whether_it_is_alive_leaves_it_alone() -> None:
    """The socket of somebody else, which we may not connect to."""
    if os.geteuid() != 0:
        pytest.skip("only root can be somebody else for a moment")
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o777)  # noqa: S103
        path = f"{directory}/app.sock"
        make_stale(path)
        os.chmod(path, 0o600)
        with unprivileged(), pytest.raises(PermissionError, match=f"cannot listen on {path}: Permission denied"):
            await start(App(), uds=path)
        assert os.listdir(directory) == ["app.sock"]


@pytest.mark.parametrize("moment", ["bind", "chmod"])
async def test_a_link_that_is_put_in_its_place_is_not_followed(
    moment: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its target keeps its mode, and the link is not ours to remove."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    victim.chmod(0o600)

    def replace() -> None:
        os.unlink(path)
        os.symlink(victim, path)

    bind, chmod = socket.socket.bind, os.chmod

    def replaced_after_bind(sock: socket.socket, address: Any) -> None:
        bind(sock, address)
        replace()

    def replaced_before_chmod(*args: Any, **kwargs: Any) -> None:
        replace()
        chmod(*args, **kwargs)

    if moment == "bind":
        monkeypatch.setattr(socket.socket, "bind", replaced_after_bind, raising=False)
    else:
        monkeypatch.setattr(os, "chmod", replaced_before_chmod)
    with pytest.raises(OSError, match=f"cannot listen on {path}: "):
        await start(App(), uds=path, uds_mode=0o666)
    monkeypatch.undo()
    assert stat.S_IMODE(victim.stat().st_mode) == 0o600
    assert os.path.islink(path)


# How it goes.


async def returns(server: Server, app: App) -> None:
    pass


async def raises(server: Server, app: App) -> None:
    raise ZeroDivisionError


async def is_cancelled(server: Server, app: App) -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await asyncio.sleep(0)


async def crashes(server: Server, app: App) -> None:
    app.crash.set()
    await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("body", "outcome"),
    [
        (returns, None),
        (raises, ZeroDivisionError),
        (is_cancelled, asyncio.CancelledError),
        (crashes, ServerCrashedError),
    ],
)
async def test_the_file_is_gone_however_the_block_ends(body: Any, outcome: Any, path: str, tmp_path: Path) -> None:
    """And the path is free at once."""
    app = App()

    async def use() -> None:
        async with serving(app, uds=path) as server:
            assert os.path.lexists(path)
            await body(server, app)

    task = asyncio.create_task(use())
    await asyncio.wait({task})
    with pytest.raises(outcome) if outcome else contextlib.nullcontext():
        task.result()
    assert os.listdir(tmp_path) == []
    await serve_once(path)


@pytest.mark.usefixtures("short_grace")
@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
@pytest.mark.parametrize("app", [lambda: App("raises"), lambda: App("fails"), lambda: "tests.broken_module:app"])
async def test_the_file_is_gone_when_the_start_fails(
    app: Callable[[], Any], door: Door, tmp_path: Path, path: str
) -> None:
    """By every door."""

    async def body(server: Server) -> None:
        raise AssertionError

    with pytest.raises(StartupError):
        await door(app(), body, uds=path)
    assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures("short_grace")
async def test_the_file_is_gone_when_the_start_is_cancelled(path: str, tmp_path: Path) -> None:
    """It is there from the beginning of the start on."""
    task = asyncio.create_task(start(App("hangs"), uds=path))
    await turns(10)
    assert os.path.lexists(path)
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()
    assert os.listdir(tmp_path) == []


async def test_the_file_is_gone_at_whatever_moment_the_start_is_cancelled(path: str, tmp_path: Path) -> None:
    """In every turn of the loop until it has started."""

    class SlowApp(App):
        async def lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
            await turns(5)
            await super().lifespan(scope, receive, send)

    for turn in range(100):
        task = asyncio.create_task(start(SlowApp(), uds=path))
        after(turn, task.cancel)
        await asyncio.wait({task})
        if not task.cancelled():
            break
        assert os.listdir(tmp_path) == []
    assert turn > 5
    await task.result().aclose()
    assert os.listdir(tmp_path) == []


async def test_the_file_is_gone_when_nobody_can_listen(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last thing that can go wrong after it was made."""

    def refuse(sock: Any, backlog: int) -> None:
        raise OSError(errno.ENOBUFS, "No buffer space available")

    monkeypatch.setattr(socket.socket, "listen", refuse, raising=False)
    with pytest.raises(OSError, match=f"cannot listen on {path}: No buffer space available"):
        await start(App(), uds=path)
    assert os.listdir(tmp_path) == []


async def test_nobody_can_come_after_the_last_look_at_the_queue(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the file goes first."""
    looks: list[bool] = []
    is_readable = _acceptor._is_readable

    def watched(sock: socket.socket) -> bool:
        looks.append(os.path.lexists(path))
        return is_readable(sock)

    monkeypatch.setattr(_acceptor, "_is_readable", watched)
    async with serving(App(), uds=path):
        assert await answers(path)
    assert looks == [False]


async def test_a_socket_that_has_come_in_its_place_stays(path: str) -> None:
    """It is somebody else's."""
    with contextlib.ExitStack() as stack:
        async with serving(App(), uds=path):
            os.unlink(path)
            alive(path, stack)
            other = identity(path)
        assert identity(path) == other
        os.unlink(path)


async def test_a_file_that_somebody_has_removed_is_no_mistake(path: str) -> None:
    """There is less to do."""
    async with serving(App(), uds=path):
        os.unlink(path)


async def test_a_file_that_cannot_be_removed_is_told(path: str, caplog: pytest.LogCaptureFixture) -> None:
    """The server ends all the same."""
    async with serving(App(), uds=path):
        with pytest.MonkeyPatch.context() as patch:

            def refuse(at: str) -> None:
                raise PermissionError(1, "Not permitted")

            patch.setattr(os, "unlink", refuse)
            server = await start(App(), uds=f"{path}2")
            await server.aclose()
    assert f"cannot remove the socket {path}2: Not permitted" in caplog.text
    os.unlink(f"{path}2")


async def test_the_next_server_takes_the_path_while_the_last_requests_are_answered(path: str) -> None:
    """What the old one has left of it is not the new one's."""
    app = App()
    old = await start(app, uds=path, shutdown_timeout=None)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        client.sendall(REQUEST.replace(b"/", b"/hold", 1))
        await app.holding.wait()
        old.close()
        while old.is_serving():
            await asyncio.sleep(0)
        async with serving(App(), uds=path):
            assert await answers(path)
            app.release.set()
            await old.wait_closed()
            assert client.recv(1000).startswith(b"HTTP/1.1 200")
            assert await answers(path)


async def test_during_the_drain_it_is_there(path: str) -> None:
    """As on an address."""
    server = await start(App(), uds=path, drain_delay=60)
    server.close()
    with anyio.fail_after(10):
        assert await answers(path)
    server.close(timeout=0)
    await server.wait_closed()
    assert not os.path.lexists(path)
