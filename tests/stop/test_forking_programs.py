"""
Programs whose children live on: the port and the connections of their servers end without them.
"""

from __future__ import annotations

import os
import signal
import socket
from contextlib import ExitStack

import pytest

from tests.helpers.clients import REQUEST, UPGRADE
from tests.helpers.forking import ALLOWED, forked
from tests.helpers.processes import is_free
from tests.helpers.programs import Program

SERVING = """
import asyncio, signal, sys, threading
from aioserve import Swappable, serving, serving_process
from tests.conftest import LOOPS
from tests.helpers.forking import app

async def main(way):
    match way:
        case "serving_process":
            served = serving_process("tests.helpers.forking:app")
        case "Swappable":
            served = serving(Swappable(app))
        case _:
            served = serving(app)
    async with served as server:
        print(server.url, flush=True)
        await server.wait_closed()

def run(way, loop):
    with asyncio.Runner(**LOOPS[loop]) as runner:
        runner.run(main(way))
    print("closed", flush=True)

if sys.argv[1] == "thread":
    threading.Thread(target=run, args=sys.argv[1:]).start()
else:
    run(*sys.argv[1:])
signal.pause()
"""

COMMAND = ("-m", "aioserve", "tests.helpers.forking:app", "--port=0", "--loop")


def check_child_keeps_nothing(program: Program, path: str, end: str) -> None:
    """Let a handler of a program fork, end the server, and check that it is gone for its clients; the child lives."""
    port = int(program.wait_for("http").rpartition(":")[2])
    with ExitStack() as stack:
        new, idle, websocket, asking = (
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10)) for _ in range(4)
        )
        idle.sendall(REQUEST % b"/")
        read_until(idle, b"hello")
        websocket.sendall(UPGRADE)
        read_until(websocket, b"\r\n\r\n")
        asking.sendall(REQUEST % path.encode())
        child = stack.enter_context(forked(program))
        read_until(asking, b"hello")
        if end == "is killed":
            program.send(signal.SIGKILL)
            program.process.wait()
        else:
            asking.sendall(REQUEST % b"/close")
            read_until(websocket, b"\x88")
            websocket.sendall(b"\x88\x80\0\0\0\0")
            if end == "ends":
                program.process.wait()
            else:
                program.wait_for("closed")
        for client in (new, idle, websocket, asking):
            read_until(client, None)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
        assert is_free(port)
        os.kill(child, 0)


def read_until(client: socket.socket, end: bytes | None) -> None:
    """Read until these bytes have come, or until the end of the connection."""
    received = b""
    try:
        while chunk := client.recv(1000):
            received += chunk
            if end is not None and end in received:
                return
    except ConnectionResetError:
        pass
    assert end is None, received


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("path", ["/fork", "/thread", "/process", "/pool"])
def test_child_that_a_handler_has_forked_keeps_no_port_and_no_connection(path: str, loop: str) -> None:
    """By `os.fork()`, in the loop and in another thread; by `multiprocessing`; and as a worker of a process pool."""
    with Program(*ALLOWED, "-c", SERVING, "serving", loop) as program:
        check_child_keeps_nothing(program, path, "closes")


@pytest.mark.parametrize("way", ["serving_process", "Swappable", "thread"])
def test_child_keeps_nothing_of_another_kind_of_server(way: str) -> None:
    with Program(*ALLOWED, "-c", SERVING, way, "asyncio") as program:
        check_child_keeps_nothing(program, "/fork", "closes")


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("end", ["ends", "is killed"])
def test_child_keeps_nothing_of_a_command_that_has_ended(end: str, loop: str) -> None:
    """A server that is killed runs no code at its end."""
    with Program(*ALLOWED, *COMMAND, loop) as program:
        check_child_keeps_nothing(program, "/fork", end)


# What a child can do.

CHILD = """
import asyncio, sys
from aioserve import _limits, serving, start
from tests.conftest import LOOPS
from tests.helpers.apps import App
from tests.helpers.clients import connect, get
from tests.helpers.forking import in_child, open_at

async def serve_and_fork():
    async with serving(App()) as server:
        address = (server.host, server.port)
        return [(await get(server)).text, open_at(address) > 0, in_child(lambda: open_at(address))]

def start_its_own():
    with asyncio.Runner(**LOOPS[loop]) as runner:
        return runner.run(serve_and_fork())

async def start_its_own_in_a_handler():
    return in_child(start_its_own)

def use_the_inherited_loop():
    runner.run(asyncio.sleep(0))
    runner.run(server.aclose())
    return repr(server)

async def request(connection):
    connection.ask("/")
    return (await connection.answer())[-5:]

what, loop = sys.argv[1:]
with asyncio.Runner(**LOOPS[loop]) as runner:
    server = runner.run(start(App()))
    connecting = connect(server)
    connection = runner.run(connecting.__aenter__())
    print(runner.run(request(connection)))
    act = globals()[what]
    print(runner.run(act()) if what.endswith("handler") else in_child(act))
    print(runner.run(request(connection)), runner.run(get(server)).text)
    runner.run(connecting.__aexit__(None, None, None))
    runner.run(server.aclose())
"""


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("what", ["start_its_own", "start_its_own_in_a_handler", "use_the_inherited_loop"])
def test_child_can_start_a_server_and_use_the_loop_and_its_parent_serves_on(what: str, loop: str) -> None:
    """The child's copy of the loop shares its selector with the parent's loop."""
    with Program("-c", CHILD, what, loop) as program:
        assert program.end() == (0, "")
    said = "['hello', True, 0]" if what.startswith("start") else "<aioserve.Server http://127.0.0.1:8000 closed>"
    assert program.masked == ["b'hello'", said, "b'hello' hello"]


UNREGISTERED = """
import asyncio, os
registered = []
os.register_at_fork = lambda **hooks: registered.append(sorted(hooks))
from aioserve import serving
import aioserve._engine
print(registered)

async def main():
    for _ in range(2):
        async with serving("tests.helpers.apps:without_lifespan"):
            pass

asyncio.run(main())
print([each for each in registered if "before" in each])
registered.clear()
del os.register_at_fork
asyncio.run(main())
print(registered)
"""


def test_import_registers_nothing() -> None:
    """The first server does; and none on a system that cannot fork."""
    with Program("-c", "import logging, asyncio, concurrent.futures.thread, random\n" + UNREGISTERED) as program:
        assert program.end() == (0, "")
    assert program.said == ["[]", "[['after_in_child', 'after_in_parent', 'before']]", "[]"]
