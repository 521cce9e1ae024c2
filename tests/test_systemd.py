"""
systemd's two protocols, each a matter of environment variables. `tests/integration` has the real one.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from aioserve import StartupError, _systemd, serving, start
from tests.apps import App
from tests.clients import get


def bound() -> socket.socket:
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    return sock


@pytest.fixture
def handed_down(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[socket.socket]]:
    """Two sockets, with neighbouring descriptors; systemd's begin with 3, which is somebody else's here."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(bound()) for _ in range(2)]
        room = stack.enter_context(contextlib.ExitStack())
        first = 500
        for number, sock in enumerate(sockets):
            os.dup2(sock.fileno(), first + number)
            room.callback(os.close, first + number)
        monkeypatch.setattr(_systemd, "_FIRST", first)
        monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
        monkeypatch.setenv("LISTEN_FDS", "2")
        monkeypatch.setenv("LISTEN_FDNAMES", "web:admin")
        yield sockets


def ports(sockets: list[socket.socket]) -> list[int]:
    return [sock.getsockname()[1] for sock in sockets]


async def test_all_that_is_handed_down_is_served(handed_down: list[socket.socket]) -> None:
    """Again and again: the sockets stay open, and the environment as it was."""
    before = dict(os.environ)
    for _ in range(2):
        async with serving(App(), systemd=True) as server:
            assert [sock.getsockname()[1] for sock in server.sockets] == ports(handed_down)
            assert (await get(server)).text == "hello"
    assert dict(os.environ) == before


async def test_one_can_be_had_by_its_name(handed_down: list[socket.socket]) -> None:
    """So a program has a server for each."""
    async with serving(App(), systemd="admin") as admin, serving(App(), systemd="web") as web:
        assert [web.port, admin.port] == ports(handed_down)
        assert (await get(admin)).text == (await get(web)).text == "hello"


async def test_a_name_that_is_not_there_is_told(handed_down: list[socket.socket]) -> None:
    """With where to look."""
    with pytest.raises(FileNotFoundError, match=r"no socket of the name 'wbe' \(but 'web', 'admin'\) to this process"):
        await start(App(), systemd="wbe")


async def test_what_is_handed_down_goes_before_what_else_is_said(handed_down: list[socket.socket]) -> None:
    """The other options are for a start without systemd."""
    async with serving(App(), systemd=True, port=1) as server:
        assert server.port == ports(handed_down)[0]


async def test_without_systemd_the_other_options_hold(tmp_path: Path) -> None:
    """As on the machine of a developer."""
    async with serving(App(), systemd=True, host="127.0.0.1") as server:
        assert (await get(server)).text == "hello"
    async with serving(App(), systemd="web", uds=tmp_path / "app.sock") as server:
        assert server.url.startswith("http+unix://")


async def test_without_systemd_and_without_other_options_it_says_so() -> None:
    """A port that nobody knows of would help nobody."""
    with pytest.raises(FileNotFoundError, match="systemd has handed down no socket to this process"):
        await start(App(), systemd=True)


async def test_what_is_for_another_process_is_left_alone(
    handed_down: list[socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child has the environment of its parent, but not the sockets."""
    monkeypatch.setenv("LISTEN_PID", str(os.getppid()))
    with pytest.raises(FileNotFoundError):
        await start(App(), systemd=True)


@pytest.mark.parametrize("number", ["two", "-1", "1.5", "", "9" * 5000])
async def test_a_number_that_is_none_is_no_socket(
    number: str, handed_down: list[socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody has set it by hand."""
    monkeypatch.setenv("LISTEN_FDS", number)
    with pytest.raises(FileNotFoundError):
        await start(App(), systemd=True)


async def test_a_number_that_is_too_high_is_told_at_the_first_that_is_not_there(
    handed_down: list[socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest is not looked at."""
    monkeypatch.setenv("LISTEN_FDS", "99999999")
    with pytest.raises(OSError, match="cannot listen on descriptor 502: Bad file descriptor"):
        await start(App(), systemd=True)


@pytest.fixture(params=["a path", "an abstract name"])
def manager(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """What systemd listens with."""
    path = str(tmp_path / "notify") if request.param == "a path" else f"@aioserve-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(path.replace("@", "\0", 1))
        sock.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", path)
        yield sock


def heard(manager: socket.socket) -> list[bytes]:
    messages = []
    with contextlib.suppress(BlockingIOError):
        while True:
            messages.append(manager.recv(1000))
    return messages


async def test_systemd_is_told_of_the_start_and_the_stop(manager: socket.socket) -> None:
    """Of the one when the app has started, of the other when it is asked for."""
    app = App()
    async with serving(app, systemd=True, port=0) as server:
        assert heard(manager) == [b"READY=1"]
        server.close()
        assert heard(manager) == [b"STOPPING=1"]
        server.close()
    assert heard(manager) == []


async def test_one_server_of_several_does_not_stop_the_service(manager: socket.socket) -> None:
    """A program that has them by name may close one and go on; systemd would kill it in the end."""
    async with serving(App(), systemd="web", port=0):
        assert heard(manager) == [b"READY=1"]
    assert heard(manager) == []


async def test_a_start_that_fails_was_never_ready(manager: socket.socket) -> None:
    """But it has stopped."""
    with pytest.raises(StartupError):
        await start(App("raises"), systemd=True, port=0)
    assert b"READY=1" not in heard(manager)


async def test_who_does_not_ask_tells_nobody(manager: socket.socket) -> None:
    """It may be one of many parts of a program, which systemd knows as a whole."""
    async with serving(App()):
        pass
    assert heard(manager) == []


async def test_a_manager_that_is_gone_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The server works without it."""
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    async with serving(App(), systemd=True, port=0) as server:
        assert (await get(server)).text == "hello"
    assert [record.getMessage() for record in caplog.records if record.name == "aioserve"] == [
        f"cannot tell systemd READY=1 at {tmp_path}/gone: No such file or directory",
        f"cannot tell systemd STOPPING=1 at {tmp_path}/gone: No such file or directory",
    ]
