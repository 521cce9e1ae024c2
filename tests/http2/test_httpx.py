"""
A client that people use: httpx gives up the answers that it reads together with a GOAWAY.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import Any

import httpx
import pytest

from aioserve import _limits, start
from tests.helpers.http2 import StreamApp, needs_http2
from tests.helpers.turns import MOMENT

pytestmark = [needs_http2, pytest.mark.usefixtures("quiet", "busy_client")]

STREAMS = 50
STOPS = 10


@pytest.fixture
def busy_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """Expect no warning where httpx, in the same loop, takes more than a second for its answers over TLS."""
    monkeypatch.setattr(_limits, "SLOW_STOP", 5.0)


@pytest.fixture(params=["plain", "tls"])
def ways(request: pytest.FixtureRequest) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options of a server, and those of its client."""
    if request.param == "plain":
        return {}, {"http1": False, "verify": False}  # prior knowledge
    options, trusting = request.getfixturevalue("tls")
    return options, {"verify": trusting}


def make_client(url: str, **options: Any) -> httpx.AsyncClient:
    verify: ssl.SSLContext | bool = options.pop("verify")
    return httpx.AsyncClient(base_url=url, http2=True, trust_env=False, verify=verify, **options)


async def test_all_streams_of_httpx_that_are_in_flight_are_answered(ways: Any) -> None:
    for _ in range(STOPS):
        app = StreamApp()
        server = await start(app, http2=True, **ways[0])
        async with make_client(server.url, **ways[1]) as client, asyncio.TaskGroup() as group:
            assert (await client.get("/")).http_version == "HTTP/2"
            asking = [group.create_task(client.get("/hold")) for _ in range(STREAMS)]
            await app.come(STREAMS + 1)
            server.close()
            app.release.set()
            await server.wait_closed()
            assert [(await each).status_code for each in asking] == [200] * STREAMS


@pytest.mark.parametrize("turns", range(0, 30, 3))
async def test_httpx_that_has_just_sent_its_requests_is_answered(
    ways: Any, turns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have been answered before the stop, or arrive in it; or they are above the GOAWAY, and are sent again."""
    monkeypatch.setattr(_limits, "HTTP2_RECENT", 5 * MOMENT)  # it shares its loop with the server
    app = StreamApp()
    server = await start(app, http2=True, **ways[0])
    async with make_client(server.url, **ways[1]) as client:
        await client.get("/")
        asking = [asyncio.create_task(client.get("/")) for _ in range(STREAMS)]
        await app.come(2)
        for _ in range(turns):
            await asyncio.sleep(0)
        server.close()
        await server.wait_closed()
        results = await asyncio.gather(*asking, return_exceptions=True)
    answered = sum(isinstance(each, httpx.Response) and each.status_code == 200 for each in results)
    refused = sum(isinstance(each, httpx.ConnectError) for each in results)
    assert answered + refused == STREAMS
    assert answered == app.count - 1


@pytest.mark.parametrize("drain_delay", [0, 10 * MOMENT])
async def test_httpx_that_sends_one_request_after_the_other_loses_none(ways: Any, drain_delay: float) -> None:
    """Until nobody listens any more."""
    app = StreamApp()
    server = await start(app, http2=True, drain_delay=drain_delay, **ways[0])
    async with make_client(server.url, **ways[1]) as client:
        for _ in range(5):
            await client.get("/")
        server.close()
        answered = 0
        with pytest.raises(httpx.ConnectError):
            while True:
                assert (await client.get("/")).status_code == 200
                answered += 1
    await server.wait_closed()
    assert app.count == answered + 5
    if drain_delay:
        assert answered > 5
