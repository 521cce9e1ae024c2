"""
`header_timeout`: a client that is too slow to send the head of a request loses its connection, and nobody else does.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from uvicorn.config import HTTP_PROTOCOLS

from aioserve import Server, Swappable, serving, start
from tests.helpers import not_portable
from tests.helpers.apps import App, Receive, Scope, Send
from tests.helpers.clients import PIPELINING, UPGRADE, connect, get
from tests.helpers.threads import in_thread
from tests.helpers.turns import MOMENT

SLOW = 300
PROTOCOLS = [name for name in HTTP_PROTOCOLS if name != "auto"]
ONLY_THE_KERNEL_TELLS = [pytest.param("zttp", marks=not_portable.unread)] if "zttp" in HTTP_PROTOCOLS else []


def timer_of(server: Server) -> asyncio.TimerHandle | None:
    state: Any = server.uvicorn.server_state
    timer: asyncio.TimerHandle | None = state.timer
    return timer


@pytest.mark.parametrize("http", PROTOCOLS)
async def test_client_that_sends_nothing_is_closed(http: str, caplog: pytest.LogCaptureFixture) -> None:
    """Without an answer, since it has asked nothing; and the log is quiet."""
    async with serving(App(), http=http, header_timeout=MOMENT) as server, connect(server) as client:
        assert await client.rest() == b""
        assert (await get(server)).text == "hello"
    assert [record for record in caplog.records if record.levelno >= logging.INFO] == []


@pytest.mark.parametrize("http", [*PIPELINING, *ONLY_THE_KERNEL_TELLS])
@pytest.mark.parametrize("make", [App, lambda: Swappable(App())], ids=["App", "Swappable"])
async def test_client_that_sends_a_part_of_a_first_head_is_answered_408(http: str, make: Any) -> None:
    """And its connection closes."""
    async with serving(make(), http=http, header_timeout=MOMENT) as server, connect(server) as client:
        client.writer.write(b"GET / HTTP/1.1\r\nhost: ")
        answer = await client.rest()
    assert answer.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
    assert b"connection: close\r\n" in answer


@pytest.mark.parametrize("http", PROTOCOLS)
async def test_client_that_sends_a_part_of_a_later_head_is_answered_408(http: str) -> None:
    """uvicorn's `timeout_keep_alive` ends with the first byte of it."""
    async with serving(App(), http=http, header_timeout=MOMENT) as server, connect(server) as client:
        client.ask("/")
        await client.answer()
        client.writer.write(b"GET / HTTP/1.1\r\nhost: ")
        assert (await client.rest()).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("http", PIPELINING)
async def test_byte_now_and_then_is_not_enough(http: str) -> None:
    """It is the time for the whole head, and does not begin anew."""
    async with serving(App(), http=http, header_timeout=0.2) as server, connect(server) as client:
        for byte in b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 1000:
            client.writer.write(bytes([byte]))
            await asyncio.sleep(0.01)
            if client.reader.at_eof() or client.reader.exception():
                break
        else:
            pytest.fail("it was not closed")
    assert server.stats.served == 0


async def test_slow_client_that_reads_nothing_is_closed_once(caplog: pytest.LogCaptureFixture) -> None:
    """Its connection stays until it has read the answer before, and is not closed again at each look."""
    size = 10_000_000  # more than a kernel keeps

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % size)]})
        await send({"type": "http.response.body", "body": bytes(size)})

    caplog.set_level("DEBUG", "aioserve")
    async with serving(app, lifespan="off", header_timeout=MOMENT) as server, connect(server) as client:
        client.ask("/")
        while not server.stats.served:
            await asyncio.sleep(0)
        client.writer.write(b"GET / HT")
        for _ in range(3):
            async with connect(server) as slow:
                await slow.rest()
        assert (await client.rest()).rpartition(b"\0")[2].startswith(b"HTTP/1.1 408 ")
    lines = [record.getMessage() for record in caplog.records if "closing " in record.getMessage()]
    assert sum(int(line.split()[1]) for line in lines) == 4


async def test_slow_client_over_tls_is_closed_without_its_help(tls: Any) -> None:
    """TLS would wait half a minute for the client to agree."""
    options, context = tls
    async with serving(
        App(), http=PIPELINING[0], header_timeout=0.5, **options
    ) as server:  # which is for the handshake as well

        def talk() -> bytes:
            with (
                socket.create_connection((server.host, server.port), timeout=10) as plain,
                context.wrap_socket(plain, server_hostname="127.0.0.1", suppress_ragged_eofs=True) as client,
            ):
                client.send(b"GET / HT")
                answer: bytes = client.recv(1000)
                client.recv(1000)
                return answer

        assert (await in_thread(talk)).startswith(b"HTTP/1.1 408 ")
        while server.stats.connections:
            await asyncio.sleep(0)


@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01"], ids=["nothing", "a part"])
async def test_client_that_does_not_go_on_with_its_tls_handshake_is_closed(sent: bytes, tls: Any) -> None:
    """The loop's own limit is a minute."""
    options, _ = tls
    async with (
        serving(App(), http=PIPELINING[0], header_timeout=MOMENT, **options) as server,
        connect(server) as client,
    ):
        client.writer.write(sent)
        assert await client.rest() == b""


@not_portable.unix_sockets
async def test_slow_client_on_a_unix_socket_is_closed(tmp_path: Path) -> None:
    """As on TCP."""
    async with (
        serving(App(), http=PIPELINING[0], uds=tmp_path / "app.sock", header_timeout=MOMENT) as server,
        connect(server) as client,
    ):
        client.writer.write(b"GET / HT")
        assert (await client.rest()).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("http", PROTOCOLS)
async def test_slow_handlers_slow_bodies_and_idle_connections_are_left_alone(http: str) -> None:
    """They have no head to send."""
    app = App()
    async with (
        serving(app, http=http, header_timeout=MOMENT) as server,
        connect(server) as holding,
        connect(server) as uploading,
        connect(server) as idle,
        connect(server) as slow,
    ):
        holding.ask("/hold")
        uploading.writer.write(b"POST /hold HTTP/1.1\r\nhost: test\r\ncontent-length: 5\r\n\r\nhe")
        idle.ask("/")
        await idle.answer()
        for _ in range(3):  # each of them sees some looks
            assert await slow.rest() == b""
            async with connect(server) as another:
                await another.rest()
        app.release.set()
        uploading.writer.write(b"llo")
        for client in (holding, uploading):
            assert (await client.answer()).startswith(b"HTTP/1.1 200 ")
        idle.ask("/")
        assert (await idle.answer()).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("http", PROTOCOLS)
@pytest.mark.parametrize("part", [b"\r\n", b"\r"], ids=["line", "half"])
async def test_empty_line_between_two_requests_does_not_hold_a_connection(http: str, part: bytes) -> None:
    """It ends uvicorn's `timeout_keep_alive`, and is not the part of a head for every parser."""
    async with serving(App(), http=http, header_timeout=MOMENT) as server, connect(server) as client:
        client.ask("/")
        await client.answer()
        client.writer.write(part)
        await client.rest()


@pytest.mark.parametrize("http", [name for name in PROTOCOLS if name != "httptools"])  # which keeps that to itself
async def test_rest_of_a_body_behind_its_answer_does_not_hold_a_connection(http: str) -> None:
    """It ends uvicorn's `timeout_keep_alive` as well."""
    async with serving(App(), http=http, header_timeout=MOMENT) as server, connect(server) as client:
        client.writer.write(b"POST / HTTP/1.1\r\nhost: test\r\ncontent-length: 3\r\n\r\n")
        await client.answer()
        client.writer.write(b"abc")
        await client.rest()


@pytest.mark.parametrize("http", PROTOCOLS)
async def test_slow_body_behind_its_answer_is_left_alone(http: str) -> None:
    """Also where it has stopped in the middle of the line that says how long a chunk is."""
    async with (
        serving(App(), http=http, header_timeout=MOMENT) as server,
        connect(server) as client,
        connect(server) as slow,
    ):
        client.writer.write(b"POST / HTTP/1.1\r\nhost: test\r\ntransfer-encoding: chunked\r\n\r\n")
        await client.answer()
        client.writer.write(b"5")
        for _ in range(3):  # each of them sees some looks
            await slow.rest()
            async with connect(server) as another:
                await another.rest()
        client.writer.write(b"\r\nhello\r\n0\r\n\r\n")
        client.ask("/")
        assert (await client.answer()).startswith(b"HTTP/1.1 200 ")


async def test_websockets_are_left_alone() -> None:
    """They have sent their head."""
    async with (
        serving(App(), header_timeout=MOMENT) as server,
        connect(server) as websocket,
        connect(server) as slow,
    ):
        websocket.writer.write(UPGRADE)
        await websocket.reader.readuntil(b"\r\n\r\n")
        await slow.rest()
        websocket.writer.write(b"\x81\x82\0\0\0\0hi")
        assert await websocket.reader.readexactly(4) == b"\x81\x02hi"


async def test_none_is_no_limit() -> None:
    """Then the timer of the date is the only one, and with `date_header=False` there is none."""
    async with serving(App(), header_timeout=None, date_header=False) as server, connect(server):
        while not server.stats.connections:
            await asyncio.sleep(0)
        assert timer_of(server) is None


async def test_no_timer_is_left_when_nobody_is_connected() -> None:
    """The next look finds nobody, and is the last one."""
    async with serving(App(), header_timeout=MOMENT) as server:
        async with connect(server) as client:
            await client.rest()
        while timer_of(server) is not None:
            await asyncio.sleep(MOMENT)
        assert (await get(server)).text == "hello"  # and the next one begins it again


async def test_hundreds_of_slow_clients_are_gone_and_others_are_answered_meanwhile() -> None:
    """They are closed some at a time."""
    server = await start(App(), header_timeout=0.5)
    with ExitStack() as stack:
        for _ in range(SLOW):
            client = stack.enter_context(socket.create_connection((server.host, server.port)))
            client.sendall(b"GET /")
        while server.stats.connections < SLOW:
            await asyncio.sleep(MOMENT)
        while server.stats.connections > 1:  # the last answer's own may not be gone yet
            assert (await get(server)).text == "hello"
    await server.aclose()
    assert server.report is not None
    assert not server.report.was_forced


@pytest.mark.parametrize(
    ("value", "error"),
    [(0, ValueError), (-1, ValueError), (float("nan"), ValueError), ("60", TypeError), (True, TypeError)],
)
async def test_wrong_values_are_refused(value: Any, error: type[Exception]) -> None:
    """In one sentence that names the option and the value."""
    with pytest.raises(error, match=f"header_timeout must be .*, not {value!r}"):
        await start(App(), header_timeout=value)
