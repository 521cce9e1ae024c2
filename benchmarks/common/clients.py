"""
Clients that cost little: bare sockets, and no loop of their own.
"""

from __future__ import annotations

import base64
import select
import socket
import time
from collections.abc import Sequence

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import StreamEnded

from common.peers import HOST

GET = b"GET / HTTP/1.1\r\nhost: benchmark\r\n\r\n"
GET_ONCE = b"GET / HTTP/1.1\r\nhost: benchmark\r\nconnection: close\r\n\r\n"
STREAM = b"GET /stream HTTP/1.1\r\nhost: benchmark\r\naccept: text/event-stream\r\n\r\n"
HALF = b"GET / HTTP/1.1\r\nhost: bench"
WEBSOCKET = (
    b"GET /ws HTTP/1.1\r\nhost: benchmark\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n"
    b"sec-websocket-key: " + base64.b64encode(b"0123456789abcdef") + b"\r\n\r\n"
)


def connect(port: int) -> socket.socket:
    """Connect, with some patience: not all who say that they have started accept already."""
    deadline = time.monotonic() + 5
    while True:
        try:
            connected = socket.create_connection((HOST, port), timeout=5)
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.001)
        else:
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return connected


def ask(connected: socket.socket, request: bytes, until: bytes = b"hello") -> None:
    """Send a request, and read until that is there."""
    connected.sendall(request)
    received = b""
    while until not in received:
        data = connected.recv(65536)
        if not data:
            raise ConnectionError(f"closed after {received!r}")
        received += data


class Http2:
    """A connection on which one request is made after the other, in clear text."""

    def __init__(self, port: int) -> None:
        self.socket = connect(port)
        self._state = H2Connection(H2Configuration(header_encoding=None))
        self._state.initiate_connection()

    def ask(self) -> None:
        """Send a request, and read all of its answer."""
        stream = self._state.get_next_available_stream_id()
        head = {":method": "GET", ":path": "/", ":scheme": "http", ":authority": "benchmark"}
        self._state.send_headers(stream, list(head.items()), end_stream=True)
        self.socket.sendall(self._state.data_to_send())
        while not any(isinstance(event, StreamEnded) for event in self._state.receive_data(self._read())):
            pass
        self.socket.sendall(self._state.data_to_send())

    def _read(self) -> bytes:
        if not (data := self.socket.recv(65536)):
            raise ConnectionError("closed instead of answered")
        return data


def open_clients(port: int, kind: str, count: int) -> list[socket.socket]:
    """
    Open connections: "idle" ones, which have had an answer each, or "http2", the same with that.

    Or a "websocket", a "stream", or those that have sent "half" of a head.
    """
    clients = []
    for _ in range(count):
        if kind == "http2":
            (connection := Http2(port)).ask()
            clients.append(connection.socket)
            continue
        clients.append(client := connect(port))
        if kind == "websocket":
            ask(client, WEBSOCKET, b"\r\n\r\n")
        elif kind == "half":
            client.sendall(HALF)
        else:
            ask(client, STREAM if kind == "stream" else GET)
    return clients


def close_as_told(client: socket.socket, patience: float) -> None:
    """Do what a WebSocket client does: answer a close with a close, and hang up when the server does."""
    client.settimeout(patience)
    try:
        while data := client.recv(65536):
            if data[0] & 0x0F == 8:
                client.sendall(bytes([0x88, 0x82, 0, 0, 0, 0]) + data[2:4])
    except OSError:
        pass  # it was reset, or the server has not cared in that time
    client.close()


def still_open(clients: Sequence[socket.socket], patience: float = 0.5) -> int:
    """Return how many have not been closed by their server, after that time at the latest."""
    poll = select.poll()
    left = {client.fileno(): client for client in clients if client.fileno() >= 0}
    for descriptor, client in left.items():
        client.setblocking(False)
        poll.register(descriptor, select.POLLIN)
    deadline = time.monotonic() + patience
    while left and (wait := deadline - time.monotonic()) > 0:
        for descriptor, _ in poll.poll(wait * 1000):
            try:
                data = left[descriptor].recv(65536)
            except OSError:
                data = b""
            if not data:
                poll.unregister(descriptor)
                del left[descriptor]
    return len(left)


def hang_up(clients: Sequence[socket.socket]) -> None:
    for client in clients:
        client.close()


def ask_on(kept_alive: Sequence[socket.socket], count: int) -> float:
    """Make so many requests on these connections, one at a time on each; return how many that were in a second."""
    poll = select.poll()
    by_descriptor = {client.fileno(): client for client in kept_alive}
    made = done = 0
    before = time.perf_counter()
    for client in kept_alive:
        poll.register(client, select.POLLIN)
        client.send(GET)
        made += 1
    while done < count:
        for descriptor, _ in poll.poll():
            client = by_descriptor[descriptor]
            data = client.recv(65536)
            if not data:
                raise ConnectionError("closed instead of answered")
            if data.endswith(b"hello"):  # else it was the head
                done += 1
                if made < count:
                    client.send(GET)
                    made += 1
    return count / (time.perf_counter() - before)


def fetch(port: int, count: int, at_once: int = 16) -> float:
    """Make so many requests, each on a connection of its own; return how many that were in a second."""
    poll = select.poll()
    open_ones: dict[int, socket.socket] = {}
    made = done = 0
    before = time.perf_counter()
    while done < count:
        while made < count and len(open_ones) < at_once:
            client = socket.socket()
            client.connect((HOST, port))
            client.send(GET_ONCE)
            poll.register(client, select.POLLIN)
            open_ones[client.fileno()] = client
            made += 1
        for descriptor, _ in poll.poll():
            if not open_ones[descriptor].recv(65536):
                poll.unregister(descriptor)
                open_ones.pop(descriptor).close()
                done += 1
    return count / (time.perf_counter() - before)
