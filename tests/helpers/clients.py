"""
Clients: httpx for usual requests, and streams or sockets for everything else.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from urllib.parse import unquote

import httpx
from uvicorn.config import HTTP_PROTOCOLS

from aioserve import Server
from tests.helpers.turns import turns

REQUEST = b"GET %s HTTP/1.1\r\nhost: test\r\n\r\n"

UPGRADE = (
    b"GET / HTTP/1.1\r\nhost: test\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
    b"sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)

# The HTTP implementations of the installed uvicorn that support pipelined requests.
PIPELINING = [name for name in ("h11", "httptools") if name in HTTP_PROTOCOLS]

# How many connections a burst has.
BURST = 50


async def get(server: Server, path: str = "/") -> httpx.Response:
    """Send one request on a connection of its own."""
    # Without TLS there is nothing to verify, and loading the certificates takes longer than all the rest.
    async with httpx.AsyncClient(base_url=server.url, trust_env=False, verify=False) as client:  # noqa: S501
        return await client.get(path)


class Connection:
    """A connection that stays open until the server closes it or the test ends."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def ask(self, path: str) -> None:
        """Send a request, and do not wait for its answer."""
        self.writer.write(REQUEST % path.encode())

    async def answer(self) -> bytes:
        """Return the head and the body "hello" of one response."""
        return await self.reader.readuntil(b"hello")

    async def rest(self) -> bytes:
        """Return everything until the server closes the connection."""
        return await self.reader.read()


@asynccontextmanager
async def connect(server: Server) -> AsyncIterator[Connection]:
    if "+unix:" in server.url:
        reader, writer = await asyncio.open_unix_connection(unquote(server.url.partition("://")[2]))
    else:
        reader, writer = await asyncio.open_connection(server.host, server.port)
    try:
        yield Connection(reader, writer)
    finally:
        writer.close()
        try:
            await writer.wait_closed()
        except ConnectionError:
            pass


@asynccontextmanager
async def connect_tls(server: Server, context: ssl.SSLContext) -> AsyncIterator[Connection]:
    reader, writer = await asyncio.open_connection(server.host, server.port, ssl=context)
    try:
        yield Connection(reader, writer)
    finally:
        writer.transport.abort()
        await turns(5)


@contextlib.contextmanager
def burst(server: Server, count: int = BURST) -> Iterator[list[socket.socket]]:
    """Send requests on new connections within one turn of the loop, as clients in another process can."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection((server.host, server.port))) for _ in range(count)]
        for client in clients:
            client.sendall(REQUEST % b"/")
        yield clients


def count_answers(clients: list[socket.socket]) -> int:
    """Count the clients that were answered; the server must have closed."""
    count = 0
    for client in clients:
        client.settimeout(10)
        received = b""
        while chunk := client.recv(1000):
            received += chunk
        count += received.startswith(b"HTTP/1.1 200") and b"connection: close" in received
    return count
