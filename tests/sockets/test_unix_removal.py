"""
The file of a Unix socket is removed when the server stops, and no file of another is.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from aioserve import Server, ServerCrashedError, StartupError, serving, start
from aioserve._net import acceptor as _acceptor
from tests.helpers.apps import App, Receive, Scope, Send
from tests.helpers.turns import after, turns
from tests.helpers.unix import REQUEST, alive, answers, identity, serve_once
from tests.helpers.ways import WAYS, Way


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


async def test_unix_socket_is_removed_when_listen_fails(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This is the last step that can fail after the file was made."""

    def refuse(sock: Any, backlog: int) -> None:
        raise OSError(errno.ENOBUFS, "No buffer space available")

    monkeypatch.setattr(socket.socket, "listen", refuse, raising=False)
    with pytest.raises(OSError, match=f"cannot listen on {path}: No buffer space available"):
        await start(App(), uds=path)
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

            def refuse(at: str) -> None:
                raise PermissionError(1, "Not permitted")

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
