"""
Litestar.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from litestar import Litestar, MediaType, Request, Response, WebSocket, get, post, websocket
from litestar.background_tasks import BackgroundTask
from litestar.datastructures import State, UploadFile
from litestar.enums import RequestEncodingType
from litestar.exceptions import WebSocketDisconnect
from litestar.params import Body
from litestar.response import Stream

from tests.integration.frameworks import FIRST, LAST, Play, Received, received


def make(play: Play) -> Litestar:
    @asynccontextmanager
    async def lifespan(app: Litestar) -> AsyncIterator[None]:
        play.note("startup")
        app.state.greeting = "hello"
        yield
        play.note("shutdown")

    @get("/json")
    async def as_json() -> dict[str, str]:
        return {"hello": "world"}

    @post("/form")
    async def form(data: Annotated[dict[str, Any], Body(media_type=RequestEncodingType.MULTI_PART)]) -> dict[str, Any]:
        file = data["file"]
        assert isinstance(file, UploadFile)
        return {"name": data["name"], **received(await file.read())}

    @post("/body", request_max_body_size=None)
    async def body(request: Request[Any, Any, Any]) -> Received:
        return received(b"".join([chunk async for chunk in request.stream()]))

    @get("/greeting", media_type=MediaType.TEXT)
    async def greeting(state: State) -> str:
        return str(state.greeting)

    @get("/hold", media_type=MediaType.TEXT)
    async def hold() -> str:
        await play.hold()
        return "held"

    @get("/sync", media_type=MediaType.TEXT, sync_to_thread=True)
    def sync() -> str:
        play.hold_thread()
        return "held"

    @get("/stream")
    async def stream() -> Stream:
        async def chunks() -> AsyncIterator[bytes]:
            yield FIRST
            await play.hold()
            yield LAST

        return Stream(chunks())

    @get("/events")
    async def events(request: Request[Any, Any, Any]) -> Stream:
        stopping = request.scope["state"]["aioserve"].stopping

        async def chunks() -> AsyncIterator[str]:
            yield "data: hello\n\n"
            await stopping.wait()
            yield "data: the end\n\n"

        return Stream(chunks(), media_type="text/event-stream")

    @get("/endless")
    async def endless() -> Stream:
        async def chunks() -> AsyncIterator[str]:
            try:
                yield "data: hello\n\n"
                await asyncio.Event().wait()
            finally:
                play.note("stream over")

        return Stream(chunks(), media_type="text/event-stream")

    @get("/background", media_type=MediaType.TEXT)
    async def background() -> Response[str]:
        async def work() -> None:
            await play.hold()
            play.note("background over")

        return Response("begun", background=BackgroundTask(work))

    @websocket("/echo")
    async def echo(socket: WebSocket[Any, Any, Any]) -> None:
        await socket.accept()
        try:
            while True:
                await socket.send_text(await socket.receive_text())
        except WebSocketDisconnect:
            play.note("websocket over")

    handlers = [as_json, form, body, greeting, hold, sync, stream, events, endless, background, echo]
    # By default it configures the root logger, with a thread that is never ended.
    return Litestar(handlers, lifespan=[lifespan], logging_config=None)
