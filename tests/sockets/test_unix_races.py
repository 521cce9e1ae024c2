"""
Several programs that start at one Unix socket path at the same time, and the lock for the removal of a stale socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aioserve import serving, start
from aioserve._net import unix as _unix
from tests.conftest import WARNINGS_ARE_ERRORS
from tests.helpers import not_portable
from tests.helpers.apps import App
from tests.helpers.privileges import unprivileged
from tests.helpers.unix import alive, answers, connect, identity, make_stale, serve_once

pytestmark = not_portable.unix_sockets

STARTER = """
import asyncio, socket, sys, time
from aioserve import serving, start
from tests.helpers.apps import App, Receive, Scope, Send

async def is_ours(server, path):
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(b"GET / HTTP/1.1\\r\\nhost: test\\r\\nconnection: close\\r\\n\\r\\n")
    answer = await reader.read()
    writer.close()
    return answer.endswith(b"hello") and server.stats.served == 1

async def churn(path, rounds):
    served = failed = 0
    for _ in range(rounds):
        try:
            async with serving(App(), uds=path) as server:
                served += 1
                failed += not await is_ours(server, path)
        except OSError as exc:
            failed += "another server" not in str(exc)
    print(served, "of", rounds, "and none failed" if not failed else f"and {failed} failed", sep=" ", flush=True)

async def compete(path, rounds):
    for _ in range(rounds):
        moment = float(sys.stdin.readline())
        while time.monotonic() < moment:
            pass
        try:
            server = await start(App(), uds=path)
        except OSError as exc:
            print(exc, flush=True)
        else:
            print("serving", flush=True)
            sys.stdin.readline()
            await server.aclose()
            print("stopped", flush=True)
    sys.stdin.readline()

async def main():
    path, rounds, kind = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    print("ready", flush=True)
    if kind == "compete":
        await compete(path, rounds)
        return
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


def starters(
    path: str, count: int, rounds: int = 0, kind: str = "serve"
) -> contextlib.AbstractContextManager[list[subprocess.Popen[str]]]:
    @contextlib.contextmanager
    def run() -> Iterator[list[subprocess.Popen[str]]]:
        command = [sys.executable, *WARNINGS_ARE_ERRORS, "-c", STARTER, path, str(rounds), kind]
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


def go_on(program: subprocess.Popen[str], line: str = "") -> None:
    assert program.stdin is not None
    program.stdin.write(f"{line}\n")
    program.stdin.flush()


@pytest.mark.parametrize("stale", [False, True])
def test_one_of_eight_programs_that_start_at_once_serves(stale: bool, path: str, tmp_path: Path) -> None:
    """The others get an error that says so; a stale socket makes no difference."""
    with starters(path, 8, rounds=50, kind="compete") as programs:
        for _ in range(50):
            if stale:
                make_stale(path)
            moment = time.monotonic() + 0.01
            for program in programs:
                go_on(program, str(moment))
            words = [said(program) for program in programs]
            assert words.count("serving") == 1, words
            assert all(word == "serving" or "another server" in word for word in words), words
            assert os.listdir(tmp_path) == ["app.sock"]
            connect(path).close()
            winner = programs[words.index("serving")]
            go_on(winner)
            assert said(winner) == "stopped"
            assert os.listdir(tmp_path) == []


def test_socket_of_a_killed_program_is_replaced(path: str) -> None:
    """Nobody has to clean up by hand."""
    with starters(path, 1) as (program,):
        go_on(program)
        assert said(program) == "serving"
        program.send_signal(signal.SIGKILL)
        program.wait()
        assert os.path.lexists(path)
        asyncio.run(serve_once(path))
        program.returncode = 0
    assert not os.path.lexists(path)


def swap_at_the_last_look(monkeypatch: pytest.MonkeyPatch, swap: Callable[[], None]) -> None:
    """Let another program act between the last look at a stale socket under the lock and its removal."""
    check_unused = _unix._check_unused
    looks = iter(["before the app's startup", "before the lock", "under the lock", "in the private directory"])

    def too_early(at: str) -> None:
        check_unused(at)
        if next(looks) == "under the lock":
            swap()

    monkeypatch.setattr(_unix, "_check_unused", too_early)


@pytest.mark.parametrize("listens", [True, False])
async def test_socket_that_appears_during_the_check_is_left_alone(
    listens: bool, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It belongs to a server that does not use the lock of aioserve. It is moved away, and put back."""
    make_stale(path)
    with contextlib.ExitStack() as stack:
        others: list[tuple[int, int]] = []

        def swap() -> None:
            os.unlink(path)
            if listens:
                alive(path, stack)
            else:
                make_stale(path)
                os.utime(path, (0, 0))
            others.append(identity(path))

        swap_at_the_last_look(monkeypatch, swap)
        with pytest.raises(OSError, match="another server has just created a socket there"):
            await start(App(), uds=path)
        assert [identity(path)] == others
        assert os.listdir(tmp_path) == ["app.sock"]
        if listens:
            connect(path).close()


async def test_socket_that_begins_to_listen_during_the_check_is_left_alone(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was bound before, and looked stale; it is the same file."""
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(path)
        swap_at_the_last_look(monkeypatch, other.listen)
        with pytest.raises(OSError, match="another server has just created a socket there"):
            await start(App(), uds=path)
        assert os.listdir(tmp_path) == ["app.sock"]
        connect(path).close()


@pytest.mark.parametrize("kind", ["file", "link", "directory"])
async def test_file_that_appears_during_the_check_is_left_alone(
    kind: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it is: also a directory, which cannot be linked."""
    make_stale(path)

    def swap() -> None:
        os.unlink(path)
        if kind == "file":
            Path(path).write_text("precious")
        elif kind == "link":
            os.symlink("precious", path)
        else:
            os.mkdir(path)

    swap_at_the_last_look(monkeypatch, swap)
    with pytest.raises(OSError, match="another server has just created a socket there"):
        await start(App(), uds=path)
    assert os.listdir(tmp_path) == ["app.sock"]
    assert {"file": os.path.isfile, "link": os.path.islink, "directory": os.path.isdir}[kind](path)


async def test_file_that_cannot_be_put_back_is_kept(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two other programs have created a file at the path in turn; the error says where the first one is."""
    make_stale(path)
    rename = os.rename

    def swap() -> None:
        os.unlink(path)
        Path(path).write_text("precious")

    def rename_and_create(*args: Any, **kwargs: Any) -> None:
        rename(*args, **kwargs)
        Path(path).write_text("newer")

    swap_at_the_last_look(monkeypatch, swap)
    monkeypatch.setattr(os, "rename", rename_and_create)
    with pytest.raises(OSError, match="two other programs have just created a file there; one is ") as raised:
        await start(App(), uds=path)
    assert Path(str(raised.value).rpartition("one is ")[2]).read_text() == "precious"
    assert Path(path).read_text() == "newer"


def test_programs_that_start_and_stop_never_replace_each_others_sockets(path: str) -> None:
    """Each one that serves answers at the path; the others get an error."""
    with starters(path, 4, rounds=100) as programs:
        for program in programs:
            go_on(program)
        words = [said(program) for program in programs]
    assert all(word.endswith(" of 100 and none failed") for word in words), words
    assert any(not word.startswith("0 ") for word in words)


async def test_lock_on_the_directory_does_not_stop_a_start(path: str, tmp_path: Path) -> None:
    """Anybody who can read it can lock it, and programs do so to keep systemd-tmpfiles away."""
    make_stale(path)
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        await serve_once(path)
        await serve_once(path)
    finally:
        os.close(directory)


async def test_stale_socket_that_another_server_is_replacing_is_an_error(path: str, tmp_path: Path) -> None:
    """Nothing is changed; where nothing is at the path, the lock is not needed."""
    make_stale(path)
    before = identity(path)
    with open(tmp_path / ".app.sock.lock", "w") as lock:  # noqa: ASYNC230
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OSError, match=f"cannot listen on {path}: another server is just starting there") as raised:
            await start(App(), uds=path)
        assert raised.value.errno == errno.EADDRINUSE
        assert identity(path) == before
        assert sorted(os.listdir(tmp_path)) == [".app.sock.lock", "app.sock"]
        os.unlink(path)
        await serve_once(path)


async def test_lock_file_of_a_killed_server_is_used_and_removed(path: str, tmp_path: Path) -> None:
    """The kernel has released its lock."""
    make_stale(path)
    (tmp_path / ".app.sock.lock").touch(0o600)
    await serve_once(path)
    assert os.listdir(tmp_path) == []


async def test_lock_of_a_lock_file_that_was_removed_meanwhile_excludes_nobody(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server that had it has finished; the next lock is on a new file."""
    make_stale(path)
    flock, locked = fcntl.flock, list[bool]()

    def remove_first(descriptor: int, operation: int) -> None:
        if not locked:
            os.unlink(tmp_path / ".app.sock.lock")
        flock(descriptor, operation)
        if operation != fcntl.LOCK_UN:
            locked.append(os.path.lexists(tmp_path / ".app.sock.lock"))

    monkeypatch.setattr(fcntl, "flock", remove_first)
    await serve_once(path)
    assert locked == [False, True]


async def test_unix_socket_is_served_where_locks_are_not_supported(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on some file systems."""

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    make_stale(path)
    monkeypatch.setattr(fcntl, "flock", refuse)
    await serve_once(path)


@pytest.mark.parametrize("stale", [False, True])
async def test_unix_socket_is_served_where_hard_links_are_not_supported(
    stale: bool, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on some file systems."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    if stale:
        make_stale(path)
    monkeypatch.setattr(os, "link", refuse)
    await serve_once(path)
    async with serving(App(), uds=path):
        with pytest.raises(OSError, match="another server is listening there"):
            await start(App(), uds=path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("stale", [False, True])
async def test_unix_socket_is_served_where_proc_is_missing(
    stale: bool, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in some sandboxes, and on macOS."""
    if stale:
        make_stale(path)
    monkeypatch.setattr(os.path, "isdir", lambda at: False)
    async with serving(App(), uds=path):
        with connect(path) as client:
            assert client.getpeername().startswith(str(tmp_path))
        assert await answers(path)
    assert os.listdir(tmp_path) == []


async def test_unix_socket_is_served_in_a_directory_that_cannot_be_read() -> None:
    """To create files in it needs only the rights to write and to search."""
    if os.geteuid() != 0:
        pytest.skip("only root can run code as another user")
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o733)  # noqa: S103
        with unprivileged():
            await serve_once(f"{directory}/app.sock")
        assert os.listdir(directory) == []


async def test_stale_socket_that_vanishes_during_the_check_is_no_error(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program has removed it."""
    make_stale(path)
    check_unused = _unix._check_unused

    def vanish(at: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        check_unused(at)

    monkeypatch.setattr(_unix, "_check_unused", vanish)
    async with serving(App(), uds=path):
        assert await answers(path)


async def test_unix_socket_listens_before_it_appears(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No server can take it for a stale socket, and no client is refused."""
    link, outcomes = os.link, []

    def link_and_connect(*args: Any, **kwargs: Any) -> None:
        outcomes.append(os.path.lexists(path))
        link(*args, **kwargs)
        connect(path).close()
        outcomes.append(True)

    monkeypatch.setattr(os, "link", link_and_connect)
    await serve_once(path)
    assert outcomes == [False, True]
