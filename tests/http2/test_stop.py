"""
A stop with HTTP/2 loses nothing: each stream is answered, or above the last one of the GOAWAY.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import ssl
from typing import Any

import pytest

from aioserve import _limits, serving, start
from tests.helpers import not_portable
from tests.helpers.http2 import (
    ANY_STREAM,
    CONTINUATION,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PING,
    PREFACE,
    StreamApp,
    connect,
    frame,
    http2_context,
    needs_http2,
)
from tests.helpers.turns import MOMENT, turns

pytestmark = [needs_http2, pytest.mark.usefixtures("quiet")]

STREAMS = 50
Tls = tuple[dict[str, Any], ssl.SSLContext]


async def test_every_stream_in_flight_is_answered_before_the_goaway() -> None:
    app = StreamApp()
    async with serving(app, http2=True) as server, connect(server) as client:
        for _ in range(STREAMS):
            client.ask("/hold")
        await app.come(STREAMS)
        server.close()
        await turns()
        assert not client.goaways
        app.release.set()
        await client.is_told()
    assert client.all_is_answered()
    assert client.goaways == [(2 * STREAMS - 1, 0)]
    assert client.order[-1] == GOAWAY
    assert client.pings
    assert server.report is not None
    assert not server.report.was_forced


async def test_every_stream_in_flight_is_answered_with_tls(tls: Tls) -> None:
    app, (options, trusting) = StreamApp(), tls
    async with serving(app, http2=True, **options) as server, connect(server, http2_context(trusting)) as client:
        for _ in range(STREAMS):
            client.ask("/hold")
        await app.come(STREAMS)
        server.close()
        app.release.set()
        await client.is_told()
    assert client.all_is_answered()
    assert client.goaways == [(2 * STREAMS - 1, 0)]


async def test_streams_that_have_arrived_and_are_unread_are_answered() -> None:
    app = StreamApp()
    async with serving(app, http2=True) as server, connect(server) as client:
        await client.answer(client.ask())
        for _ in range(STREAMS):
            client.ask()
        server.close()
        await client.is_told()
    assert client.all_is_answered()


async def test_burst_on_new_connections_is_answered() -> None:
    """Nothing of them has been accepted when the stop begins."""
    app = StreamApp()
    server = await start(app, http2=True)
    clients = [connect(server) for _ in range(10)]
    opened = [await each.__aenter__() for each in clients]
    for client in opened:
        for _ in range(10):
            client.ask()
    await server.aclose()
    for client, manager in zip(opened, clients, strict=True):
        await client.is_told()
        assert client.all_is_answered()
        await manager.__aexit__(None, None, None)


async def test_stream_that_comes_while_another_is_in_flight_is_answered() -> None:
    app = StreamApp()
    async with serving(app, http2=True) as server, connect(server) as client:
        client.ask("/hold")
        await app.come(1)
        server.close()
        await turns()
        for _ in range(3):
            assert (await client.answer(client.ask())).status == 200
        app.release.set()
        await client.is_told()
    assert client.all_is_answered()
    assert client.goaways == [(7, 0)]


async def test_stream_that_comes_behind_the_ping_is_answered() -> None:
    """It was sent before the client had read the last answer."""
    app = StreamApp()
    async with serving(app, http2=True) as server, connect(server, acknowledges=False) as client:
        client.ask("/hold")
        await app.come(1)
        server.close()
        await turns()
        app.release.set()
        await client.until(lambda: client.pings)
        last = client.ask()
        await client.is_told()
    assert client.answers[last].status == 200
    assert client.goaways == [(last, 0)]


async def test_goaway_waits_for_the_acknowledgement_of_the_ping_behind_the_last_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_limits, "HTTP2_ACKNOWLEDGEMENT", 60)
    app = StreamApp()
    async with serving(app, http2=True) as server, connect(server, acknowledges=False) as client:
        client.ask("/hold")
        await app.come(1)
        server.close()
        await turns()
        app.release.set()
        await client.until(lambda: client.pings)
        assert client.all_is_answered()
        await turns()
        assert not client.goaways
        client.send(frame(PING, 1, 0, client.pings[-1]))
        await client.is_told()


async def test_client_that_acknowledges_no_ping_gets_the_goaway_after_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_limits, "HTTP2_ACKNOWLEDGEMENT", MOMENT)
    app = StreamApp()
    async with serving(app, http2=True) as server, connect(server, acknowledges=False) as client:
        client.ask("/hold")
        await app.come(1)
        server.close()
        app.release.set()
        await client.is_told()
    assert client.all_is_answered()
    assert server.report is not None
    assert not server.report.was_forced


async def test_wrong_acknowledgement_of_a_ping_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_limits, "HTTP2_ACKNOWLEDGEMENT", 60)
    app = StreamApp()
    async with serving(app, http2=True) as server, connect(server, acknowledges=False) as client:
        client.ask("/hold")
        await app.come(1)
        server.close()
        app.release.set()
        await client.until(lambda: client.pings)
        client.send(frame(PING, 1, 0, b"another."))
        await turns()
        assert not client.goaways
        client.send(frame(PING, 1, 0, client.pings[-1]))
        await client.is_told()


async def test_idle_connection_gets_its_goaway_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_limits, "HTTP2_RECENT", 0)
    async with serving(StreamApp(), http2=True) as server, connect(server) as client:
        for _ in range(3):
            await client.answer(client.ask())
        server.close()
        await client.is_told()
    assert client.goaways == [(5, 0)]
    assert not client.pings


@not_portable.unread
async def test_connection_that_has_just_been_answered_is_asked_by_a_ping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_limits, "HTTP2_RECENT", 60)
    async with serving(StreamApp(), http2=True) as server, connect(server) as client:
        for _ in range(3):
            await client.answer(client.ask())
        server.close()
        await client.is_told()
    assert client.goaways == [(5, 0)]
    assert client.pings


@not_portable.unread
@not_portable.resets
@pytest.mark.parametrize("encrypted", [False, True])
async def test_stream_that_crosses_the_goaway_of_an_idle_connection_resets_nothing(
    encrypted: bool, tls: Tls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its client has acknowledged the last answer, and learns by the GOAWAY that it can send the request again."""
    monkeypatch.setattr(_limits, "HTTP2_RECENT", 60)
    monkeypatch.setattr(_limits, "HTTP2_LINGER", 60)
    options, context = (tls[0], http2_context(tls[1])) if encrypted else ({}, None)
    async with (
        serving(StreamApp(), http2=True, **options) as server,
        connect(server, context, acknowledges=False) as client,
    ):
        for _ in range(3):
            await client.answer(client.ask())
        server.close()
        await client.until(lambda: client.pings)
        (connection,) = server._engine.connections.state.connections
        flush = connection.flush

        def flush_and_be_crossed() -> None:
            flush()
            if connection.transport.is_closing():
                client.ask()  # it is in the kernel at once, and the socket is still open

        connection.flush = flush_and_be_crossed
        client.send(frame(PING, 1, 0, client.pings[-1]))
        await client.is_told()
    assert client.goaways == [(5, 0)]


@pytest.mark.parametrize("size", [3, 9, 12, 40])
async def test_part_of_a_head_behind_an_answer_is_waited_for(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once it is complete, it is answered."""
    monkeypatch.setattr(_limits, "HTTP2_RECENT", 0)
    app = StreamApp()
    async with serving(app, http2=True) as server, connect(server) as client:
        client.ask("/hold")
        await app.come(1)
        stream = client.request("/", {f"x-{n}": f"value {n}" for n in range(9)})
        head = client.h2.data_to_send()
        client.send_part(head, size)
        await turns()
        server.close()
        await turns()
        app.release.set()
        await client.answer(1)
        client.send_rest()
        await client.is_told()
    assert client.answers[stream].is_complete


@pytest.mark.parametrize("size", [3, 9, 12, 40])
async def test_part_of_a_head_that_is_never_completed_is_above_the_goaway(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_limits, "PARTIAL_REQUEST", MOMENT)
    app = StreamApp()
    async with serving(app, http2=True) as server, connect(server) as client:
        await client.answer(client.ask())
        client.request("/", {f"x-{n}": f"value {n}" for n in range(9)})
        client.send_part(client.h2.data_to_send(), size)
        await turns()
        server.close()
        await client.is_told()
    assert client.goaways[-1] == (1, 0)


async def test_head_in_two_frames_is_answered_when_the_second_comes() -> None:
    app = StreamApp()
    async with serving(app, http2=True) as server, connect(server) as client:
        client.ask("/hold")
        await app.come(1)
        stream = client.request("/", {"x-long": "value"})
        block = client.h2.data_to_send()[9:]
        first = frame(HEADERS, END_STREAM, stream, block[:5])
        client.send_part(first + frame(CONTINUATION, END_HEADERS, stream, block[5:]), len(first))
        await turns()
        server.close()
        await turns()
        client.send_rest()
        await app.come(2)
        app.release.set()
        await client.is_told()
    assert client.all_is_answered()


async def test_upload_in_progress_is_read_to_its_end() -> None:
    """It is longer than the window of the stream and of the connection: so the client is given credit in the stop."""
    app = StreamApp()
    length = 300_000
    async with serving(app, http2=True) as server, connect(server) as client:
        stream = client.ask("/body", method="POST", end=False)
        await app.come(1)
        client.upload(stream, bytes(1000))
        server.close()
        left = length - 1000
        while left:
            room = min(client.h2.local_flow_control_window(stream), left, 16_000)
            if not room:
                await client.until(lambda: client.h2.local_flow_control_window(stream))
                continue
            left -= room
            client.upload(stream, bytes(room), end=not left)
            await turns(1)
        await client.is_told()
    assert client.answers[stream].body == b"%d" % length


async def test_answer_before_the_end_of_an_upload_is_not_lost() -> None:
    """The handler answers without reading the body, of which the rest comes in the stop."""
    app = StreamApp()
    async with serving(app, http2=True) as server, connect(server) as client:
        stream = client.ask("/hold", method="POST", end=False)
        await app.come(1)
        client.upload(stream, bytes(1000))
        server.close()
        app.release.set()
        for _ in range(30):
            client.upload(stream, bytes(1000))
            await turns(1)
        await client.is_told()
    assert client.all_is_answered()


@pytest.mark.parametrize("moment", ["before", "in"])
async def test_answer_that_flow_control_holds_back_is_sent_when_credit_comes(moment: str) -> None:
    """Its handler has ended, before the stop or in it; and the client takes it in the stop."""
    app = StreamApp()
    path = {"before": "/big", "in": "/big-hold"}[moment]
    async with serving(app, http2=True) as server, connect(server, window=1000, gives_credit=False) as client:
        stream = client.ask(path)
        await app.come(1)
        if moment == "before":
            await client.until(lambda: len(client.answers[stream].body) == 1000)
        server.close()
        await turns()
        app.release.set()
        await client.until(lambda: len(client.answers[stream].body) == 1000)
        await turns()
        assert not client.goaways
        while not client.answers[stream].is_complete:
            before = len(client.answers[stream].body)
            client.h2.increment_flow_control_window(20_000, stream)
            client.h2.increment_flow_control_window(20_000)
            client.flush()
            answer = client.answers[stream]
            await client.until(lambda answer=answer, before=before: len(answer.body) > before or answer.is_complete)  # type: ignore[misc]
        await client.is_told()
    assert len(client.answers[stream].body) == StreamApp.BIG
    assert client.all_is_answered()


async def test_last_stream_that_is_given_up_in_the_stop_ends_the_connection() -> None:
    app = StreamApp()
    async with serving(app, http2=True) as server, connect(server) as client:
        stream = client.ask("/receive", method="POST", end=False)
        await app.come(1)
        server.close()
        await turns()
        client.give_up(stream)
        await client.is_told()
    assert "disconnected /receive" in app.events
    assert server.report is not None
    assert server.report.duration < 1


async def test_answer_that_is_held_back_and_given_up_in_the_stop_ends_the_connection() -> None:
    app = StreamApp()
    async with serving(app, http2=True) as server, connect(server, window=1000, gives_credit=False) as client:
        stream = client.ask("/big")
        await client.until(lambda: len(client.answers[stream].body) == 1000)
        server.close()
        await turns()
        client.give_up(stream)
        await client.is_told()
    assert server.report is not None
    assert server.report.duration < 1


@pytest.mark.parametrize("moment", ["before", "in"])
async def test_client_that_sends_a_goaway_gets_its_answers(moment: str) -> None:
    app = StreamApp()
    goaway = frame(GOAWAY, 0, 0, bytes(8))
    async with serving(app, http2=True) as server, connect(server) as client:
        for _ in range(5):
            client.ask("/hold")
        await app.come(5)
        if moment == "before":
            client.send(goaway)
            await turns()
        server.close()
        await turns()
        if moment == "in":
            client.send(goaway)
            await turns()
        app.release.set()
        await client.is_told()
    assert client.all_is_answered()


async def test_flood_of_pings_delays_no_stop() -> None:
    app = StreamApp()

    async def flood() -> None:
        while client.ended is None:
            client.send(frame(PING, 0, 0, b"12345678") * 20)
            await asyncio.sleep(0)

    async with serving(app, http2=True) as server, connect(server) as client:
        client.ask("/hold")
        await app.come(1)
        flooding = asyncio.create_task(flood())
        server.close()
        await turns()
        app.release.set()
        await client.is_told()
        await flooding
    assert client.all_is_answered()
    assert server.report is not None
    assert server.report.duration < 2


@pytest.mark.parametrize("size", [0, 5, len(PREFACE)])
async def test_connection_without_a_stream_gets_a_moment_for_its_first(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has sent nothing, a part of the preface, or all of it."""
    monkeypatch.setattr(_limits, "FIRST_REQUEST", MOMENT)
    monkeypatch.setattr(_limits, "PARTIAL_REQUEST", MOMENT)
    async with serving(StreamApp(), http2=True) as server, connect(server, part=size) as client:
        await turns()
        server.close()
        await client.end()
    assert client.ended == "closed"
    assert server.report is not None
    assert not server.report.was_forced
    assert server.report.duration < 1


@pytest.mark.parametrize("size", [0, 5, len(PREFACE)])
async def test_first_stream_of_a_connection_that_comes_in_the_stop_is_answered(size: int) -> None:
    async with serving(StreamApp(), http2=True) as server, connect(server, part=size) as client:
        await turns()
        server.close()
        await turns()
        client.send_rest()
        client.ask()
        await client.is_told()
    assert client.all_is_answered()


async def test_connection_of_tls_without_a_stream_gets_a_moment(tls: Tls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_limits, "FIRST_REQUEST", MOMENT)
    monkeypatch.setattr(_limits, "PARTIAL_REQUEST", MOMENT)
    options, trusting = tls
    async with serving(StreamApp(), http2=True, **options) as server:
        async with connect(server, http2_context(trusting), part=0) as client:
            server.close()
            await client.end()
    assert client.ended == "closed"
    assert server.report is not None
    assert not server.report.was_forced


async def test_first_stream_of_tls_that_comes_in_the_stop_is_answered(tls: Tls) -> None:
    options, trusting = tls
    async with serving(StreamApp(), http2=True, **options) as server:
        async with connect(server, http2_context(trusting)) as client:
            server.close()
            await turns()
            client.ask()
            await client.is_told()
    assert client.all_is_answered()


async def test_client_that_always_has_a_stream_is_told_to_open_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_limits, "HTTP2_STREAMS", 4 * MOMENT)
    app = StreamApp()
    async with serving(app, http2=True) as server, connect(server) as client:
        client.ask("/hold")
        server.close()
        while not client.goaways:
            await client.answer(client.ask())
        assert client.goaways == [(ANY_STREAM, 0)]
        await client.answer(client.ask())  # it was on its way
        app.release.set()
        await client.is_told()
    assert client.all_is_answered()
    assert len(client.goaways) == 2
    assert server.report is not None
    assert server.report.duration < 1


async def test_moment_without_a_stream_gives_no_more_time_to_a_client_that_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_limits, "HTTP2_ACKNOWLEDGEMENT", 60)
    app = StreamApp()
    async with serving(app, http2=True) as server, connect(server, acknowledges=False) as client:
        client.ask("/hold")
        await app.come(1)
        server.close()
        await turns()
        app.release.set()
        await client.until(lambda: client.pings)
        monkeypatch.setattr(_limits, "HTTP2_STREAMS", 0)  # the time is over
        app.release.clear()
        client.ask("/hold")
        await app.come(2)
        client.ask()
        await client.until(lambda: client.goaways)
        assert client.goaways == [(ANY_STREAM, 0)]
        app.release.set()
        await client.until(lambda: len(client.pings) > 1)
        client.send(frame(PING, 1, 0, client.pings[-1]))
        await client.is_told()
    assert client.all_is_answered()


async def test_handler_that_takes_long_has_its_answer_read_before_the_goaway(monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than a client gets that is never without a stream."""
    monkeypatch.setattr(_limits, "HTTP2_ACKNOWLEDGEMENT", 60)
    app = StreamApp()
    async with serving(app, http2=True) as server, connect(server, acknowledges=False) as client:
        client.ask("/hold")
        await app.come(1)
        server.close()
        await turns()
        monkeypatch.setattr(_limits, "HTTP2_STREAMS", 0)
        monkeypatch.setattr(_limits, "HTTP2_QUIET", 0)
        app.release.set()
        await client.until(lambda: client.pings)
        await turns()
        assert client.all_is_answered()
        assert not client.goaways
        client.send(frame(PING, 1, 0, client.pings[-1]))
        await client.is_told()


@pytest.mark.parametrize("acknowledges", [False, True])
async def test_client_that_opens_a_stream_with_each_acknowledgement_comes_to_an_end(
    acknowledges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one packet, or without any acknowledgement; so it is never seen to have read all."""
    monkeypatch.setattr(_limits, "HTTP2_STREAMS", MOMENT)
    app = StreamApp()
    async with serving(app, http2=True) as server, connect(server, acknowledges=False) as client:
        client.ask("/hold")
        await app.come(1)
        server.close()
        await turns()
        app.release.set()
        for count in itertools.count(1):
            await client.until(lambda count=count: len(client.pings) == count or client.goaways)  # type: ignore[misc]
            if client.goaways:
                break
            client.request()
            acknowledgement = frame(PING, 1, 0, client.pings[-1]) if acknowledges else b""
            client.send(acknowledgement + client.h2.data_to_send())
        await client.is_told()
    assert server.report is not None
    assert server.report.duration < 1


async def test_client_that_opens_streams_after_being_told_ends_by_itself_or_at_the_budget(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that opens its next stream when it has its answer, and does not care for a GOAWAY."""
    monkeypatch.setattr(_limits, "HTTP2_STREAMS", 2 * MOMENT)
    app = StreamApp()
    async with serving(app, http2=True) as server, connect(server) as client:
        server.close()
        client.ask()
        while client.ended is None:
            try:
                await client.answer(max(client.answers))
            except AssertionError:
                break
            client.ask()
        await client.is_told()
    assert server.report is not None
    assert server.report.duration < 1


async def test_event_stream_hears_of_the_stop_and_has_a_proper_end() -> None:
    app = StreamApp()
    async with serving(app, http2=True) as server, connect(server) as client:
        stream = client.ask("/events", {"accept": "text/event-stream"})
        await client.until(lambda: client.answers[stream].body)
        server.close()
        await client.is_told()
    assert client.answers[stream].is_complete
    assert client.answers[stream].body == b"data: 1\n\ndata: 2\n\n"
    assert app.events.count("disconnected /events") == 1


async def test_event_streams_and_others_on_one_connection() -> None:
    app = StreamApp()
    async with serving(app, http2=True) as server, connect(server) as client:
        stream = client.ask("/events", {"accept": "text/event-stream"})
        client.ask("/hold")
        await client.until(lambda: client.answers[stream].body)
        await app.come(2)
        server.close()
        await client.answer(stream)
        await turns()
        assert not client.goaways
        app.release.set()
        await client.is_told()
    assert client.all_is_answered()


async def test_streams_are_answered_during_the_drain_and_connections_close_behind_them() -> None:
    app = StreamApp()
    connections = 0
    async with serving(app, http2=True, drain_delay=4 * MOMENT) as server:
        server.close()
        with contextlib.suppress(ConnectionError):  # the drain is over
            while server.is_serving():
                async with connect(server) as client:
                    with contextlib.suppress(AssertionError):  # it is told to go
                        while not client.goaways:
                            await client.answer(client.ask())
                    await client.is_told()
                    assert client.answers[1].status == 200
                connections += 1
    assert connections > 1


async def test_disconnect_after_tells_the_handlers_of_all_streams() -> None:
    app = StreamApp()
    async with serving(app, http2=True, disconnect_after=0) as server, connect(server) as client:
        for _ in range(5):
            client.ask("/receive")
        await app.come(5)
        server.close()
        await client.is_told()
    assert client.all_is_answered()
    assert app.events.count("disconnected /receive") == 5


async def test_client_that_is_gone_with_streams_in_flight_holds_up_nothing() -> None:
    app = StreamApp()
    async with serving(app, http2=True) as server, connect(server) as client:
        for _ in range(5):
            client.ask("/receive")
        await app.come(5)
        server.close()
        await turns()
        client.writer.transport.abort()
    assert app.events.count("disconnected /receive") == 5
    assert server.report is not None
    assert server.report.duration < 1


async def test_client_that_closes_its_writing_half_gets_its_answers() -> None:
    app = StreamApp()
    async with serving(app, http2=True) as server, connect(server) as client:
        client.ask("/hold")
        await app.come(1)
        server.close()
        await turns()
        client.writer.write_eof()
        await turns()
        app.release.set()
        await client.end()
    assert client.ended == "closed"


async def test_connections_of_both_versions_stop_together() -> None:
    app = StreamApp()
    async with serving(app, http2=True) as server, connect(server) as client:
        reader, writer = await asyncio.open_connection(server.host, server.port)
        writer.write(b"GET /hold HTTP/1.1\r\nhost: test\r\n\r\n")
        client.ask("/hold")
        await app.come(2)
        server.close()
        app.release.set()
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
        await client.is_told()
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"connection: close" in answer
    assert client.all_is_answered()
