"""
GraphQL by strawberry, with gql's client: queries over HTTP, and subscriptions over WebSocket.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import strawberry
from gql import Client, gql
from gql.transport.exceptions import TransportClosed, TransportConnectionFailed, TransportServerError
from gql.transport.websockets import WebsocketsTransport
from strawberry.asgi import GraphQL
from tenacity import retry, wait_fixed

from aioserve import Server, serving
from tests.clients import get
from tests.integration.frameworks import Play

PROTOCOLS = [WebsocketsTransport.GRAPHQLWS_SUBPROTOCOL, WebsocketsTransport.APOLLO_SUBPROTOCOL]
NUMBERS = gql("subscription { numbers }")


def make(play: Play) -> GraphQL[object, object]:
    @strawberry.type
    class Query:
        @strawberry.field
        async def greeting(self) -> str:
            return "hello"

    @strawberry.type
    class Subscription:
        @strawberry.subscription
        async def numbers(self) -> AsyncIterator[int]:
            try:
                yield 1
                await play.hold()
                yield 2
            finally:
                play.note("subscription over")

    return GraphQL(strawberry.Schema(Query, subscription=Subscription))


def transport_to(server: Server, protocol: str) -> WebsocketsTransport:
    return WebsocketsTransport(server.url.replace("http", "ws"), subprotocols=[protocol], connect_args={"proxy": None})


def assert_nothing_was_forced(server: Server) -> None:
    assert server.report is not None
    assert server.report[1:] == (0, (), (), False)


async def test_it_answers_queries(loop_name: str) -> None:
    async with serving(make(Play())) as server:
        response = await get(server, "/?query={greeting}")
        assert response.json()["data"] == {"greeting": "hello"}


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_it_is_subscribed_to(protocol: str, loop_name: str) -> None:
    """To the end."""
    play = Play()
    async with serving(make(play), shutdown_timeout=None) as server:
        async with Client(transport=transport_to(server, protocol)) as session:
            heard = []
            async for data in session.subscribe(NUMBERS):
                heard.append(data["numbers"])
                play.release()
            assert heard == [1, 2]
    assert play.events == ["subscription over"]
    assert_nothing_was_forced(server)


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_at_a_stop_subscriptions_end_at_once(protocol: str, loop_name: str) -> None:
    """The subscriber hears of it, and so does what it has subscribed to."""
    play = Play()
    async with serving(make(play), shutdown_timeout=None) as server:
        async with Client(transport=transport_to(server, protocol)) as session:
            with pytest.raises(TransportConnectionFailed):
                async for _ in session.subscribe(NUMBERS):
                    await play.holding.wait()
                    server.close()
            await server.wait_closed()
    assert play.events == ["subscription over"]
    assert_nothing_was_forced(server)


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_after_a_restart_on_the_same_port_the_client_is_back(protocol: str, loop_name: str) -> None:
    """By itself, where it was told to reconnect; what it had subscribed to it subscribes to again."""
    first, second = Play(), Play()
    async with serving(make(first), shutdown_timeout=None) as server:
        client = Client(transport=transport_to(server, protocol))
        session = await client.connect_async(reconnecting=True, retry_connect=retry(wait=wait_fixed(0.01)))  # type: ignore[no-untyped-call]
        try:
            with pytest.raises(TransportConnectionFailed):
                async for _ in session.subscribe(NUMBERS):
                    await server.aclose()
            second.release()
            async with serving(make(second), port=server.port or 0) as again:
                heard: list[int] = []
                while heard != [1, 2]:
                    try:
                        heard = [data["numbers"] async for data in session.subscribe(NUMBERS)]
                    except (TransportClosed, TransportConnectionFailed, TransportServerError):
                        await asyncio.sleep(0)
        finally:
            await client.close_async()  # type: ignore[no-untyped-call]
    assert second.events == ["subscription over"]
    assert_nothing_was_forced(again)
