"""
A Unix socket whose path is taken: a stale socket is replaced, and everything else is left alone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aioserve import serving, start
from tests.helpers import not_portable
from tests.helpers.apps import App
from tests.helpers.privileges import unprivileged
from tests.helpers.unix import alive, answers, identity, make_stale, serve_once

pytestmark = not_portable.unix_sockets


def alive_and_full(path: str, stack: contextlib.ExitStack) -> None:
    """Make a live socket whose queue is full."""
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
    "a regular file": (regular_file, "not a socket; it was left unchanged"),
    "a directory": (lambda path, stack: os.mkdir(path), "not a socket; it was left unchanged"),
    "a pipe": (lambda path, stack: os.mkfifo(path), "not a socket; it was left unchanged"),
    "a link to nothing": (link_to(None), "a link; it was left unchanged"),
    "a link to a file": (link_to(regular_file), "a link; it was left unchanged"),
    "a link to a stale socket": (link_to(stale), "a link; it was left unchanged"),
    "a link to a live server": (link_to(alive), "a link; it was left unchanged"),
}


@pytest.mark.parametrize(("make", "text"), IN_THE_WAY.values(), ids=IN_THE_WAY)
async def test_file_at_the_path_that_is_no_stale_socket_is_left_alone(
    make: Any, text: str, tmp_path: Path, path: str
) -> None:
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


async def test_running_server_at_the_path_is_left_alone(path: str) -> None:
    """It still answers, and removes its file when it stops."""
    async with serving(App(), uds=path):
        with pytest.raises(OSError, match="another server is listening there"):
            await start(App(), uds=path)
        assert await answers(path)
    assert not os.path.lexists(path)


async def test_stale_socket_is_replaced(path: str, tmp_path: Path) -> None:
    """Nothing is left of it."""
    make_stale(path)
    async with serving(App(), uds=path):
        assert os.listdir(tmp_path) == ["app.sock"]
        assert await answers(path)
    assert os.listdir(tmp_path) == []


async def test_unix_path_that_is_too_long_is_an_error_that_says_so(tmp_path: Path) -> None:
    """The error of the kernel alone does not."""
    with pytest.raises(OSError, match=r"cannot listen on .*: AF_UNIX path too long"):
        await start(App(), uds=tmp_path / ("x" * 108))
    assert os.listdir(tmp_path) == []


async def test_missing_directory_of_a_unix_path_is_a_file_not_found_error(tmp_path: Path) -> None:
    """The class of the original error is kept."""
    with pytest.raises(FileNotFoundError, match=r"cannot listen on .*/none/app.sock: No such file"):
        await start(App(), uds=tmp_path / "none" / "app.sock")


async def test_stale_socket_with_a_path_of_maximal_length_is_replaced() -> None:
    """No longer path is needed in between."""
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        directory = Path(short) / ("d" * (104 - len(short)))
        directory.mkdir()
        path = str(directory / "s")
        assert len(path) == 107
        make_stale(path)
        await serve_once(path)
        assert os.listdir(directory) == []


async def test_socket_that_may_not_be_connected_to_is_left_alone() -> None:
    """It belongs to another user, and may be alive."""
    if os.geteuid() != 0:
        pytest.skip("only root can run code as another user")
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o777)  # noqa: S103
        path = f"{directory}/app.sock"
        make_stale(path)
        os.chmod(path, 0o600)
        with unprivileged(), pytest.raises(PermissionError, match=f"cannot listen on {path}: Permission denied"):
            await start(App(), uds=path)
        assert os.listdir(directory) == ["app.sock"]
