"""
What tests of `serving_process()` need: an app, requests, and a look at ports and children.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from aioserve import (
    ServerProcess,
)

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="the tests read /proc")

TALKING = "tests.helpers.children:talking"


async def get(server: ServerProcess, path: str = "/") -> httpx.Response:
    async with httpx.AsyncClient(base_url=server.url, trust_env=False, verify=False) as client:  # noqa: S501
        return await client.get(path)


@contextlib.asynccontextmanager
async def asking(server: ServerProcess, path: str) -> AsyncIterator[asyncio.StreamReader]:
    reader, writer = await asyncio.open_connection(server.host, server.port)
    writer.write(f"GET {path} HTTP/1.1\r\nhost: test\r\n\r\n".encode())
    try:
        yield reader
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def is_free(port: int) -> bool:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def children() -> list[int]:
    return [int(each) for each in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
