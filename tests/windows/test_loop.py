"""
What is particular to a loop without `add_reader()`, as asyncio's on Windows. All other tests run on one with
`--loop portable`.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from aioserve import serving, serving_process, start
from tests.helpers.apps import App
from tests.helpers.clients import REQUEST, connect, get
from tests.helpers.turns import turns

pytestmark = pytest.mark.parametrize("loop_name", ["portable"])


async def test_child_process_is_refused_where_the_loop_cannot_watch_it() -> None:
    """No process is started, and nothing is left."""
    with pytest.raises(RuntimeError) as caught:
        async with serving_process("tests.helpers.apps:without_lifespan"):
            raise AssertionError("the body ran")
    assert str(caught.value) == (
        "serving_process() cannot watch a child process: the event loop has no add_reader(); "
        "serve the app in this process"
    )


@pytest.mark.parametrize("number", [1, 20])
@pytest.mark.parametrize("turn", range(6))
async def test_request_that_arrives_as_the_stop_begins_is_answered(turn: int, number: int) -> None:
    """Whether the loop has accepted its connection, is about to, or has not looked yet."""
    server = await start(App(), shutdown_timeout=None)
    clients = [socket.create_connection((server.host, server.port)) for _ in range(number)]
    for client in clients:
        client.sendall(REQUEST % b"/")
    await turns(turn)
    await server.aclose()
    for client in clients:
        with client:
            client.settimeout(5)
            answer = b"".join(iter(lambda: client.recv(4096), b""))  # noqa: B023 (called at once)
            assert answer.endswith(b"hello")
    assert server.report is not None
    assert server.report.aborted == 0


@pytest.mark.parametrize("turn", range(4))
async def test_request_on_an_idle_connection_as_the_stop_begins_is_answered(turn: int) -> None:
    """It has arrived, and nothing tells so before the loop has read it."""
    server = await start(App(), shutdown_timeout=None)
    async with connect(server) as connection:
        connection.ask("/")
        await connection.answer()
        await turns()
        sock = connection.writer.get_extra_info("socket")
        with socket.socket(fileno=sock.fileno()) as now:  # in this turn, which the transport would not do
            now.send(REQUEST % b"/")
            now.detach()
        await turns(turn)
        await server.aclose()
        assert (await connection.rest()).endswith(b"hello")


async def test_small_answers_are_not_delayed() -> None:
    """TCP_NODELAY is set, which asyncio's loop for Windows does not do."""
    async with serving(App()) as server, connect(server) as connection:
        connection.ask("/")
        await connection.answer()
        (served,) = server._engine.connections.state.connections
        sock: Any = served.transport.get_extra_info("socket")
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1


async def test_lent_socket_that_a_loop_has_accepted_on_is_refused() -> None:
    """Windows leaves it with the first event loop, and the second server would never get a connection."""
    with socket.socket() as lent:
        lent.bind(("127.0.0.1", 0))
        async with serving(App(), sockets=[lent]) as server:
            loop = asyncio.get_running_loop()
            handler = loop.get_exception_handler()
            loop.set_exception_handler(lambda *_: None)  # asyncio reports it as well
            with pytest.raises(OSError, match="a socket stays with the first event loop that accepts on it"):
                await start(App(), sockets=[lent])
            loop.set_exception_handler(handler)
            assert (await get(server)).text == "hello"
