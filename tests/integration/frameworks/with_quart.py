"""
Quart.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from quart import Quart, Response, request, websocket
from quart.utils import run_sync

from tests.integration.frameworks import FIRST, LAST, Play, Received, received


def make(play: Play) -> Quart:
    app = Quart(__name__)

    @app.while_serving
    async def lifespan() -> AsyncGenerator[None, None]:
        play.note("startup")
        app.config["GREETING"] = "hello"
        yield
        play.note("shutdown")

    @app.get("/json")
    async def as_json() -> dict[str, str]:
        return {"hello": "world"}

    @app.post("/form")
    async def form() -> dict[str, Any]:
        form, files = await request.form, await request.files
        return {"name": form["name"], **received(files["file"].read())}

    @app.post("/body")
    async def body() -> Received:
        return received(b"".join([chunk async for chunk in request.body]))

    @app.get("/greeting")
    async def greeting() -> str:
        return str(app.config["GREETING"])

    @app.get("/hold")
    async def hold() -> str:
        await play.hold()
        return "held"

    @app.get("/sync")
    async def sync() -> str:
        await run_sync(play.hold_thread)()
        return "held"

    @app.get("/stream")
    async def stream() -> Response:
        async def chunks() -> AsyncIterator[bytes]:
            yield FIRST
            await play.hold()
            yield LAST

        return Response(chunks())

    @app.get("/events")
    async def events() -> Response:
        stopping = request.scope["state"]["aioserve"].stopping

        async def chunks() -> AsyncIterator[str]:
            yield "data: hello\n\n"
            await stopping.wait()
            yield "data: the end\n\n"

        return Response(chunks(), mimetype="text/event-stream")

    @app.get("/endless")
    async def endless() -> Response:
        async def chunks() -> AsyncIterator[str]:
            try:
                yield "data: hello\n\n"
                await asyncio.Event().wait()
            finally:
                play.note("stream over")

        return Response(chunks(), mimetype="text/event-stream")

    @app.get("/background")
    async def background() -> str:
        async def work() -> None:
            await play.hold()
            play.note("background over")

        app.add_background_task(work)
        return "begun"

    @app.websocket("/echo")
    async def echo() -> None:
        try:
            while True:
                await websocket.send(await websocket.receive())
        finally:
            play.note("websocket over")

    return app
