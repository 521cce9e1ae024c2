"""
Finish: TLS handshakes are waited for as long as they move, within the budget.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from functools import partial
from typing import Any

import pytest

from aioserve import _limits, serving, start
from tests.helpers import not_portable
from tests.helpers.apps import App
from tests.helpers.processes import linux_only
from tests.helpers.threads import in_thread
from tests.helpers.turns import MOMENT

pytestmark = pytest.mark.usefixtures("short_grace")

# So many clients connect at once that their handshakes take longer than a connection that is silent may.
CLIENTS = 100

REQUEST = b"GET / HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n"


@linux_only
@pytest.mark.parametrize("lent", [False, pytest.param(True, marks=not_portable.lent_twice)], ids=["own", "lent"])
async def test_all_clients_whose_handshakes_are_under_way_are_answered(
    lent: bool, tls: tuple[dict[str, Any], ssl.SSLContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long they take together, each of them moves."""
    monkeypatch.setattr(_limits, "FIRST_REQUEST", MOMENT)
    options, context = tls

    with socket.socket() as lent_socket:
        lent_socket.bind(("127.0.0.1", 0))
        lent_socket.listen(CLIENTS)
        if lent:
            options = {**options, "sockets": [lent_socket]}
        async with serving(App(), shutdown_timeout=None, backlog=CLIENTS, **options) as server:
            address = (server.host, server.port)
            plain = [socket.create_connection(address) for _ in range(CLIENTS)]

            def talk(sock: socket.socket) -> bytes:
                with context.wrap_socket(sock, server_hostname="127.0.0.1") as client:
                    client.sendall(REQUEST)
                    return b"".join(iter(lambda: client.recv(4096), b""))

            talking = asyncio.gather(*[in_thread(partial(talk, sock)) for sock in plain])

            def accepted() -> int:
                pending = len(server._engine.connections.acceptor.pending)
                return pending + server.stats.connections + server.stats.served

            while accepted() < CLIENTS // 2:
                await asyncio.sleep(0)
            server.close()
            while server._engine.connections.acceptor.is_serving():
                await asyncio.sleep(0)
            at_the_close = accepted()
            await server.wait_closed()
            if lent:  # what was not accepted waits for the next server
                async with serving(App(), shutdown_timeout=None, **options):
                    await talking
        answers = await talking
    assert at_the_close >= CLIENTS // 2
    assert all(answer.endswith(b"hello") for answer in answers)
    assert server.report is not None
    assert server.report.aborted == 0


async def test_handshake_that_does_not_move_is_dropped_after_a_second(
    tls: tuple[dict[str, Any], ssl.SSLContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no use of force."""
    monkeypatch.setattr(_limits, "TLS_HANDSHAKE", MOMENT)
    server = await start(App(), shutdown_timeout=None, **tls[0])
    reader, writer = await asyncio.open_connection(server.host, server.port)
    writer.write(b"\x16\x03\x01")  # the first bytes of a record
    while not server._engine.connections.acceptor.pending:
        await asyncio.sleep(0)
    await server.aclose()
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await reader.readexactly(1)
    writer.transport.abort()
    assert server.report is not None
    assert not server.report.was_forced


async def test_handshake_that_is_dropped_by_force_is_counted(tls: tuple[dict[str, Any], ssl.SSLContext]) -> None:
    server = await start(App(), shutdown_timeout=None, **tls[0])
    _, writer = await asyncio.open_connection(server.host, server.port)
    while not server._engine.connections.acceptor.pending:
        await asyncio.sleep(0)
    server.close(timeout=0)
    await server.wait_closed()
    writer.transport.abort()
    assert server.report is not None
    assert server.report.aborted == 1
