"""
The file of a Unix socket is removed when the server stops, and no file of another is.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from aioserve import Server, ServerCrashedError, StartupError, serving, serving_process, start
from aioserve._net import acceptor as _acceptor
from aioserve._net import unix
from tests.helpers import not_portable
from tests.helpers.apps import App, Receive, Scope, Send
from tests.helpers.processes import linux_only
from tests.helpers.turns import after, turns
from tests.helpers.unix import REQUEST, alive, answers, connect, identity, make_stale, serve_once
from tests.helpers.ways import WAYS, Way

pytestmark = not_portable.unix_sockets


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
async def test_forked_process_does_not_remove_the_unix_socket(path: str) -> None:
    """It has a copy of everything, but the file is its parent's."""
    server = await start(App(), uds=path)
    (listener,) = server._engine.listeners
    child = os.fork()
    if child == 0:
        listener.remove_file()
        os._exit(0)
    os.waitpid(child, 0)  # noqa: ASYNC222 (it ends at once)
    assert await answers(path)
    await server.aclose()
    assert not os.path.lexists(path)


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
async def test_unix_socket_is_removed_however_the_block_ends(
    body: Any, outcome: Any, path: str, tmp_path: Path
) -> None:
    """And the path can be used again at once."""
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
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(
    "app", [lambda: App("raises"), lambda: App("fails"), lambda: "tests.helpers.broken_module:app"]
)
async def test_unix_socket_is_removed_when_the_start_fails(
    app: Callable[[], Any], way: Way, tmp_path: Path, path: str
) -> None:
    """By each way to start."""

    async def body(server: Server) -> None:
        raise AssertionError

    with pytest.raises(StartupError):
        await way(app(), body, uds=path)
    assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures("short_grace")
async def test_unix_socket_is_removed_when_the_start_is_cancelled(path: str, tmp_path: Path) -> None:
    """The file appears only when the app has started."""
    task = asyncio.create_task(start(App("hangs"), uds=path))
    await turns(10)
    assert not os.path.lexists(path)
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()
    assert os.listdir(tmp_path) == []


async def test_unix_socket_is_removed_at_every_turn_of_a_cancelled_start(path: str, tmp_path: Path) -> None:
    """In every turn of the loop until the server has started."""

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


@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize("step", ["mkdir", "open", "bind", "chmod", "listen", "link", "rename"])
async def test_nothing_is_left_in_the_directory_when_a_start_fails(
    step: str, stale: bool, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At whatever step it fails; a stale socket stays. (A failed link is tried as a rename.)"""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if stale:
        make_stale(path)
    before = {name: identity(str(tmp_path / name)) for name in os.listdir(tmp_path)}
    server = await start(App(), uds=f"{path}2")  # which imports what is imported only when it is needed
    await server.aclose()
    steps = ["link", "rename"] if step in ("link", "rename") else [step]
    with monkeypatch.context() as patch:
        for each in steps:
            patch.setattr(socket.socket if each in ("bind", "listen") else os, each, refuse, raising=False)
        with pytest.raises(OSError, match=f"cannot listen on {path}: No space left on device"):
            await start(App(), uds=path, uds_mode=0o666)
    assert {name: identity(str(tmp_path / name)) for name in os.listdir(tmp_path)} == before


async def test_touch_does_not_leave_the_unix_socket_behind(path: str, tmp_path: Path) -> None:
    """It changes only the times of the file."""
    async with serving(App(), uds=path):
        os.utime(path, (0, 0))
        assert await answers(path)
    assert os.listdir(tmp_path) == []


async def test_inode_of_the_unix_socket_is_not_used_again_while_it_listens(path: str, tmp_path: Path) -> None:
    """So the file of another server is never taken for ours, although it may be as old."""
    async with serving(App(), uds=path):
        inode = os.lstat(path).st_ino
        os.unlink(path)
        for _ in range(100):
            make_stale(path)
            assert os.lstat(path).st_ino != inode
            os.unlink(path)
        make_stale(path)
    assert os.listdir(tmp_path) == ["app.sock"]


@linux_only
async def test_touched_unix_socket_of_a_killed_child_is_removed(path: str, tmp_path: Path) -> None:
    """By its parent."""
    with pytest.raises(ServerCrashedError, match="killed by SIGKILL"):
        async with serving_process("tests.helpers.children:talking", uds=path) as server:
            os.utime(path, (0, 0))
            os.kill(server.pid, signal.SIGKILL)
            await asyncio.Event().wait()
    assert os.listdir(tmp_path) == []


async def test_parent_of_a_dead_child_leaves_another_servers_socket_alone(path: str, tmp_path: Path) -> None:
    """The child's inode may have been used again for it."""
    with contextlib.ExitStack() as stack:
        alive(path, stack)
        unix.SocketFile.at(path).remove_stale()
        connect(path).close()
    assert os.listdir(tmp_path) == ["app.sock"]
    unix.SocketFile.at(path).remove_stale()
    assert os.listdir(tmp_path) == []


async def test_unix_socket_is_removed_before_the_last_look_at_its_queue(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So no client can connect after it."""
    looks: list[bool] = []
    is_readable = _acceptor._is_readable

    def watched(sock: socket.socket) -> bool:
        looks.append(os.path.lexists(path))
        return is_readable(sock)

    monkeypatch.setattr(_acceptor, "_is_readable", watched)
    async with serving(App(), uds=path):
        assert await answers(path)
    assert looks == [False]


async def test_socket_that_has_replaced_the_unix_socket_is_left_alone(path: str) -> None:
    """It belongs to another program."""
    with contextlib.ExitStack() as stack:
        async with serving(App(), uds=path):
            os.unlink(path)
            alive(path, stack)
            other = identity(path)
        assert identity(path) == other
        os.unlink(path)


async def test_unix_socket_that_another_program_has_removed_is_no_error(path: str) -> None:
    """There is nothing left to remove."""
    async with serving(App(), uds=path):
        os.unlink(path)


async def test_unix_socket_that_cannot_be_removed_is_logged(path: str, caplog: pytest.LogCaptureFixture) -> None:
    """The server still closes."""
    async with serving(App(), uds=path):
        with pytest.MonkeyPatch.context() as patch:

            def refuse(at: str, **where: int) -> None:
                if where:
                    unlink(at, **where)
                else:
                    raise PermissionError(1, "Not permitted")

            unlink = os.unlink
            patch.setattr(os, "unlink", refuse)
            server = await start(App(), uds=f"{path}2")
            await server.aclose()
    assert f"cannot remove the socket {path}2: Not permitted" in caplog.text
    os.unlink(f"{path}2")


async def test_next_server_can_use_the_unix_path_while_the_old_one_finishes(path: str) -> None:
    """The old one does not remove the new one's file."""
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


async def test_unix_socket_answers_during_the_drain(path: str) -> None:
    """As an address does."""
    server = await start(App(), uds=path, drain_delay=60)
    server.close()
    with anyio.fail_after(10):
        assert await answers(path)
    server.close(timeout=0)
    await server.wait_closed()
    assert not os.path.lexists(path)
