"""
Several programs that start at one Unix socket path at the same time, and the lock between them.
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aioserve import _limits, serving, start
from aioserve._net import unix as _unix
from tests.conftest import WARNINGS_ARE_ERRORS
from tests.helpers.apps import App
from tests.helpers.privileges import unprivileged
from tests.helpers.turns import turns
from tests.helpers.unix import alive, answers, identity, make_stale, serve_once

STARTER = """
import asyncio, os, socket, sys
from aioserve import _limits, serving
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


def go_on(program: subprocess.Popen[str]) -> None:
    assert program.stdin is not None
    program.stdin.write("\n")
    program.stdin.flush()


def test_one_of_many_programs_that_start_at_a_stale_socket_serves(path: str, tmp_path: Path) -> None:
    """The others get an error that says so."""
    make_stale(path)
    with starters(path, 8) as programs:
        for program in programs:
            go_on(program)
        words = [said(program) for program in programs]
        assert words.count("serving") == 1, words
        assert all(word == "serving" or "another server" in word for word in words), words
        assert asyncio.run(answers(path))
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


@pytest.mark.parametrize("listens", [True, False])
async def test_socket_that_appears_during_the_check_is_left_alone(
    listens: bool, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It belongs to a server that does not use the lock of aioserve."""
    make_stale(path)
    is_in_use = _unix._is_in_use
    with contextlib.ExitStack() as stack:
        others: list[tuple[int, int]] = []
        looks = iter(["before the app's startup", "under the lock"])

        def too_early(at: str) -> bool:
            found = is_in_use(at)
            if next(looks) != "under the lock":
                return found
            os.unlink(path)
            if listens:
                alive(path, stack)
            else:
                make_stale(path)
                os.utime(path, (0, 0))
            others.append(identity(path))
            return found

        monkeypatch.setattr(_unix, "_is_in_use", too_early)
        with pytest.raises(OSError, match="another server has just created a socket there"):
            await start(App(), uds=path)
        assert [identity(path)] == others


def test_programs_that_start_and_stop_never_replace_each_others_sockets(path: str) -> None:
    """Each one that serves answers at the path; the others get an error."""
    with starters(path, 4, rounds=100) as programs:
        for program in programs:
            go_on(program)
        words = [said(program) for program in programs]
    assert all(word.endswith(" of 100 and none failed") for word in words), words
    assert any(not word.startswith("0 ") for word in words)


async def test_start_at_a_unix_path_waits_for_the_lock(path: str, tmp_path: Path) -> None:
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


async def test_lock_that_is_never_free_is_an_error(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program holds it for its own reasons."""
    monkeypatch.setattr(_limits, "FILE_LOCK_TIMEOUT", 0.01)
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        with pytest.raises(OSError, match=f"cannot listen on {path}: another program holds a lock on its directory"):
            await start(App(), uds=path)
    finally:
        os.close(directory)


async def test_unix_socket_is_served_where_locks_are_not_supported(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on some file systems."""

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    await serve_once(path)


async def test_unix_socket_is_served_in_a_directory_that_cannot_be_read() -> None:
    """Such a directory cannot be locked."""
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
    is_in_use = _unix._is_in_use

    def vanish(at: str) -> bool:
        os.unlink(path)
        return is_in_use(at)

    monkeypatch.setattr(_unix, "_is_in_use", vanish)
    async with serving(App(), uds=path):
        assert await answers(path)


async def test_unix_socket_that_is_replaced_before_it_listens_is_an_error(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between bind() and listen() a socket looks stale; the server whose socket was replaced notices."""

    def replaced(sock: Any, backlog: int) -> None:
        os.unlink(path)
        make_stale(path)
        os.utime(path, (0, 0))

    monkeypatch.setattr(socket.socket, "listen", replaced, raising=False)
    with pytest.raises(OSError, match="another file has just replaced it"):
        await start(App(), uds=path)
    assert os.listdir(tmp_path) == ["app.sock"]
