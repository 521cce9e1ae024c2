"""
systemd's watchdog: it is answered from the server's loop, so it ends a program whose loop is blocked.
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
import socket
import time

import pytest

from aioserve import serving, serving_process, start
from tests.helpers import not_portable
from tests.helpers.apps import App
from tests.helpers.clients import connect
from tests.helpers.processes import TALKING, linux_only
from tests.helpers.programs import Program
from tests.helpers.systemd import FOR_ANOTHER, messages_of, notifications
from tests.helpers.turns import MOMENT

pytestmark = not_portable.systemd

ALIVE = b"WATCHDOG=1"

# The watchdog's time in microseconds: the answers come after half of it, and so several in a MOMENT.
LIMIT = "10000"


@pytest.fixture
def watched(manager: socket.socket, monkeypatch: pytest.MonkeyPatch) -> socket.socket:
    """Let systemd's watchdog watch this process."""
    monkeypatch.setenv("WATCHDOG_USEC", LIMIT)
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    return manager


async def answers(manager: socket.socket, count: int = 3) -> None:
    """Wait for answers to come that have not been sent yet."""
    notifications(manager)
    for _ in range(count):
        assert await asyncio.get_running_loop().sock_recv(manager, 100) == ALIVE


async def test_server_of_one_socket_says_that_it_does_not_answer_the_watchdog(
    watched: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    """Others may serve the other sockets of the program."""
    async with serving(App(), systemd="web", port=0):
        assert notifications(watched) == [b"READY=1"]
    (line,) = messages_of(caplog)
    assert line.startswith("systemd's watchdog is on (WATCHDOG_USEC), and a server of one named socket does not answer")


async def test_watchdog_of_systemd_is_answered_until_the_server_has_closed(watched: socket.socket) -> None:
    """From the start on, and also during a stop that takes long; then no more."""
    app = App()
    async with serving(app, systemd=True, port=0) as server, connect(server) as connection:
        assert notifications(watched)[:2] == [b"READY=1", ALIVE]
        await answers(watched)
        connection.ask("/hold")
        await app.holding.wait()
        server.close()
        assert b"STOPPING=1" in notifications(watched)
        await answers(watched)
        app.release.set()
    notifications(watched)
    await asyncio.sleep(MOMENT)
    assert notifications(watched) == []


async def test_blocked_loop_does_not_answer_the_watchdog(watched: socket.socket) -> None:
    """So systemd restarts the program."""
    async with serving(App(), systemd=True, port=0):
        await answers(watched)
        notifications(watched)
        time.sleep(MOMENT)  # noqa: ASYNC251 (it is to block the loop)
        assert notifications(watched) == []
        await answers(watched)


async def test_watchdog_without_a_process_id_is_for_every_process(
    watched: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """See sd_watchdog_enabled(3)."""
    monkeypatch.delenv("WATCHDOG_PID")
    async with serving(App(), systemd=True, port=0):
        await answers(watched)


async def test_watchdog_of_another_process_is_not_answered_but_reported(
    watched: socket.socket, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Most likely of a wrapper, which does not answer either."""
    monkeypatch.setenv("WATCHDOG_PID", str(os.getppid()))
    async with serving(App(), systemd=True, port=0):
        await asyncio.sleep(MOMENT)
        assert notifications(watched) == [b"READY=1"]
    assert messages_of(caplog) == [FOR_ANOTHER.format("watchdog is", os.getppid(), "WATCHDOG_PID", os.getpid())]


@pytest.mark.parametrize("limit", ["0", "-1", "1.5", "soon", "", "9" * 5000])
async def test_invalid_time_of_the_watchdog_is_ignored_with_a_warning(
    limit: str, watched: socket.socket, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody has set WATCHDOG_USEC by hand."""
    monkeypatch.setenv("WATCHDOG_USEC", limit)
    async with serving(App(), systemd=True, port=0):
        await asyncio.sleep(MOMENT)
        assert notifications(watched) == [b"READY=1"]
    assert messages_of(caplog) == [f"ignored WATCHDOG_USEC={limit}: not a number of microseconds"]


async def test_server_of_one_systemd_socket_does_not_answer_the_watchdog(watched: socket.socket) -> None:
    """A program may close one of several servers and go on; systemd would take it for blocked."""
    async with serving(App(), systemd="web", port=0), serving(App()):
        await asyncio.sleep(MOMENT)
        assert notifications(watched) == [b"READY=1"]


@pytest.mark.parametrize("loop_name", ["asyncio"])
@pytest.mark.parametrize("variable", ["WATCHDOG_USEC", "NOTIFY_SOCKET"])
async def test_server_has_no_timer_without_a_watchdog(
    variable: str, watched: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing wakes up an idle server. (uvloop does not show its timers.)"""

    def timers() -> int:
        return len([timer for timer in getattr(asyncio.get_running_loop(), "_scheduled", ()) if not timer.cancelled()])

    before = timers()
    async with serving(App(), systemd=True, port=0):
        assert timers() == before + 1
    monkeypatch.delenv(variable)
    async with serving(App(), systemd=True, port=0):
        assert timers() == before


async def test_watchdog_is_answered_no_more_after_a_crash(watched: socket.socket) -> None:
    """Nor after any other end of the server."""
    app = App()
    server = await start(app, systemd=True, port=0)
    app.crash.set()
    with pytest.raises(Exception, match="the app's own"):
        await server.wait_closed()
    notifications(watched)
    await asyncio.sleep(MOMENT)
    assert notifications(watched) == []


@linux_only
async def test_watchdog_is_answered_if_parent_and_child_are_alive(watched: socket.socket) -> None:
    """The child tells its parent, which is the process that systemd knows; so either of them can be found blocked."""
    async with serving_process(TALKING, systemd=True, port=0) as server:
        assert notifications(watched)[:2] == [b"READY=1", ALIVE]
        await answers(watched)
        os.kill(server.pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(MOMENT)
            notifications(watched)
            await asyncio.sleep(MOMENT)
            assert notifications(watched) == []
        finally:
            os.kill(server.pid, signal.SIGCONT)
        await answers(watched)
    assert notifications(watched)[-1] in (ALIVE, b"STOPPING=1")


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("option", ["--systemd", "--systemd-name=web"])
def test_command_answers_the_watchdog_until_its_loop_is_blocked(loop: str, option: str, watched: socket.socket) -> None:
    """Here a server with a name is the whole service."""

    def as_systemd() -> None:
        os.environ["WATCHDOG_PID"] = str(os.getpid())

    arguments = ("-m", "aioserve", TALKING, option, "--port=0", f"--loop={loop}")
    with Program(*arguments, preexec=as_systemd) as program, socket.socket() as client:
        url = program.wait_for("http")
        watched.settimeout(10)
        assert [watched.recv(100) for _ in range(4)] == [b"READY=1", ALIVE, ALIVE, ALIVE]
        client.connect(("127.0.0.1", int(url.rpartition(":")[2])))
        client.sendall(b"GET /block HTTP/1.1\r\nhost: test\r\n\r\n")
        program.wait_for("blocking")
        watched.setblocking(False)
        notifications(watched)
        assert select.select([watched], [], [], MOMENT)[0] == []
