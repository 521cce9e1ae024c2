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
from tests.helpers.clients import get
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
    assert not server.report.was_forced


async def test_strawberry_answers_queries(loop_name: str) -> None:
    async with serving(make(Play())) as server:
        response = await get(server, "/?query={greeting}")
        assert response.json()["data"] == {"greeting": "hello"}


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_subscription_gets_every_value_to_its_end(protocol: str, loop_name: str) -> None:
    """And ends by itself."""
    play = Play()
    async with serving(make(play), shutdown_timeout=None) as server:
        async with Client(transport=transport_to(server, protocol)) as session:
            received = []
            async for data in session.subscribe(NUMBERS):
                received.append(data["numbers"])
                play.release()
            assert received == [1, 2]
    assert play.events == ["subscription over"]
    assert_nothing_was_forced(server)


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_stop_ends_subscriptions_at_once(protocol: str, loop_name: str) -> None:
    """The subscriber gets the end, and so does the generator behind the subscription."""
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
async def test_subscription_goes_on_after_a_restart_on_the_same_port(protocol: str, loop_name: str) -> None:
    """A client with `reconnecting=True` connects and subscribes again by itself."""
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
                received: list[int] = []
                while received != [1, 2]:
                    try:
                        received = [data["numbers"] async for data in session.subscribe(NUMBERS)]
                    except (TransportClosed, TransportConnectionFailed, TransportServerError):
                        await asyncio.sleep(0)
        finally:
            await client.close_async()  # type: ignore[no-untyped-call]
    assert second.events == ["subscription over"]
    assert_nothing_was_forced(again)
