"""
The two protocols of systemd: passing sockets, and notification. `tests/integration` uses the real systemd.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from aioserve import StartupError, serving, start
from aioserve._net import systemd as _systemd
from tests.helpers import not_portable
from tests.helpers.apps import App, Receive, Scope, Send
from tests.helpers.clients import get
from tests.helpers.programs import Program
from tests.helpers.systemd import FOR_ANOTHER, messages_of, notifications

pytestmark = not_portable.systemd


def bound() -> socket.socket:
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    return sock


@pytest.fixture
def handed_down(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[socket.socket]]:
    """Make two sockets with consecutive descriptors; those of systemd begin with 3, which is in use here."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(bound()) for _ in range(2)]
        room = stack.enter_context(contextlib.ExitStack())
        first = 500
        for number, sock in enumerate(sockets):
            os.dup2(sock.fileno(), first + number)
            room.callback(os.close, first + number)
        monkeypatch.setattr(_systemd, "_FIRST_DESCRIPTOR", first)
        monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
        monkeypatch.setenv("LISTEN_FDS", "2")
        monkeypatch.setenv("LISTEN_FDNAMES", "web:admin")
        yield sockets


def ports(sockets: list[socket.socket]) -> list[int]:
    return [sock.getsockname()[1] for sock in sockets]


async def test_all_sockets_that_systemd_passes_are_served(handed_down: list[socket.socket]) -> None:
    """Repeatedly: the sockets stay open, and the environment is unchanged."""
    before = dict(os.environ)
    for _ in range(2):
        async with serving(App(), systemd=True) as server:
            assert [sock.getsockname()[1] for sock in server.sockets] == ports(handed_down)
            assert (await get(server)).text == "hello"
    assert dict(os.environ) == before


async def test_socket_of_systemd_can_be_selected_by_its_name(handed_down: list[socket.socket]) -> None:
    """So a program can have a server for each."""
    async with serving(App(), systemd="admin") as admin, serving(App(), systemd="web") as web:
        assert [web.port, admin.port] == ports(handed_down)
        assert (await get(admin)).text == (await get(web)).text == "hello"


async def test_unknown_name_of_a_systemd_socket_is_an_error(handed_down: list[socket.socket]) -> None:
    """It lists the names that there are."""
    with pytest.raises(FileNotFoundError, match=r"no socket named 'wbe' \(only 'web', 'admin'\) to this process"):
        await start(App(), systemd="wbe")


async def test_sockets_of_systemd_replace_the_other_address_options(handed_down: list[socket.socket]) -> None:
    """The other options are for a start without systemd."""
    async with serving(App(), systemd=True, port=1) as server:
        assert server.port == ports(handed_down)[0]


async def test_lent_sockets_are_served_beside_those_of_systemd(
    handed_down: list[socket.socket], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Systemd's come last; without systemd they are served too, and behind the other address options."""
    with bound() as lent, bound() as other:
        options: dict[str, Any] = {"systemd": True, "fd": lent.fileno(), "sockets": [other]}
        path = tmp_path / "app.sock"
        async with serving(App(), port=1, uds=path, **options) as server:
            assert ports(list(server.sockets)) == ports([lent, other, *handed_down])
            assert not path.exists()
            for url in server.urls:
                async with httpx.AsyncClient(trust_env=False) as client:
                    assert (await client.get(url)).text == "hello"
        monkeypatch.setenv("LISTEN_FDS", "0")
        async with serving(App(), **options) as server:
            assert ports(list(server.sockets)) == ports([lent, other])
        async with serving(App(), port=0, uds=path, **options) as server:
            assert ports([server.sockets[0], *server.sockets[2:]]) == [server.port, *ports([lent, other])]
            assert path.exists()


async def test_lent_socket_that_fails_beside_systemd_leaves_nothing(handed_down: list[socket.socket]) -> None:
    """And the other way round; systemd's stay open."""
    with bound() as lent, socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname()) as connection:
            with pytest.raises(OSError, match="it is a connection"):
                await start(App(), systemd=True, sockets=[lent, connection])
            os.dup2(connection.fileno(), 501)
            with pytest.raises(OSError, match=r"cannot listen on descriptor 501: .*it is a connection"):
                await start(App(), systemd=True, sockets=[lent])
        for address in (lent.getsockname(), handed_down[0].getsockname()):
            with socket.socket() as client:
                assert client.connect_ex(address) == errno.ECONNREFUSED


async def test_other_address_options_are_used_without_systemd(tmp_path: Path) -> None:
    """As on a developer's machine."""
    async with serving(App(), systemd=True, host="127.0.0.1") as server:
        assert (await get(server)).text == "hello"
    async with serving(App(), systemd="web", uds=tmp_path / "app.sock") as server:
        assert server.url.startswith("http+unix://")


async def test_address_that_replaces_a_socket_of_systemd_with_another_name_is_a_warning(
    handed_down: list[socket.socket], caplog: pytest.LogCaptureFixture
) -> None:
    """Its name may be misspelt."""
    async with serving(App(), systemd="wbe", port=0) as server:
        assert server.port not in ports(handed_down)
    (line,) = messages_of(caplog)
    assert line.startswith("systemd has passed no socket named 'wbe' (only ")


async def test_systemd_option_without_systemd_and_without_an_address_is_an_error() -> None:
    """A random port would help nobody."""
    with pytest.raises(FileNotFoundError, match="systemd has passed no socket to this process"):
        await start(App(), systemd=True)


async def test_sockets_that_systemd_passed_to_another_process_are_ignored(
    handed_down: list[socket.socket], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A child has the environment of its parent, but not the sockets; one warning says what to do."""
    monkeypatch.setenv("LISTEN_PID", str(os.getppid()))
    with pytest.raises(FileNotFoundError):
        await start(App(), systemd=True)
    assert messages_of(caplog) == [FOR_ANOTHER.format("sockets are", os.getppid(), "LISTEN_PID", os.getpid())]

    caplog.clear()
    async with serving(App(), systemd="web", port=0) as server:
        assert server.port not in ports(handed_down)
    assert messages_of(caplog) == [FOR_ANOTHER.format("sockets are", os.getppid(), "LISTEN_PID", os.getpid())]

    caplog.clear()
    async with serving(App()):
        pass
    monkeypatch.setenv("LISTEN_FDS", "0")
    async with serving(App(), systemd=True, port=0):
        pass
    assert messages_of(caplog) == []


async def test_busy_port_beside_systemd_has_a_hint_of_its_own() -> None:
    """Another port than the unit's would help nobody: most likely the socket unit listens there."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for systemd in (True, "web"):
            with pytest.raises(
                OSError, match=rf":{port}: .* in use; systemd's socket or another process listens there$"
            ):
                await start(App(), systemd=systemd, port=port)
        with pytest.raises(OSError, match=rf":{port}: .* in use; port 0 takes a free port$"):
            await start(App(), port=port)


def test_command_behind_a_wrapper_says_who_has_got_its_sockets() -> None:
    """As a child of a shell script; where the port is busy as well, no other port is proposed."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

        def as_systemd() -> None:
            os.environ.update(LISTEN_PID=str(os.getppid()), LISTEN_FDS="1")

        arguments = ("-m", "aioserve", "tests.helpers.apps:factory", "--factory", "--systemd", f"--port={port}")
        with Program(*arguments, preexec=as_systemd) as program:
            code, err = program.end()
        warning = FOR_ANOTHER.format("sockets are", os.getpid(), "LISTEN_PID", program.process.pid)
    hint = "systemd's socket or another process listens there"
    assert code == 3
    assert err.splitlines() == [
        f"WARNING:  {warning}",
        f"aioserve: cannot start: cannot listen on 127.0.0.1:{port}: Address already in use; {hint}",
    ]


@pytest.mark.parametrize("number", ["two", "-1", "1.5", "", "9" * 5000])
async def test_invalid_number_of_systemd_sockets_counts_as_none(
    number: str, handed_down: list[socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody has set LISTEN_FDS by hand."""
    monkeypatch.setenv("LISTEN_FDS", number)
    with pytest.raises(FileNotFoundError):
        await start(App(), systemd=True)


async def test_number_of_systemd_sockets_that_is_too_high_is_an_error(
    handed_down: list[socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It names the first descriptor that does not exist; the rest is not looked at."""
    monkeypatch.setenv("LISTEN_FDS", "99999999")
    with pytest.raises(OSError, match="cannot listen on descriptor 502: Bad file descriptor"):
        await start(App(), systemd=True)


async def test_systemd_is_notified_of_the_start_and_the_stop(manager: socket.socket) -> None:
    """When the app has started, and when the stop is asked for."""
    app = App()
    async with serving(app, systemd=True, port=0) as server:
        assert notifications(manager) == [b"READY=1"]
        server.close()
        assert notifications(manager) == [b"STOPPING=1"]
        server.close()
    assert notifications(manager) == []


async def test_server_of_one_systemd_socket_does_not_notify_of_its_stop(manager: socket.socket) -> None:
    """A program may close one of several servers and go on; systemd would kill it in the end."""
    async with serving(App(), systemd="web", port=0):
        assert notifications(manager) == [b"READY=1"]
    assert notifications(manager) == []


async def test_systemd_is_not_told_that_a_server_is_ready_which_stops_already(manager: socket.socket) -> None:
    """The stop was asked for during the startup; systemd would take READY for the newer state."""

    class Leaving(App):
        async def lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
            scope["state"]["aioserve"].close()
            await super().lifespan(scope, receive, send)

    async with serving(Leaving(), systemd=True, port=0):
        pass
    assert notifications(manager) == [b"STOPPING=1"]


async def test_systemd_is_not_notified_of_a_start_that_fails(manager: socket.socket) -> None:
    """READY is not sent."""
    with pytest.raises(StartupError):
        await start(App("raises"), systemd=True, port=0)
    assert b"READY=1" not in notifications(manager)


async def test_systemd_is_not_notified_without_the_systemd_option(manager: socket.socket) -> None:
    """The server may be one of many parts of a program, which systemd knows as a whole."""
    async with serving(App()):
        pass
    assert notifications(manager) == []


async def test_systemd_that_cannot_be_notified_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The server works without it."""
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    async with serving(App(), systemd=True, port=0) as server:
        assert (await get(server)).text == "hello"
    assert messages_of(caplog) == [
        f"cannot send READY=1 to systemd at {tmp_path}/gone: No such file or directory",
        f"cannot send STOPPING=1 to systemd at {tmp_path}/gone: No such file or directory",
    ]
