"""
The MCP SDK's server over streamable HTTP, with its own client: with sessions, as it was, and without, as it is now.
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
from tests.turns import turns

MODES = ["legacy", "auto"]

# What a stop gets where it has to be forced, in seconds; nothing depends on how long it is.
MOMENT = 0.05


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
        """Tell whoever listens that the tools have changed."""
        await ctx.notify_tools_changed()

    return mcp


@asynccontextmanager
async def connected(server: Server, mode: str) -> AsyncIterator[Client]:
    """A client that knows the tools; and if it has a session, it listens to a stream of its server's."""
    async with httpx2.AsyncClient(trust_env=False, timeout=30) as http:
        async with Client(streamable_http_client(f"{server.url}/mcp", http_client=http), mode=mode) as client:
            assert [tool.name for tool in (await client.list_tools()).tools] == ["add", "work", "change"]
            # When initialize, initialized and tools/list are done, what is left is that stream.
            while mode == "legacy" and server.stats[1:] != (1, 3):
                await asyncio.sleep(0)
            yield client


def assert_nothing_was_forced(server: Server) -> None:
    assert server.report is not None
    assert server.report[1:] == (0, (), (), False)


@pytest.mark.parametrize("mode", MODES)
async def test_its_tools_are_called_and_tell_how_they_fare(mode: str, loop_name: str) -> None:
    """Their progress comes while they work."""
    play = Play()
    heard: list[str | None] = []

    async def hear(progress: float, total: float | None, message: str | None) -> None:
        heard.append(message)
        play.release()

    async with serving(make(play).streamable_http_app(), shutdown_timeout=None) as server:
        async with connected(server, mode) as client:
            assert (await client.call_tool("add", {"a": 1, "b": 2})).structured_content == {"result": 3}
            result = await client.call_tool("work", progress_callback=hear)
            assert result.structured_content == {"result": "worked"}
            assert heard == ["begun", "done"]
    assert_nothing_was_forced(server)


@pytest.mark.parametrize("mode", MODES)
async def test_a_call_in_flight_is_answered(mode: str, loop_name: str) -> None:
    """With all of its progress. Then, a client with a session still listens, and holds the stop until it goes."""
    play = Play()
    heard: list[str | None] = []

    async def hear(progress: float, total: float | None, message: str | None) -> None:
        heard.append(message)

    async with serving(make(play).streamable_http_app(), shutdown_timeout=None) as server:
        async with connected(server, mode) as client:
            calling = asyncio.create_task(client.call_tool("work", progress_callback=hear))
            await play.holding.wait()
            server.close()
            play.release()
            assert (await calling).structured_content == {"result": "worked"}
            assert heard == ["begun", "done"]
            if mode == "auto":
                await server.wait_closed()
            else:
                await turns()
                assert server.stats.in_flight == 1
    assert_nothing_was_forced(server)


@pytest.mark.usefixtures("short_grace")
async def test_the_stream_of_a_session_ends_when_the_time_is_over(loop_name: str) -> None:
    """It listens for the disconnect that it is told of then."""
    async with serving(make(Play()).streamable_http_app(), shutdown_timeout=MOMENT) as server:
        async with connected(server, "legacy"):
            await server.aclose()
            assert server.report is not None
            (handler,) = server.report.persuaded
            assert handler[:2] == ("GET", "/mcp")
            assert (server.report.aborted, server.report.cancelled) == (0, ())


@pytest.mark.parametrize("mode", MODES)
async def test_told_of_a_disconnect_a_call_ends(mode: str, loop_name: str) -> None:
    """With `disconnect_after`; who has called hears of it. A session takes a second for that, in its lifespan."""
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


async def test_who_listens_for_changes_hears_of_them_and_of_the_end(loop_name: str) -> None:
    """Without a session, this is a request of its own; it can be told of a disconnect, too."""
    app = make(Play()).streamable_http_app()
    async with serving(app, shutdown_timeout=None, disconnect_after=0) as server:
        async with connected(server, "auto") as client, client.listen(tools_list_changed=True) as subscription:
            await client.call_tool("change")
            assert isinstance(await anext(subscription), ToolsListChanged)
            await server.aclose()
            with pytest.raises(SubscriptionLost):
                await anext(subscription)
    assert_nothing_was_forced(server)


async def test_an_app_is_for_one_server_only(loop_name: str) -> None:
    """Its sessions cannot begin twice; but the same tools can have a new app."""
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
