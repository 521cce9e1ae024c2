"""
Clients: httpx for what a client normally does, and bare streams for what it should not.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx

from aioserve import Server
from tests.turns import turns

REQUEST = b"GET %s HTTP/1.1\r\nhost: test\r\n\r\n"


async def get(server: Server, path: str = "/") -> httpx.Response:
    """One request on a connection of its own."""
    # Without TLS there is nothing to verify, and loading the certificates takes longer than all the rest.
    async with httpx.AsyncClient(base_url=server.url, trust_env=False, verify=False) as client:  # noqa: S501
        return await client.get(path)


class Connection:
    """A bare connection, which stays open until the server closes it or the test ends."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def ask(self, path: str) -> None:
        """Send a request, and do not wait."""
        self.writer.write(REQUEST % path.encode())

    async def answer(self) -> bytes:
        """The head and the body "hello" of one response."""
        return await self.reader.readuntil(b"hello")

    async def rest(self) -> bytes:
        """All that comes until the server closes the connection."""
        return await self.reader.read()


@asynccontextmanager
async def connect(server: Server) -> AsyncIterator[Connection]:
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
