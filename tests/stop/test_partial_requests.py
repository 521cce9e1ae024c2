"""
A client that sends a part of a request, and then nothing, does not hold a stop; and it is no use of force.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
from uvicorn.config import HTTP_PROTOCOLS

from aioserve import Swappable, _limits, serving, start
from tests.helpers import not_portable
from tests.helpers.apps import App
from tests.helpers.clients import PIPELINING, connect, connect_tls
from tests.helpers.processes import linux_only
from tests.helpers.programs import Program
from tests.helpers.turns import MOMENT, turns

pytestmark = pytest.mark.usefixtures("short_grace")

FOR_EVER = 1000.0


@pytest.mark.parametrize("http", PIPELINING)
@pytest.mark.parametrize("kept_alive", [False, True], ids=["new", "kept alive"])
@pytest.mark.parametrize("make", [App, lambda: Swappable(App())], ids=["App", "Swappable"])
async def test_partial_request_does_not_hold_a_stop(
    http: str, kept_alive: bool, make: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """There is no budget here that could end it, and nothing is reported or logged of it."""
    monkeypatch.setattr(_limits, "PARTIAL_REQUEST", MOMENT)
    async with serving(make(), http=http, shutdown_timeout=None) as server, connect(server) as client:
        if kept_alive:
            client.ask("/")
            await client.answer()
        client.writer.write(b"GET / HT")
        await server.aclose()
        assert await client.rest() == b""
    assert server.report is not None
    assert not server.report.was_forced
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_partial_request_over_tls_does_not_hold_a_stop(tls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in clear text."""
    monkeypatch.setattr(_limits, "PARTIAL_REQUEST", MOMENT)
    options, context = tls
    async with serving(App(), shutdown_timeout=None, **options) as server, connect_tls(server, context) as client:
        client.ask("/")
        await client.answer()
        client.writer.write(b"GET / HT")
        await server.aclose()
        assert await client.rest() == b""
    assert server.report is not None
    assert not server.report.was_forced


@not_portable.unix_sockets
async def test_partial_request_on_a_unix_socket_does_not_hold_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on TCP."""
    monkeypatch.setattr(_limits, "PARTIAL_REQUEST", MOMENT)
    async with serving(App(), uds=tmp_path / "app.sock", shutdown_timeout=None) as server:
        reader, writer = await asyncio.open_unix_connection(tmp_path / "app.sock")
        writer.write(b"GET / HT")
        await server.aclose()
        assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()
    assert server.report is not None
    assert not server.report.was_forced


@pytest.mark.parametrize("http", PIPELINING)
async def test_time_for_a_partial_request_begins_anew_with_each_byte(
    http: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the time since the last byte that counts, so a slow client that goes on is answered."""
    monkeypatch.setattr(_limits, "PARTIAL_REQUEST", FOR_EVER)
    async with serving(App(), http=http, shutdown_timeout=None) as server, connect(server) as client:
        client.writer.write(b"GET / HT")
        closing = asyncio.create_task(server.aclose())
        await turns(10)
        client.writer.write(b"TP/1.1\r\n")
        await turns(10)
        assert not closing.done()
        monkeypatch.setattr(_limits, "PARTIAL_REQUEST", MOMENT)
        client.writer.write(b"host: ")  # from here on, it has only a moment
        await closing
        assert await client.rest() == b""


@pytest.mark.parametrize("http", PIPELINING)
async def test_first_byte_of_a_new_connection_gives_it_the_time_of_a_partial_request(
    http: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time for a first request is only for one that has sent nothing."""
    monkeypatch.setattr(_limits, "FIRST_REQUEST", FOR_EVER)
    monkeypatch.setattr(_limits, "PARTIAL_REQUEST", MOMENT)
    async with serving(App(), http=http, shutdown_timeout=None) as server, connect(server) as client:
        while not server.stats.connections:
            await asyncio.sleep(0)
        closing = asyncio.create_task(server.aclose())
        await turns(10)
        assert not closing.done()
        client.writer.write(b"GET / HT")
        await closing
        assert await client.rest() == b""


@linux_only
@pytest.mark.skipif("zttp" not in HTTP_PROTOCOLS, reason="this uvicorn has no zttp")
@not_portable.unread
async def test_first_request_of_which_zttp_has_read_a_part_gets_the_time_of_a_partial_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """zttp does not show it; the kernel knows that something has come."""
    monkeypatch.setattr(_limits, "FIRST_REQUEST", 0.0)
    async with serving(App(), http="zttp", shutdown_timeout=None) as server, connect(server) as client:
        client.writer.write(b"GET / HTTP/1.1\r\nhost: te")
        while not server.stats.connections:
            await asyncio.sleep(0)
        await turns()
        server.close()
        await asyncio.sleep(MOMENT)
        client.writer.write(b"st\r\n\r\n")
        assert b"connection: close" in await client.answer()


async def test_forced_stop_does_not_report_a_partial_request() -> None:
    """Nobody was waiting for an answer."""
    async with serving(App()) as server, connect(server) as client:
        client.writer.write(b"GET / HT")
        while not server.stats.connections:
            await asyncio.sleep(0)
        await turns(5)
        server.close(timeout=0)
        await server.wait_closed()
        await client.rest()
    assert server.report is not None
    assert not server.report.was_forced


async def test_handshake_under_way_and_its_first_request_get_a_second(
    tls: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client at a distance of 200 ms takes longer than a connection that has sent nothing may."""
    monkeypatch.setattr(_limits, "FIRST_REQUEST", 0.001)
    options, context = tls
    server = await start(App(), shutdown_timeout=None, **options)
    reader, writer = await asyncio.open_connection(server.host, server.port)
    while not server._engine.connections.acceptor.pending:
        await asyncio.sleep(0)
    closing = asyncio.create_task(server.aclose())
    await asyncio.sleep(0.05)  # much longer than a first request may take here
    assert not closing.done()
    await writer.start_tls(context, server_hostname="127.0.0.1")
    await asyncio.sleep(0.05)
    writer.write(b"GET / HTTP/1.1\r\nhost: test\r\n\r\n")
    assert b"connection: close" in await reader.readuntil(b"hello")
    await closing
    writer.transport.abort()


@linux_only
def test_command_line_exits_with_0_in_spite_of_a_partial_request() -> None:
    """And says nothing of dropped connections."""
    with Program("-m", "aioserve", "--port", "0", "tests.helpers.children:talking") as program:
        url = program.wait_for("http://")
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as client:
            client.sendall(b"GET / HT")
            program.send(signal.SIGINT)
            assert client.recv(100) == b""
            code, err = program.end()
    assert code == 0
    assert "dropped" not in err
