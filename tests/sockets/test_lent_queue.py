"""
A lent socket stays its owner's: it stays open, and its queue is left for the next server.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket

import pytest

from aioserve import serving, start
from tests.helpers.apps import App
from tests.helpers.clients import BURST, burst, connect

pytestmark = pytest.mark.usefixtures("short_grace")


@pytest.mark.parametrize("families", [[socket.AF_INET], [socket.AF_INET, socket.AF_INET6]])
async def test_lent_sockets_stay_open_with_their_queue(families: list[socket.AddressFamily], loop_name: str) -> None:
    """Connections that wait in the queue are left to the next server, and answers are sent without delay."""
    with contextlib.ExitStack() as stack:
        lent = [stack.enter_context(socket.socket(family, socket.SOCK_STREAM)) for family in families]
        for sock in lent:
            sock.bind(("127.0.0.1" if sock.family == socket.AF_INET else "::1", 0))
        async with serving(App(), sockets=lent) as server:
            assert len(server.urls) == len(families)
            async with connect(server) as client:
                client.ask("/")
                await client.answer()
                (protocol,) = server.uvicorn.server_state.connections
                connection = protocol.transport.get_extra_info("socket")
                assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        async with serving(App(), sockets=lent) as again:
            assert again.url == server.url
            clients = stack.enter_context(burst(again))
        # uvloop polls its sockets before it runs callbacks, and a portable loop always has an accept() under way.
        assert again.stats.served == 0 or loop_name in ("uvloop", "portable")
        async with serving(App(), sockets=lent) as last:
            while again.stats.served + last.stats.served < BURST:
                await asyncio.sleep(0)
            assert sum(client.recv(1000).startswith(b"HTTP/1.1 200") for client in clients) == BURST
        assert all(sock.fileno() != -1 for sock in lent)


async def test_two_servers_can_share_a_lent_socket() -> None:
    """So the new one can start before the old one stops."""
    with socket.socket() as lent:
        lent.bind(("127.0.0.1", 0))
        async with serving(App(), sockets=[lent]) as old:
            new = await start(App(), sockets=[lent])
            async with connect(old) as client:
                client.ask("/")
                await client.answer()
        async with new, connect(new) as client:
            client.ask("/")
            await client.answer()
            assert old.stats.served + new.stats.served == 2
