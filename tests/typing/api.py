"""
User code that mypy has to accept; it is not run.
"""

from __future__ import annotations

import signal
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Unpack, assert_type

import anyio
import httpx
import httpx2
import uvicorn
from fastapi import FastAPI
from starlette.applications import Starlette

from aioserve import (
    App,
    Options,
    Report,
    Server,
    ServerProcess,
    Stats,
    ThreadServer,
    serve,
    serving,
    serving_process,
    start,
    start_in_thread,
    testing,
)


async def plain_app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Be an app without a framework."""


async def ways_to_start() -> None:
    """Take every kind of app, by every way to start."""
    async with serving(FastAPI(), host=["127.0.0.1", "::1"], port=0, shutdown_timeout=None) as server:
        assert_type(server, Server)
    async with serving(FastAPI(), stop_on_signals=[signal.SIGTERM]):
        pass
    async with await start(Starlette(), lifespan="on", startup_timeout=1) as started:
        assert_type(started, Server)
    await serve(plain_app, access_log=False)
    await serve("package.module:app", factory=True)
    await serve(uvicorn.Config(plain_app), shutdown_timeout=0.5)
    async with anyio.create_task_group() as task_group:
        in_group: Server = await task_group.start(partial(serve, FastAPI(), port=8000))
        assert_type(in_group.url, str)


async def members(server: Server) -> None:
    """Use every member of a server."""
    assert_type(server.url, str)
    assert_type(server.urls, list[str])
    assert_type(server.host, str)
    assert_type(server.port, int)
    assert_type(server.sockets, tuple[socket.socket, ...])
    assert_type(server.state, dict[str, Any])
    assert_type(server.stats, Stats)
    assert_type(server.stats.served, int)
    assert_type(server.uvicorn, uvicorn.Server)
    assert_type(server.is_serving(), bool)
    await server.stopping.wait()
    server.close(timeout=1.5)
    await server.wait_closed()
    await server.aclose()


async def process() -> None:
    """Serve in a child process."""
    async with serving_process("package.module:app", port=8000, stop_on_signals=True) as server:
        assert_type(server, ServerProcess)
        assert_type(server.url, str)
        assert_type(server.port, int)
        assert_type(server.pid, int)
        assert_type(server.returncode, int | None)
        assert_type(server.report, Report | None)
        server.close(timeout=1)
        await server.wait_closed()


def in_thread() -> None:
    """Serve in a thread, in a block and without one."""
    with start_in_thread(FastAPI(), port=8000, startup_timeout=None) as server:
        assert_type(server, ThreadServer)
        assert_type(server.url, str)
        assert_type(server.urls, list[str])
        assert_type(server.host, str)
        assert_type(server.port, int)
        assert_type(server.state, dict[str, Any])
        assert_type(server.stats, Stats)
        assert_type(server.report, Report | None)
        assert_type(server.is_serving(), bool)
        server.close(timeout=1.5)
        assert_type(server.wait_closed(timeout=1), bool)
    start_in_thread("package.module:app", factory=True).stop(timeout=0)
    start_in_thread(FastAPI(), prot=8000)  # type: ignore[call-arg]
    start_in_thread(FastAPI(), port="8000")  # type: ignore[arg-type]


@asynccontextmanager
async def my_serving(app: App, **options: Unpack[Options]) -> AsyncIterator[str]:
    """Wrap `serving()`, and keep the types of its options."""
    async with serving(app, **options) as server:
        yield server.url


async def blocks_for_tests(server: Server) -> None:
    """Use the context managers for tests."""
    async with testing.server(FastAPI(), root_path="/api") as running, testing.client(running) as client:
        assert_type(running, Server)
        assert_type(client, httpx2.AsyncClient)
    with testing.live_server(plain_app, ssl=testing.tls().server) as live, testing.assert_nothing_left():
        assert_type(live, Server)
    async with testing.client(running, client_class=httpx.AsyncClient, raise_app_exceptions=False) as other:
        assert_type(other, httpx.AsyncClient)
    async with testing.client(plain_app, timeout=1), testing.assert_nothing_left(thread_pools=True):
        assert_type(testing.tls().client, ssl.SSLContext)


async def fixtures_for_tests(
    aioserve_server: testing.ServerFactory,
    aioserve_client: testing.ClientFactory,
    aioserve_live_server: testing.LiveServerFactory,
    aioserve_tls: testing.TLS,
) -> None:
    """Use the fixtures."""
    assert_type(await aioserve_server(FastAPI(), ssl=aioserve_tls.server), Server)
    assert_type(await aioserve_client("package.module:app", headers={"x": "y"}), httpx2.AsyncClient)
    assert_type(await aioserve_client(plain_app, client_class=httpx.AsyncClient), httpx.AsyncClient)
    await aioserve_client(plain_app, raise_app_exceptions="no")  # type: ignore[call-overload]
    assert_type(aioserve_live_server(uvicorn.Config(plain_app)), Server)
    await aioserve_server(FastAPI(), prot=8000)  # type: ignore[call-arg]
    aioserve_live_server(FastAPI(), port="8000")  # type: ignore[arg-type]


async def mistakes() -> None:
    """Make mistakes that mypy has to find; an ignore that is not needed is an error itself."""
    async with serving(FastAPI(), prot=8000):  # type: ignore[call-arg]
        pass
    async with serving(FastAPI(), port="8000"):  # type: ignore[arg-type]
        pass
    async with serving(FastAPI(), lifespan="of"):  # type: ignore[arg-type]
        pass
    async with serving(FastAPI(), workers=2):  # type: ignore[call-arg]
        pass
    async with serving(FastAPI(), stop_on_signals="SIGTERM"):  # type: ignore[arg-type]
        pass
    async with serving_process(FastAPI()):  # type: ignore[arg-type]
        pass
    await start(None)  # type: ignore[arg-type]
    with serving(FastAPI()):  # type: ignore[attr-defined]
        pass
    await serving(FastAPI())  # type: ignore[misc]
    with serving_process("package.module:app"):  # type: ignore[attr-defined]
        pass
