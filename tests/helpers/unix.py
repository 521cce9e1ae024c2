"""
Unix sockets at a path: sockets that are stale or alive, and requests to them.
"""

from __future__ import annotations

import contextlib
import os
import socket

import httpx

from aioserve import serving
from tests.helpers.apps import App

REQUEST = b"GET / HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n"


async def answers(path: str) -> bool:
    async with httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=path)) as client:
        return (await client.get("http://test")).text == "hello"


def make_stale(path: str) -> None:
    """Leave a socket behind, as a program that is killed does."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)


def identity(path: str) -> tuple[int, int]:
    found = os.lstat(path)
    return found.st_dev, found.st_ino


def alive(path: str, stack: contextlib.ExitStack) -> None:
    sock = stack.enter_context(socket.socket(socket.AF_UNIX))
    sock.bind(path)
    sock.listen()


def connect(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.connect(path)
    except BaseException:
        sock.close()
        raise
    return sock


async def serve_once(path: str) -> None:
    async with serving(App(), uds=path):
        assert await answers(path)
