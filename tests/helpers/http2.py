"""
A raw client of HTTP/2, which shows each frame: with the h2 library, and GOAWAYs and PINGs beside it.

(To h2, a connection is over with the first GOAWAY, and it acknowledges each PING.)
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import Any
from urllib.parse import unquote

import pytest
import uvicorn
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, RequestReceived, ResponseReceived, StreamEnded, StreamReset
from h2.settings import SettingCodes, Settings

from aioserve import Server
from tests.helpers.apps import App, Receive, Scope, Send

try:
    import zttp
except ModuleNotFoundError:  # pragma: no cover
    zttp = None  # type: ignore[assignment]

HAS_HTTP2 = "http2" in uvicorn.Config.__init__.__code__.co_varnames and zttp is not None
needs_http2 = pytest.mark.skipif(not HAS_HTTP2, reason="HTTP/2 needs a uvicorn with the option http2, and zttp")

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
ACK = END_STREAM = 1
END_HEADERS = 4
ANY_STREAM = 2**31 - 1
NONE: Mapping[str, str] = MappingProxyType({})


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Make a frame (RFC 9113, 4.1)."""
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


class Answer:
    """What has come on one stream."""

    def __init__(self) -> None:
        self.status: int | None = None
        self.body = b""
        self.is_complete = False
        self.error_code: int | None = None
        """That of a RST_STREAM from the server."""

    @property
    def is_over(self) -> bool:
        return self.is_complete or self.error_code is not None


class Frames:
    """One side of a connection, without any input or output: the client's."""

    def __init__(self, *, acknowledges: bool = True, gives_credit: bool = True) -> None:
        self.acknowledges = acknowledges
        self.gives_credit = gives_credit
        self.h2 = H2Connection(H2Configuration(client_side=True, header_encoding=None, validate_inbound_headers=False))
        self.answers: dict[int, Answer] = {}
        self.given_up: set[int] = set()
        self.order: list[int] = []
        """The kinds of the frames that have come."""
        self.pings: list[bytes] = []
        self.pongs: list[bytes] = []
        self.goaways: list[tuple[int, int]] = []
        """The last stream and the error code of each."""
        self._buffer = b""

    def request(
        self,
        path: str = "/",
        headers: Mapping[str, str] = MappingProxyType({}),
        *,
        end: bool = True,
        method: str = "GET",
    ) -> int:
        """Begin a stream, and return its number."""
        stream: int = self.h2.get_next_available_stream_id()
        pairs = [(":method", method), (":path", path), (":scheme", "http"), (":authority", "test"), *headers.items()]
        self.h2.send_headers(stream, pairs, end_stream=end)
        self.answers[stream] = Answer()
        return stream

    def receive(self, data: bytes) -> None:
        self._buffer += data
        for kind, flags, payload, whole in self._split():
            self.order.append(kind)
            if kind == GOAWAY:
                last = int.from_bytes(payload[:4], "big") & ANY_STREAM
                self.goaways.append((last, int.from_bytes(payload[4:8], "big")))
            elif kind == PING and flags & ACK:
                self.pongs.append(payload)
            elif kind == PING:
                self.pings.append(payload)
                if self.acknowledges:
                    self.h2.receive_data(whole)
            else:
                self._handle(self.h2.receive_data(whole))

    def _split(self) -> Iterator[tuple[int, int, bytes, bytes]]:
        while len(self._buffer) >= 9:
            end = 9 + int.from_bytes(self._buffer[:3], "big")
            if len(self._buffer) < end:
                return
            whole, self._buffer = self._buffer[:end], self._buffer[end:]
            yield whole[3], whole[4], whole[9:], whole

    def _handle(self, events: list[Any]) -> None:
        for event in events:
            assert not isinstance(event, RequestReceived)
            if isinstance(event, ResponseReceived):
                self.answers[event.stream_id].status = int(dict(event.headers)[b":status"])
            elif isinstance(event, DataReceived):
                self.answers[event.stream_id].body += event.data
                if self.gives_credit and event.flow_controlled_length:
                    self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            elif isinstance(event, StreamEnded):
                self.answers[event.stream_id].is_complete = True
            elif isinstance(event, StreamReset):
                self.answers[event.stream_id].error_code = int(event.error_code)

    def all_is_answered(self) -> bool:
        return all(each.is_complete for each in self.answers.values())


class Client(Frames):
    """A connection whose frames are read in a task of its own, until it is closed or held."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, **options: bool) -> None:
        super().__init__(**options)
        self.reader = reader
        self.writer = writer
        self.ended: str | None = None
        """How the server has closed the connection: "closed", or "reset"."""
        self.reads = asyncio.Event()
        """It reads only while this is set."""
        self.reads.set()
        self._changed = asyncio.Event()
        self._rest: bytes | None = None

    def ask(
        self,
        path: str = "/",
        headers: Mapping[str, str] = MappingProxyType({}),
        *,
        end: bool = True,
        method: str = "GET",
    ) -> int:
        """Send the head of a request, and do not wait for its answer."""
        stream = self.request(path, headers, end=end, method=method)
        self.flush()
        return stream

    def upload(self, stream: int, data: bytes, *, end: bool = False) -> None:
        self.h2.send_data(stream, data, end_stream=end)
        self.flush()

    def give_up(self, stream: int) -> None:
        self.given_up.add(stream)
        self.h2.reset_stream(stream, 8)  # CANCEL
        self.flush()

    def flush(self) -> None:
        if self._rest is None and not self.writer.is_closing():
            self.writer.write(self.h2.data_to_send())

    def send_part(self, data: bytes, size: int) -> None:
        """Send the first bytes of a frame; nothing else can be sent before `send_rest()`."""
        self._rest = data[size:]
        self.writer.write(data[:size])

    def send_rest(self) -> None:
        """Send the rest of it, and what has been held back."""
        assert self._rest is not None
        self.writer.write(self._rest)
        self._rest = None
        self.flush()

    def send(self, data: bytes) -> None:
        """Send frames, or parts of them, as they are."""
        self.writer.write(data)

    async def read(self) -> None:
        try:
            while True:
                await self.reads.wait()
                data = await self.reader.read(65536)
                if not data:
                    break
                self.receive(data)
                self.flush()
                self._changed.set()
            self.ended = "closed"
        except ConnectionError:
            self.ended = "reset"
        self._changed.set()

    async def until(self, is_so: Callable[[], object]) -> None:
        """Wait for something that the server sends."""
        while not is_so():
            assert self.ended is None, f"the connection was {self.ended}"
            self._changed.clear()
            await self._changed.wait()

    async def answer(self, stream: int) -> Answer:
        await self.until(lambda: self.answers[stream].is_over)
        return self.answers[stream]

    async def end(self) -> None:
        """Wait until the server has closed the connection."""
        while self.ended is None:
            self._changed.clear()
            await self._changed.wait()

    async def is_told(self) -> None:
        """
        Wait for the end of a connection, and check that its client knows of each stream what has become of it.

        Each one up to the GOAWAY's last stream is answered, and not with 503; each one above it is not.
        """
        await self.end()
        assert self.ended == "closed"
        assert self.goaways, "no GOAWAY"
        last, code = self.goaways[-1]
        assert code == 0
        assert [each.status for each in self.answers.values()].count(503) == 0
        for stream, answer in self.answers.items():
            if stream <= last:
                assert answer.is_over or stream in self.given_up, f"{stream} has no answer, and the last is {last}"
            else:
                assert answer.status is None, f"{stream} has an answer, and the last is {last}"


@asynccontextmanager
async def connect(
    server: Server, context: ssl.SSLContext | None = None, *, part: int | None = None, window: int = 0, **options: bool
) -> AsyncIterator[Client]:
    """Connect, and send the preface, or a part of it; with `window`, let each answer begin with so many bytes."""
    if "+unix:" in server.url:
        reader, writer = await asyncio.open_unix_connection(unquote(server.url.partition("://")[2]))
    else:
        reader, writer = await asyncio.open_connection(server.host, server.port, ssl=context)
    client = Client(reader, writer, **options)
    if window:
        client.h2.local_settings = Settings(initial_values={SettingCodes.INITIAL_WINDOW_SIZE: window})
    client.h2.initiate_connection()
    if part is None:
        client.flush()
    else:
        client.send_part(client.h2.data_to_send(), part)
    reading = asyncio.create_task(client.read())
    try:
        yield client
    finally:
        reading.cancel()
        writer.transport.abort()
        with contextlib.suppress(asyncio.CancelledError):
            await reading
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def http2_context(trusting: ssl.SSLContext) -> ssl.SSLContext:
    """Let a client's context offer HTTP/2."""
    trusting.set_alpn_protocols(["h2", "http/1.1"])
    return trusting


class StreamApp(App):
    """An app with more paths: "/body" tells how long a body is, "/big" sends one of 200 kB, "/raise" and "/never"."""

    BIG = 200_000

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        """The requests that have come."""
        self.scopes: list[Scope] = []
        self._come = asyncio.Event()

    async def come(self, count: int) -> None:
        """Wait until so many requests have come."""
        while self.count < count:
            self._come.clear()
            await self._come.wait()

    async def request(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        self.count += 1
        self._come.set()
        body = b"hello"
        match scope["path"]:
            case "/body":
                length, more = 0, True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        self.events.append("disconnected /body")
                        return
                    length, more = length + len(message["body"]), message["more_body"]
                body = b"%d" % length
            case "/big":
                body = bytes(self.BIG)
            case "/big-hold":
                await self.release.wait()
                body = bytes(self.BIG)
            case "/raise":
                await self.release.wait()
                raise ZeroDivisionError
            case "/events":
                await self.follow(receive, send)
                return
            case "/receive":
                while (await receive())["type"] != "http.disconnect":
                    pass
                self.events.append("disconnected /receive")
            case _:
                await super().request(scope, receive, send)
                return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    async def follow(self, receive: Receive, send: Send) -> None:
        """Send one event, and another one when the client has gone."""
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass
        self.events.append("disconnected /events")
        await send({"type": "http.response.body", "body": b"data: 2\n\n", "more_body": True})
