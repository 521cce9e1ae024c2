"""
Clients of HTTP/2 that are slow, that vanish, or that are early.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from functools import partial
from typing import Any

import pytest

from aioserve import _limits, serving, start
from tests.helpers.apps import App
from tests.helpers.clients import connect_tls
from tests.helpers.http2 import ACK, GOAWAY, HEADERS, PING, Frames, connect, frame, http2_context, needs_http2
from tests.helpers.threads import in_thread
from tests.helpers.turns import MOMENT, turns
from tests.server.test_vanished_clients import FEW, Cleaning, nothing_is_logged

pytestmark = needs_http2

HALF_A_HEAD = frame(HEADERS, 0, 3, b"\x82")  # without END_HEADERS


async def test_client_that_sends_nothing_is_closed() -> None:
    """Without a word: it may speak HTTP/1."""
    async with serving(App(), http2=True, header_timeout=MOMENT) as server:
        async with connect(server, part=0) as client:
            await client.end()
            assert client.order == []


async def test_client_that_sends_a_part_of_the_preface_is_closed() -> None:
    """Likewise."""
    async with serving(App(), http2=True, header_timeout=MOMENT) as server:
        async with connect(server, part=10) as client:
            await client.end()
            assert client.order == []


async def test_client_that_opens_no_stream_is_told_to_go() -> None:
    """It has said that it speaks HTTP/2."""
    async with serving(App(), http2=True, header_timeout=MOMENT) as server, connect(server) as client:
        await client.is_told()
        assert client.goaways == [(0, 0)]


async def test_client_over_tls_that_opens_no_stream_is_told_to_go(tls: Any) -> None:
    """The same, where ALPN has said so."""
    options, context = tls
    async with serving(App(), http2=True, header_timeout=MOMENT, **options) as server:
        async with connect_tls(server, http2_context(context)) as client:
            assert (await client.rest()).endswith(frame(GOAWAY, 0, 0, bytes(8)))


async def test_client_that_never_completes_a_head_is_told_to_go() -> None:
    """Also if it sends something now and then, which puts off uvicorn's `timeout_keep_alive`."""
    async with serving(App(), http2=True, header_timeout=0.2, timeout_keep_alive=1000) as server:
        async with connect(server) as client:
            await client.answer(client.ask())
            await asyncio.sleep(0.4)  # two looks have seen it idle
            client.send(HALF_A_HEAD[:9])
            await client.is_told()
            assert client.goaways == [(1, 0)]


async def test_client_whose_bytes_are_not_read_yet_is_closed_as_well() -> None:
    """They have arrived, and its connection has not read them."""
    async with serving(App(), http2=True, header_timeout=0.2, timeout_keep_alive=1000) as server:
        async with connect(server) as client:
            await client.answer(client.ask())
            await asyncio.sleep(0.4)  # two looks have seen it idle
            connection: Any = next(iter(server.uvicorn.server_state.connections))
            timer = connection.timeout_keep_alive_task
            client.send(HALF_A_HEAD[:9])
            while connection.timeout_keep_alive_task is timer:
                await asyncio.sleep(0)
            connection.transport.pause_reading()
            client.send(HALF_A_HEAD[9:])
            while server.stats.connections:
                await asyncio.sleep(MOMENT)


async def test_idle_client_is_left_to_the_keep_alive_timeout() -> None:
    """It has sent nothing since its last answer."""
    async with serving(App(), http2=True, header_timeout=MOMENT, timeout_keep_alive=1000) as server:
        async with connect(server) as idle, connect(server) as slow:
            await idle.answer(idle.ask())
            await slow.is_told()
            for _ in range(3):
                async with connect(server) as slow:
                    await slow.is_told()
            assert (await idle.answer(idle.ask())).status == 200


async def test_slow_handlers_are_left_alone() -> None:
    """Their connection has no head to send."""
    app = App()
    async with serving(app, http2=True, header_timeout=MOMENT) as server, connect(server) as client:
        stream = client.ask("/hold")
        for _ in range(3):
            async with connect(server) as slow:
                await slow.is_told()
        app.release.set()
        assert (await client.answer(stream)).status == 200


async def test_handler_of_a_stream_that_is_reset_is_cancelled(caplog: pytest.LogCaptureFixture) -> None:
    """And only that one."""
    app = Cleaning()
    app.may_end.set()
    async with serving(app, http2=True, cancel_on_disconnect=True) as server, connect(server) as client:
        held, reset = client.ask("/hold"), client.ask("/hold")
        while app.events.count("GET /hold") < 2:
            await asyncio.sleep(0)
        client.give_up(reset)
        await app.cancelled.wait()
        await turns(FEW)
        assert app.events.count("cancelled /hold") == 1
        app.release.set()
        assert (await client.answer(held)).status == 200
    assert nothing_is_logged(caplog)


async def test_handlers_of_a_connection_that_is_lost_are_cancelled(caplog: pytest.LogCaptureFixture) -> None:
    """All of them; and a stop awaits their clean-up."""
    app = Cleaning()
    server = await start(app, http2=True, cancel_on_disconnect=True)
    async with connect(server) as client:
        for _ in range(5):
            client.ask("/hold")
        while app.events.count("GET /hold") < 5:
            await asyncio.sleep(0)
    await app.cancelled.wait()
    closing = asyncio.create_task(server.aclose())
    await turns(FEW)
    assert not closing.done()
    app.may_end.set()
    await closing
    assert app.events.count("cleaned up") == 5
    assert nothing_is_logged(caplog)


async def test_handler_runs_on_by_default() -> None:
    """As in uvicorn."""
    app = App()
    async with serving(app, http2=True) as server, connect(server) as client:
        stream = client.ask("/hold")
        await app.holding.wait()
        client.give_up(stream)
        assert (await client.answer(client.ask())).status == 200
        app.release.set()
    assert "answered /hold" in app.events


async def test_handler_that_breaks_its_response_off_is_not_cancelled(caplog: pytest.LogCaptureFixture) -> None:
    """uvicorn resets its stream, and it is not the client that has gone."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
        except asyncio.CancelledError:
            cancelled.append(1)

    cancelled: list[int] = []
    async with serving(app, lifespan="off", http2=True, cancel_on_disconnect=True) as server:
        async with connect(server) as client:
            answer = await client.answer(client.ask())
            assert answer.error_code is not None
    assert cancelled == []
    assert [each.message for each in caplog.records if each.levelno >= logging.WARNING] == [
        "ASGI callable returned without completing response."
    ]


@pytest.fixture
def early(tls: Any) -> tuple[dict[str, Any], ssl.SSLContext]:
    options, context = tls
    return options, http2_context(context)


async def test_request_that_comes_with_the_end_of_the_handshake_is_answered(early: Any) -> None:
    """In one packet: the protocol that decides has been replaced by then."""
    options, context = early

    def talk(port: int) -> Frames:
        client = Frames()
        client.h2.initiate_connection()
        client.request()
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        connection = context.wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
        with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:

            def exchange(act: Any) -> Any:
                while True:
                    try:
                        return act()
                    except ssl.SSLWantReadError:
                        sock.sendall(outgoing.read())
                        incoming.write(sock.recv(65536))

            exchange(connection.do_handshake)
            connection.write(client.h2.data_to_send())
            sock.sendall(outgoing.read())
            while not client.all_is_answered():
                client.receive(exchange(lambda: connection.read(65536)))
        return client

    async with serving(App(), http2=True, **options) as server:
        for _ in range(3):
            assert (await in_thread(partial(talk, server.port))).answers[1].body == b"hello"
        while server.stats.connections:
            await asyncio.sleep(0)


async def test_stream_that_is_opened_behind_the_acknowledgement_can_be_sent_again() -> None:
    """It comes in one packet with it; the GOAWAY says that it was not taken."""
    app = App()
    async with serving(app, http2=True) as server, connect(server, acknowledges=False) as client:
        client.ask("/hold")
        await app.holding.wait()
        server.close()
        app.release.set()
        await client.until(lambda: client.pings)
        client.request()
        client.send(frame(PING, ACK, 0, client.pings[-1]) + client.h2.data_to_send())
        await client.is_told()
    assert client.goaways == [(1, 0)]
    assert app.events.count("GET /") == 0


async def test_client_that_has_read_all_and_does_not_close_is_not_waited_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """httpx keeps its connection until the next request."""
    monkeypatch.setattr(_limits, "LINGER", 1000.0)
    monkeypatch.setattr(_limits, "LINGER_LONGEST", 1000.0)
    app = App()
    async with serving(app, http2=True, shutdown_timeout=None) as server, connect(server) as client:
        client.ask("/hold")
        await app.holding.wait()
        server.close()
        app.release.set()
        await client.is_told()
        await server.wait_closed()
