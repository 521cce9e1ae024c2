"""
Descriptors that others have made: they are left open, and no child gets them that was not meant to.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator

import pytest

from aioserve import StartupError, serving, start
from aioserve._net import systemd
from tests.helpers import not_portable
from tests.helpers.apps import App
from tests.helpers.clients import REQUEST, get
from tests.helpers.programs import Program

COMMAND = ("-m", "aioserve", "tests.attacks.apps:writing", "--port=0")


def ask(client: socket.socket, path: str) -> bytes:
    """Send a request, and return its answer."""
    client.sendall(REQUEST % path.encode())
    answer = b""
    while not answer.endswith(b"hello"):
        chunk = client.recv(1000)
        assert chunk, answer
        answer += chunk
    return answer


def test_ready_fd_1_leaves_the_standard_output_to_the_app() -> None:
    """If it were closed, the next connection would get its number, and a client all that the app prints."""
    with Program(*COMMAND, "--ready-fd=1") as program:
        ready = json.loads(program.wait_for("{"))
        with socket.create_connection((ready["host"], ready["port"])) as client:
            for _ in range(2):
                assert ask(client, "/1").startswith(b"HTTP/1.1 200")
                program.wait_for("written")
            program.send(signal.SIGTERM)
            assert client.recv(1000) == b""
        assert program.end()[0] == 0
    assert ready["url"] in program.said


def test_pipe_of_ready_fd_stays_open_while_the_command_serves() -> None:
    """What the app writes to it later arrives there as well, and not at a client."""
    reading, writing = os.pipe()
    with open(reading) as reader, Program(*COMMAND, f"--ready-fd={writing}", pass_fds=(writing,)) as program:
        os.close(writing)
        ready = json.loads(reader.readline())
        with socket.create_connection((ready["host"], ready["port"])) as client:
            assert ask(client, f"/{writing}").startswith(b"HTTP/1.1 200")
            assert reader.readline() == "written\n"
            program.send(signal.SIGTERM)
            assert client.recv(1000) == b""
        assert program.end()[0] == 0
        assert reader.read() == ""


@not_portable.lent_twice
async def test_descriptor_that_is_served_is_open_after_the_block_and_listens() -> None:
    """A duplicate was used."""
    with socket.create_server(("127.0.0.1", 0)) as lent:
        for _ in range(2):
            async with serving(App(), fd=lent.fileno()) as server:
                assert (await get(server)).text == "hello"
            assert os.fstat(lent.fileno())
            assert lent.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)


async def test_descriptor_is_open_after_a_start_that_fails() -> None:
    """Its owner can try again."""
    with socket.create_server(("127.0.0.1", 0)) as lent:
        with pytest.raises(StartupError):
            await start(App(startup="raises"), fd=lent.fileno())
        assert os.fstat(lent.fileno())
        assert lent.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)


# systemd's descriptors.

# systemd's own begin with 3, which is in use here.
FIRST = 500


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Pass two sockets as systemd does, so that every child inherits them."""
    numbers = [FIRST, FIRST + 1]
    with contextlib.ExitStack() as stack:
        for number in numbers:
            with socket.create_server(("127.0.0.1", 0)) as sock:
                os.dup2(sock.fileno(), number)
            stack.callback(os.close, number)
        monkeypatch.setattr(systemd, "_FIRST_DESCRIPTOR", FIRST)
        monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
        monkeypatch.setenv("LISTEN_FDS", "2")
        monkeypatch.setenv("LISTEN_FDNAMES", "web:admin")
        yield numbers


def inherited(numbers: list[int]) -> list[int]:
    """Return which of these descriptors a child of this process has, by both of the ways to start one."""
    found = []
    for number in numbers:
        command = f"test -e /proc/self/fd/{number}"
        by_system = os.system(command) == 0  # noqa: S605
        by_subprocess = subprocess.run(["/bin/sh", "-c", command], close_fds=False, check=False).returncode == 0  # noqa: S603
        assert by_system == by_subprocess
        if by_system:
            found.append(number)
    return found


@not_portable.systemd
async def test_children_do_not_inherit_the_sockets_that_systemd_has_passed(passed: list[int]) -> None:
    """A child that lives on would keep the socket in use; this process keeps it for its next server."""
    assert inherited(passed) == passed
    for _ in range(2):
        async with serving(App(), systemd=True) as server:
            assert (await get(server)).text == "hello"
            assert inherited(passed) == []
        assert inherited(passed) == []
        assert all(os.fstat(number) for number in passed)


async def test_children_inherit_the_sockets_of_systemd_that_are_not_served(passed: list[int]) -> None:
    """They may be for a program that this one starts."""
    async with serving(App(), systemd="web"):
        assert inherited(passed) == passed[1:]
