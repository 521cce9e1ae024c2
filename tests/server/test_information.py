"""
What a `Server` says of itself: `stopping`, `stats`, `state`, its representation, and no reference that is left.
"""

from __future__ import annotations

import asyncio
import copy
import gc
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request, Response

from aioserve import Stats, Swappable, serving, start
from tests.helpers.apps import App, Receive, Scope, Send, without_lifespan
from tests.helpers.clients import PIPELINING, UPGRADE, connect, get
from tests.helpers.turns import turns

pytestmark = pytest.mark.usefixtures("short_grace")


async def test_readiness_check_can_see_the_stop() -> None:
    """As soon as the stop has been asked for."""
    app = FastAPI()
    release = asyncio.Event()
    checking = asyncio.Event()

    @app.get("/ready")
    async def ready(request: Request) -> Response:
        checking.set()
        await release.wait()
        return Response(status_code=503 if request.state.aioserve.stopping.is_set() else 200)

    async with serving(app) as server:
        release.set()
        assert (await get(server, "/ready")).status_code == 200

        release.clear()
        checking.clear()
        asking = asyncio.create_task(get(server, "/ready"))
        await checking.wait()
        server.close()
        release.set()
        assert (await asking).status_code == 503


async def test_stats_count_connections_requests_and_responses() -> None:
    """Connections, requests in flight, responses completed."""
    app = App()
    async with serving(app) as server, connect(server) as connection:
        connection.ask("/")
        await connection.answer()
        assert server.stats == Stats(connections=1, in_flight=0, served=1)
        assert server.stats.served == 1
        connection.ask("/hold")
        await app.holding.wait()
        assert server.stats == Stats(connections=1, in_flight=1, served=1)
        app.release.set()
        await connection.answer()
    assert server.stats == Stats(connections=0, in_flight=0, served=2)


async def test_repr_of_a_server_has_its_url_and_state() -> None:
    """Serving, stopping or closed."""
    app = App()
    async with serving(app) as server, connect(server) as connection:
        assert repr(server) == f"<aioserve.Server {server.url} serving>"
        connection.ask("/hold")
        await app.holding.wait()
        server.close()
        assert repr(server) == f"<aioserve.Server {server.url} stopping>"
        app.release.set()
    assert repr(server) == f"<aioserve.Server {server.url} closed>"


async def test_notebook_shows_links_to_a_server() -> None:
    """To every address, as long as the server runs; and its state."""
    app = App()
    async with serving(app, host=["127.0.0.1", "::1"]) as server, connect(server) as connection:
        one, two = (f'<a href="{url}" target="_blank">{url}</a>' for url in server.urls)
        assert server._repr_html_() == f"aioserve.Server {one}, {two} <em>serving</em>"
        connection.ask("/hold")
        await app.holding.wait()
        server.close()
        assert server._repr_html_() == f"aioserve.Server {one}, {two} <em>stopping</em>"
        app.release.set()
    assert server._repr_html_() == f"aioserve.Server {server.urls[0]}, {server.urls[1]} <em>closed</em>"


async def test_notebook_shows_no_link_to_a_unix_socket(tmp_path: Path) -> None:
    """No browser could follow it."""
    async with serving(App(), uds=tmp_path / "app.sock") as server:
        assert server._repr_html_() == f"aioserve.Server {server.url} <em>serving</em>"


async def test_notebook_gets_the_url_of_a_server_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the address contains."""
    async with serving(App()) as server:
        monkeypatch.setattr(server._engine, "urls", ['http://<b>&"'])
        url = "http://&lt;b&gt;&amp;&quot;"
        assert server._repr_html_() == f'aioserve.Server <a href="{url}" target="_blank">{url}</a> <em>serving</em>'


async def test_closed_server_is_freed_without_the_garbage_collector() -> None:
    """If it had no connection: in uvicorn, connections and their requests refer to each other."""

    async def app(scope: Any, receive: Any, send: Any) -> None:  # not one that keeps its state
        for phase in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{phase}.complete"})

    gc.disable()
    try:
        server = await start(app)
        await server.aclose()
        await turns()  # its task has callbacks
        left = weakref.ref(server), weakref.ref(server.uvicorn)
        del server
        assert [each() for each in left] == [None, None]
    finally:
        gc.enable()


async def test_server_has_a_state_without_a_lifespan() -> None:
    """The server itself is in it."""
    async with serving(without_lifespan, lifespan="off") as server:
        assert server.state == {"aioserve": server}


@pytest.mark.parametrize("http", PIPELINING)
@pytest.mark.parametrize("swappable", [False, True], ids=["", "in a Swappable"])
async def test_state_with_the_server_in_it_can_be_copied(http: Any, swappable: bool) -> None:
    """By middleware, for a request, a WebSocket and the lifespan: the server in the copy is the server."""

    class Copying(App):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            copied = copy.deepcopy(scope)
            assert copied["state"] is not scope["state"]
            copies[scope["type"]] = copied["state"]["aioserve"]
            await super().__call__(scope, receive, send)

    copies: dict[str, Any] = {}
    app: Any = Copying()
    async with serving(Swappable(app) if swappable else app, http=http) as server, connect(server) as connection:
        assert (await get(server)).text == "hello"
        connection.writer.write(UPGRADE)
        await connection.reader.readuntil(b"\r\n\r\n")
        assert copies == {"lifespan": server, "http": server, "websocket": server}
        assert copy.deepcopy(server.state) == server.state
        assert copy.copy(server) is copy.deepcopy([server])[0] is server
    assert copy.deepcopy(server) is server


async def test_server_cannot_be_pickled() -> None:
    """It is of one process; the error says what to pass to another one."""
    async with serving(App()) as server:
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            with pytest.raises(TypeError) as caught:
                pickle.dumps([server], protocol)
            # Without the note that Python 3.14 adds, which says where in the pickle it is.
            assert str(caught.value) == "an aioserve.Server cannot be pickled; pass its url instead"
