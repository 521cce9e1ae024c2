"""
The MCP SDK's server over streamable HTTP, with its own client: with sessions (legacy), and without.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx2
import pytest
from mcp import Client, MCPError
from mcp.client.streamable_http import streamable_http_client
from mcp.client.subscriptions import SubscriptionLost, ToolsListChanged
from mcp.server.mcpserver import Context, MCPServer

from aioserve import Server, StartupError, serving
from tests.integration.frameworks import Play, end_sse_starlettes_watcher

MODES = ["legacy", "auto"]


@pytest.fixture(autouse=True)
async def sse_starlettes_watcher_ends(nothing_is_left_in_the_loop: None) -> AsyncIterator[None]:
    yield
    await end_sse_starlettes_watcher()


def make(play: Play) -> MCPServer:
    mcp = MCPServer("for tests")

    @mcp.tool()
    async def add(a: int, b: int) -> int:
        """Add two numbers."""
        return a + b

    @mcp.tool()
    async def work(ctx: Context) -> str:
        """Report progress, wait until the test lets it go, report more."""
        await ctx.report_progress(1, 2, "begun")
        try:
            await play.hold()
        except asyncio.CancelledError:
            play.note("cancelled")
            raise
        await ctx.report_progress(2, 2, "done")
        return "worked"

    @mcp.tool()
    async def change(ctx: Context) -> None:
        """Notify the subscribers that the tools have changed."""
        await ctx.notify_tools_changed()

    return mcp


@asynccontextmanager
async def connected(server: Server, mode: str) -> AsyncIterator[Client]:
    """Connect a client that knows the tools; with a session, it also has an open stream from the server."""
    async with httpx2.AsyncClient(trust_env=False, timeout=30) as http:
        async with Client(streamable_http_client(f"{server.url}/mcp", http_client=http), mode=mode) as client:
            assert [tool.name for tool in (await client.list_tools()).tools] == ["add", "work", "change"]
            # When initialize, initialized and tools/list are answered, only that stream is in flight.
            while mode == "legacy" and (server.stats.in_flight, server.stats.served) != (1, 3):
                await asyncio.sleep(0)
            yield client


def assert_nothing_was_forced(server: Server) -> None:
    assert server.report is not None
    assert not server.report.was_forced


@pytest.mark.parametrize("mode", MODES)
async def test_mcp_tools_are_called_and_report_their_progress(mode: str, loop_name: str) -> None:
    """The progress arrives while they work."""
    play = Play()
    progressed: list[str | None] = []

    async def record(progress: float, total: float | None, message: str | None) -> None:
        progressed.append(message)
        play.release()

    async with serving(make(play).streamable_http_app(), shutdown_timeout=None) as server:
        async with connected(server, mode) as client:
            assert (await client.call_tool("add", {"a": 1, "b": 2})).structured_content == {"result": 3}
            result = await client.call_tool("work", progress_callback=record)
            assert result.structured_content == {"result": "worked"}
            assert progressed == ["begun", "done"]
    assert_nothing_was_forced(server)


@pytest.mark.parametrize("mode", MODES)
async def test_mcp_call_in_flight_is_answered_during_a_stop(mode: str, loop_name: str) -> None:
    """With all of its progress."""
    play = Play()
    progressed: list[str | None] = []

    async def record(progress: float, total: float | None, message: str | None) -> None:
        progressed.append(message)

    async with serving(make(play).streamable_http_app(), shutdown_timeout=None) as server:
        async with connected(server, mode) as client:
            calling = asyncio.create_task(client.call_tool("work", progress_callback=record))
            await play.holding.wait()
            server.close()
            play.release()
            assert (await calling).structured_content == {"result": "worked"}
            assert progressed == ["begun", "done"]
            await server.wait_closed()
    assert_nothing_was_forced(server)


async def test_stream_of_an_mcp_session_ends_with_the_stop(loop_name: str) -> None:
    """It is an event stream, so it waits for no timeout; for one server after the other."""
    for _ in range(2):
        async with serving(make(Play()).streamable_http_app(), shutdown_timeout=None) as server:
            async with connected(server, "legacy"):
                assert server.stats.in_flight == 1
                await server.aclose()
        assert_nothing_was_forced(server)


@pytest.mark.parametrize("mode", MODES)
async def test_disconnect_after_ends_an_mcp_call(mode: str, loop_name: str) -> None:
    """Its client gets an error. With a session, this takes a second, in the lifespan's shutdown."""
    play = Play()
    app = make(play).streamable_http_app()
    async with serving(app, shutdown_timeout=None, disconnect_after=0) as server:
        async with connected(server, mode) as client:
            calling = asyncio.create_task(client.call_tool("work", progress_callback=ignore))
            await play.holding.wait()
            await server.aclose()
            with pytest.raises(MCPError):
                await calling
    assert play.events == ["cancelled"]
    assert_nothing_was_forced(server)


async def ignore(progress: float, total: float | None, message: str | None) -> None:
    pass


async def test_mcp_subscription_gets_changes_and_its_end(loop_name: str) -> None:
    """Without a session, it is a request of its own, which can get a disconnect."""
    app = make(Play()).streamable_http_app()
    async with serving(app, shutdown_timeout=None, disconnect_after=0) as server:
        async with connected(server, "auto") as client, client.listen(tools_list_changed=True) as subscription:
            await client.call_tool("change")
            assert isinstance(await anext(subscription), ToolsListChanged)
            await server.aclose()
            with pytest.raises(SubscriptionLost):
                await anext(subscription)
    assert_nothing_was_forced(server)


async def test_mcp_app_can_be_served_only_once(loop_name: str) -> None:
    """Its session manager cannot start twice; but the same tools can have a new app."""
    mcp = make(Play())
    app = mcp.streamable_http_app()
    async with serving(app):
        pass
    with pytest.raises(StartupError) as excinfo:
        async with serving(app):
            pass
    assert "once per instance" in str(excinfo.value.__cause__)
    async with serving(mcp.streamable_http_app(), shutdown_timeout=None) as server:
        async with connected(server, "auto") as client:
            assert (await client.call_tool("add", {"a": 1, "b": 2})).structured_content == {"result": 3}
