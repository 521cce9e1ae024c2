"""
Whole programs with a server in a thread: what the interpreter's exit and Ctrl+C do to it.
"""

from __future__ import annotations

import re
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.helpers.clients import REQUEST
from tests.helpers.forking import ALLOWED
from tests.helpers.programs import Program


@contextmanager
def running(loop: str, end: str) -> Iterator[Program]:
    with Program(*ALLOWED, "-m", "tests.helpers.threaded", loop, end) as program:
        yield program


@contextmanager
def asking(program: Program, path: str) -> Iterator[socket.socket]:
    """Send a request, and wait until its handler has begun."""
    url = urlsplit(program.wait_for("http"))
    with socket.create_connection((url.hostname, url.port), timeout=10) as client:
        client.sendall(REQUEST % path.encode())
        program.wait_for(f"asked {path}")
        yield client


def answer(client: socket.socket) -> bytes:
    received = b""
    while chunk := client.recv(1000):
        received += chunk
    return received


@pytest.mark.parametrize(
    ("end", "code", "error"),
    [
        ("falls_off_the_end", 0, ""),
        ("exits", 3, ""),
        ("raises", 1, "LookupError: the program's own\n"),
        ("forgets_it_in_a_process", 0, ""),
    ],
)
def test_forgotten_server_in_a_thread_is_stopped_when_the_program_ends(
    end: str, code: int, error: str, loop_name: str
) -> None:
    """The request in flight is answered, by a handler that still has its threads; the lifespan ends."""
    with running(loop_name, end) as program, asking(program, "/wait") as client:
        assert answer(client).endswith(b"hello")
        found, printed = program.end()
    assert found == code
    assert printed[-len(error) :] == error
    assert "aioserve: " not in printed
    assert "lifespan over" in program.said
    assert end != "forgets_it_in_a_process" or program.said[-1] == "exit code 0"


def test_program_ends_also_where_the_loop_of_its_server_is_blocked(loop_name: str) -> None:
    """After the longest time that a stop can take."""
    with running(loop_name, "blocks_the_loop") as program:
        code, printed = program.end()
    assert code == 0
    assert printed.endswith(": its event loop is blocked; the program ends without its stop\n")


STARTS_LATE = """
import threading
from aioserve import start_in_thread
from tests.helpers.threaded import Printing

def late():
    threading.main_thread().join()
    start_in_thread(Printing())

threading.Thread(target=late).start()
"""


@pytest.mark.skipif(
    sys.version_info[:2] == (3, 12), reason="Python 3.12.1 starts no thread once the main one has ended"
)
def test_server_that_is_started_after_the_main_thread_has_ended_is_stopped_with_the_program() -> None:
    """Another thread, which is no daemon, keeps the program; concurrent.futures then takes no more work."""
    with Program("-c", STARTS_LATE) as program:
        code, _ = program.end()
    assert code == 0
    assert program.said == ["lifespan over"]


IMPORTED = """
from aioserve import start_in_thread
from tests.helpers.threaded import Printing

app = Printing()
start_in_thread("imported:app")
"""


def test_app_in_the_module_that_is_being_imported_is_refused(tmp_path: Path) -> None:
    """The thread would wait for the import, and the import for the thread."""
    (tmp_path / "imported.py").write_text(IMPORTED)
    with Program("-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import imported") as program:
        code, printed = program.end()
    assert code == 1
    assert printed.splitlines()[-1] == (
        "RuntimeError: start_in_thread('imported:app') would wait forever for imported, which is still being "
        "imported; call start_in_thread() in a function, or in another module"
    )


def test_failed_shutdown_of_a_forgotten_server_is_logged(loop_name: str) -> None:
    """Since nobody is there to raise it to."""
    with running(loop_name, "fails_to_shut_down") as program, asking(program, "/wait") as client:
        assert answer(client).endswith(b"hello")
        code, printed = program.end()
    assert code == 0
    logged = r"aioserve: http://127\.0\.0\.1:\d+: the app's lifespan failed to shut down: AppError: the app's own\n"
    assert len(re.findall(logged, printed)) == 1


FIRST_THREADS = """
import asyncio
from aioserve import start_in_thread

async def app(scope, receive, send):
    await receive()
    await asyncio.to_thread(int)
    await send({"type": "lifespan.startup.complete"})
    await receive()
    print(await asyncio.to_thread(int), flush=True)
    await send({"type": "lifespan.shutdown.complete"})

start_in_thread(app)
"""


def test_app_of_a_forgotten_server_has_its_threads_also_where_nobody_else_has_some() -> None:
    """Python forbids them at the end of a program, but after the stop."""
    with Program("-c", FIRST_THREADS) as program:
        assert program.end() == (0, "")
    assert program.said == ["0"]


def test_start_in_another_thread_ends_with_the_program(loop_name: str) -> None:
    """In order, and with an error that says so."""
    with running(loop_name, "ends_while_another_thread_starts_one") as program:
        assert program.end() == (0, "")
    said = "StartupInterruptedError: the program ended before the server had started"
    assert program.said == ["starting", "lifespan over", said]


def test_program_ends_without_what_ignores_its_cancellation(loop_name: str) -> None:
    """The forgotten server, which has no limit, is forced by an interrupt; its thread is left behind."""
    with running(loop_name, "falls_off_the_end") as program, asking(program, "/cling") as client:
        program.wait_for("stopping")
        program.wait_until_asleep()
        program.send(signal.SIGINT)
        answer(client)
        code, printed = program.end()
    assert code == 0
    assert "which is still running" in printed
    assert "has not ended: a task or a function of the app is still running there" in printed


def test_forked_child_ends_without_the_server_in_a_thread_of_its_parent(loop_name: str) -> None:
    """It can start its own ones, and forget them; the parent's server goes on."""
    with running(loop_name, "forks") as program, asking(program, "/wait") as client:
        assert answer(client).endswith(b"hello")
        assert program.end() == (0, "")
    assert program.said.index("the child ends") < program.said.index("the parent ends")
    assert program.said[-1] == "lifespan over"


@pytest.mark.parametrize("end", ["sleeps_in_its_block", "waits_until_it_closes"])
def test_interrupt_in_the_block_of_a_server_in_a_thread_stops_it_gracefully(end: str, loop_name: str) -> None:
    """KeyboardInterrupt comes out."""
    with running(loop_name, end) as program, asking(program, "/wait") as client:
        program.wait_for("in the block")
        program.wait_until_asleep()
        program.send(signal.SIGINT)
        assert answer(client).endswith(b"hello")
        code, printed = program.end()
    assert code  # 1, not -2, where anything is compiled after the interrupt, as for a named tuple
    assert printed.endswith("KeyboardInterrupt\n")
    assert program.said[-1] == "lifespan over"


@pytest.mark.parametrize("end", ["sleeps_in_its_block", "stops", "falls_off_the_end"])
def test_interrupt_of_the_stop_of_a_server_in_a_thread_forces(end: str, loop_name: str) -> None:
    """Also where it was forgotten, and the program ends already. After an interrupt in the block, it is the second."""
    with running(loop_name, end) as program, asking(program, "/hold") as client:
        if end == "sleeps_in_its_block":
            program.wait_for("in the block")
            program.wait_until_asleep()
            program.send(signal.SIGINT)
        program.wait_for("stopping")
        program.wait_until_asleep()
        program.send(signal.SIGINT)
        assert b"500 Internal Server Error" in answer(client)
        code, printed = program.end()
    assert bool(code) == (end != "falls_off_the_end")
    assert printed.endswith("KeyboardInterrupt\n") == bool(code)
    assert "1 cancelled" in printed
    assert program.said[-2:] == ["cancelled", "lifespan over"]


def test_interrupt_of_the_start_of_a_server_in_a_thread_leaves_nothing(loop_name: str) -> None:
    """The lifespan has ended before KeyboardInterrupt comes out."""
    with running(loop_name, "hangs_in_its_startup") as program:
        program.wait_for("starting")
        program.wait_until_asleep()
        program.send(signal.SIGINT)
        code, printed = program.end()
    assert code  # 1, not -2, where anything is compiled after the interrupt, as for a named tuple
    assert printed.endswith("KeyboardInterrupt\n")
    assert program.said == ["starting", "lifespan over"]
