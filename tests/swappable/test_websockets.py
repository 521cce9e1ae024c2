"""
What the WebSockets see of a swap.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from uvicorn.config import WS_PROTOCOLS
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as connect_websocket
from websockets.exceptions import ConnectionClosed, InvalidStatus

from aioserve import (
    Server,
    Swappable,
    serving,
)
from tests.helpers.apps import App, AppError, Receive, Send
from tests.helpers.swapping import WHOLE_LIFE, Named, logged, sending, swapping, switched
from tests.helpers.turns import after, turns

pytestmark = pytest.mark.usefixtures("short_grace")


async def test_swap_closes_websockets_of_the_old_app_with_1012() -> None:
    """1012 means that the client may connect again; the handler gets the same code."""
    first, second = Named("first"), Named("other")
    swappable = Swappable(first)
    async with serving(swappable) as server:
        async with connect_websocket(server.url.replace("http", "ws"), proxy=None) as websocket:
            await websocket.send("hello")
            assert await websocket.recv() == "hello"
            await swappable.swap(second, shutdown_timeout=None)
            assert first.events == ["startup", "websocket 1012", "shutdown", "lifespan over"]
            with pytest.raises(ConnectionClosed) as caught:
                await websocket.recv()
        assert caught.value.rcvd is not None
        assert caught.value.rcvd.code == 1012
        async with connect_websocket(server.url.replace("http", "ws"), proxy=None) as websocket:
            await websocket.send("hello")
            assert await websocket.recv() == "hello"
            assert second.events == ["startup"]


class Pushing(Named):
    """An app whose WebSocket handlers do not wait in `receive()`: they wait for something else, and send it."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.accepting = asyncio.Event()
        self.accepting.set()

    async def websocket(self, receive: Receive, send: Send) -> None:
        await receive()
        self.holding.set()
        await self.accepting.wait()
        await send({"type": "websocket.accept"})
        try:
            await self.release.wait()
            await send({"type": "websocket.send", "text": "news"})
        except OSError as exc:
            self.events.append(str(exc))
            raise
        finally:
            await send({"type": "websocket.close"})
            self.events.append("websocket over")


async def test_swap_closes_a_websocket_whose_handler_does_not_wait_in_receive(caplog: pytest.LogCaptureFixture) -> None:
    """When its handler sends something, that is an OSError, as with a client that has disconnected."""
    first = Pushing("first")
    swappable = Swappable(first)
    async with serving(swappable) as server:
        async with connect_websocket(server.url.replace("http", "ws"), proxy=None) as websocket:
            async with swapping(swappable, Named("other"), shutdown_timeout=None) as swap:
                with pytest.raises(ConnectionClosed) as caught:
                    await websocket.recv()
                assert caught.value.rcvd is not None
                assert caught.value.rcvd.code == 1012
                assert not swap.done()
                first.release.set()
            swap.result()
        closed = "the WebSocket was closed with 1012: its app has been replaced"
        assert first.events == ["startup", closed, "websocket over", "shutdown", "lifespan over"]
    assert logged(caplog) == []


async def test_websocket_handler_that_ends_early_does_not_cut_off_the_close_of_a_swap() -> None:
    """The handler gets the disconnect at once; some servers take their time to send the close frame."""
    first = Named("first")
    swappable = Swappable(first)

    async def slowly(message: dict[str, Any]) -> None:
        while message["type"] == "websocket.close" and "websocket 1012" not in first.events:
            await asyncio.sleep(0)
        await turns()

    async with serving(sending(swappable, slowly)) as server:
        async with connect_websocket(server.url.replace("http", "ws"), proxy=None) as websocket:
            await websocket.send("hello")
            assert await websocket.recv() == "hello"
            await swappable.swap(Named("other"), shutdown_timeout=None)
            with pytest.raises(ConnectionClosed) as caught:
                await websocket.recv()
        assert caught.value.rcvd is not None
        assert caught.value.rcvd.code == 1012


async def test_websocket_that_cannot_be_closed_by_a_swap_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    """Its client may have disconnected, and each server reports that in its own way."""
    first = Named("first")
    swappable = Swappable(first)

    async def fails(message: dict[str, Any]) -> None:
        if message["type"] == "websocket.close":
            raise AppError("the server's own")

    async with serving(sending(swappable, fails)) as server:
        async with connect_websocket(server.url.replace("http", "ws"), proxy=None) as websocket:
            await swappable.swap(Named("other"), shutdown_timeout=None)
            with pytest.raises(ConnectionClosed):
                await websocket.recv()
    assert first.events == ["startup", "websocket 1012", "shutdown", "lifespan over"]
    assert logged(caplog) == []


async def test_websocket_whose_close_hangs_does_not_block_a_swap() -> None:
    """The close is cancelled together with its handler."""
    first = Pushing("first")
    swappable = Swappable(first)
    never = asyncio.Event()

    async def hangs(message: dict[str, Any]) -> None:
        if message["type"] == "websocket.close":
            await never.wait()

    async with serving(sending(swappable, hangs)) as server:
        async with connect_websocket(server.url.replace("http", "ws"), proxy=None):
            await swappable.swap(Named("other"), shutdown_timeout=0)
            await turns()
            assert not any(task.get_name() == "aioserve websocket" for task in asyncio.all_tasks())
    assert first.events == ["startup", "websocket over", "shutdown", "lifespan over"]
    never.set()


async def open_websocket(server: Server) -> ClientConnection:
    return await connect_websocket(server.url.replace("http", "ws"), proxy=None)


@pytest.mark.parametrize("count", range(5))
async def test_websocket_that_is_accepted_soon_after_a_swap_is_closed_with_1012(count: int) -> None:
    """A few turns of the loop later, as in a stop; before its handshake is complete, nothing can be sent to it."""
    first, second = Pushing("first"), Named("other")
    first.accepting.clear()
    swappable = Swappable(first)
    async with serving(swappable) as server:
        connecting = asyncio.create_task(open_websocket(server))
        await first.holding.wait()
        async with swapping(swappable, second, shutdown_timeout=None) as swap:
            await switched(swappable, second)
            after(count, first.accepting.set)
            first.release.set()
            with pytest.raises((ConnectionClosed, InvalidStatus)) as caught:
                await (await connecting).recv()
            match caught.value:
                case ConnectionClosed(rcvd=closed):
                    assert closed is not None
                    assert closed.code == 1012
                    assert count < 4
                case InvalidStatus(response=response):
                    assert response.status_code == 503
                    assert count > 1
        swap.result()


@pytest.mark.parametrize("ws", sorted(WS_PROTOCOLS.keys() - {"auto", "none"}))
@pytest.mark.parametrize("grouped", [False, True], ids=["sends", "sends in a task group"])
async def test_websocket_that_is_not_accepted_is_refused_by_a_swap_with_503(
    ws: str, grouped: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """There is no budget here that could end it; what its handler sends then is an OSError."""
    first = Pushing("first")
    first.accepting.clear()
    swappable = Swappable(in_a_group(first) if grouped else first)
    async with serving(swappable, ws=ws) as server:
        connecting = asyncio.create_task(open_websocket(server))
        await first.holding.wait()
        async with swapping(swappable, Named("other"), shutdown_timeout=None) as swap:
            with pytest.raises(InvalidStatus) as caught:
                await connecting
            assert caught.value.response.status_code == 503
            assert caught.value.response.headers["retry-after"] == "0"
            assert not swap.done()
            first.accepting.set()
        swap.result()
    assert first.events == WHOLE_LIFE
    assert logged(caplog) == []


def in_a_group(app: Any) -> Any:
    async def grouped(scope: Any, receive: Any, send: Any) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(app(scope, receive, send))

    return grouped


@pytest.mark.parametrize("late", [False, True], ids=["waits", "comes later"])
async def test_handler_of_a_websocket_that_is_refused_by_a_swap_hears_of_a_disconnect(late: bool) -> None:
    """With 1012, after the connect."""
    received: list[Any] = []
    is_in, release = asyncio.Event(), asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return
        is_in.set()
        received.append(await receive())
        if late:
            await release.wait()
        received.append(await receive())

    swappable = Swappable(app)
    async with serving(swappable) as server:
        connecting = asyncio.create_task(open_websocket(server))
        await is_in.wait()
        async with swapping(swappable, Named("other"), shutdown_timeout=None) as swap:
            with pytest.raises(InvalidStatus):
                await connecting
            release.set()
        swap.result()
    assert received == [
        {"type": "websocket.connect"},
        {"type": "websocket.disconnect", "code": 1012, "reason": ""},
    ]


async def test_websocket_is_refused_by_a_swap_with_403_without_the_denial_extension() -> None:
    """The extension of ASGI that allows another status is not in each server."""
    first = Pushing("first")
    first.accepting.clear()
    swappable = Swappable(first)

    async def without_extensions(scope: Any, receive: Any, send: Any) -> None:
        await swappable({**scope, "extensions": None}, receive, send)

    async with serving(without_extensions) as server:
        connecting = asyncio.create_task(open_websocket(server))
        await first.holding.wait()
        await swappable.swap(Named("other"), shutdown_timeout=0)
        with pytest.raises(InvalidStatus) as caught:
            await connecting
        assert caught.value.response.status_code == 403


async def test_websocket_whose_app_never_stops_sending_is_closed_with_1012() -> None:
    """Although its handler ends at the next message that it sends."""

    async def chatty(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return
        await receive()
        await send({"type": "websocket.accept"})
        while True:
            await send({"type": "websocket.send", "text": "tick"})
            await asyncio.sleep(0)

    swappable = Swappable(chatty)
    async with serving(swappable) as server:
        async with connect_websocket(server.url.replace("http", "ws"), proxy=None) as client:
            await client.recv()
            swapping = asyncio.create_task(swappable.swap(App()))
            with pytest.raises(ConnectionClosed) as caught:
                while True:
                    await client.recv()
            assert caught.value.rcvd is not None
            assert caught.value.rcvd.code == 1012
            await swapping
