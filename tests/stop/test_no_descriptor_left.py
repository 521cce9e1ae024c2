"""
Stop accepting: also where no descriptor is left, what waits in the queue is answered.
"""

from __future__ import annotations

import asyncio
import os
import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from aioserve import serving
from tests.helpers import not_portable
from tests.helpers.apps import App
from tests.helpers.clients import connect
from tests.helpers.processes import linux_only
from tests.helpers.turns import MOMENT, turns

pytestmark = [pytest.mark.usefixtures("short_grace"), linux_only, not_portable.loop_accepts]

WAITING = 5

REQUEST = b"GET / HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n"


@contextmanager
def no_descriptor_left() -> Iterator[ExitStack]:
    """Use up all descriptors; closing the stack that is yielded frees them again."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 10, limits[1]))
    try:
        with ExitStack() as stack:
            with pytest.raises(OSError, match="Too many open files"):
                while True:
                    stack.callback(os.close, os.open(os.devnull, os.O_RDONLY))
            yield stack
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def ask(server: Any) -> socket.socket:
    client = socket.create_connection((server.host, server.port))
    client.sendall(REQUEST)
    return client


def answer(client: socket.socket) -> bytes:
    client.settimeout(10)
    return b"".join(iter(lambda: client.recv(4096), b""))


@pytest.mark.parametrize("idle", [0, 3])
async def test_connections_that_wait_are_answered_as_others_close(idle: int) -> None:
    """One at a time, where there are no idle ones whose descriptors can be used."""
    async with serving(App(), shutdown_timeout=None) as server, connect(server) as first:
        first.ask("/")  # from here on, it keeps a descriptor
        await first.answer()
        with ExitStack() as stack:
            for _ in range(idle):
                stack.enter_context(socket.create_connection((server.host, server.port)))
            while server.stats.connections < 1 + idle:
                await asyncio.sleep(0)
            waiting = [stack.enter_context(ask(server)) for _ in range(WAITING)]  # before the loop turns
            with no_descriptor_left():
                await server.aclose()
            assert [answer(client).endswith(b"hello") for client in waiting] == [True] * WAITING
    assert server.report is not None
    assert not server.report.was_forced


async def test_descriptor_of_a_listener_that_closes_is_used_for_what_waits_at_another(tmp_path: Path) -> None:
    """No connection closes that would give its descriptor."""
    async with serving(App(), port=0, uds=tmp_path / "app.sock", shutdown_timeout=MOMENT) as server:
        with ExitStack() as stack:
            waiting = [stack.enter_context(ask(server)) for _ in range(WAITING)]  # before the loop turns
            with no_descriptor_left():
                await server.aclose()
            assert [answer(client).endswith(b"hello") for client in waiting] == [True] * WAITING
    assert server.report is not None
    assert not server.report.was_forced


async def test_connections_that_could_not_be_accepted_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    """When the time is over, since a handler and its connection keep all that there is."""
    app = App()
    async with serving(app, shutdown_timeout=MOMENT) as server, connect(server) as first:
        first.ask("/hold")
        await app.holding.wait()
        acceptor = server._engine.connections.acceptor
        assert acceptor._reserve.release()
        with ExitStack() as stack:
            waiting = [stack.enter_context(ask(server)) for _ in range(WAITING)]
            with no_descriptor_left():
                await server.aclose()
            await turns()
            assert server.report is not None
            assert server.report.aborted >= WAITING
            assert f"{server.report.aborted} connections dropped" in caplog.text
            for client in waiting:
                with pytest.raises(ConnectionResetError):
                    answer(client)
