"""
Starlette.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from tests.integration.frameworks import FIRST, LAST, Play, received


def make(play: Play) -> Starlette:
    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[dict[str, str]]:
        play.note("startup")
        yield {"greeting": "hello"}
        play.note("shutdown")

    async def as_json(request: Request) -> Response:
        return JSONResponse({"hello": "world"})

    async def form(request: Request) -> Response:
        async with request.form() as form:
            file = form["file"]
            assert isinstance(file, UploadFile)
            return JSONResponse({"name": form["name"], **received(await file.read())})

    async def body(request: Request) -> Response:
        return JSONResponse(received(b"".join([chunk async for chunk in request.stream()])))

    async def greeting(request: Request) -> Response:
        return PlainTextResponse(request.state.greeting)

    async def hold(request: Request) -> Response:
        await play.hold()
        return PlainTextResponse("held")

    def sync(request: Request) -> Response:
        play.hold_thread()
        return PlainTextResponse("held")

    async def stream(request: Request) -> Response:
        async def chunks() -> AsyncIterator[bytes]:
            yield FIRST
            await play.hold()
            yield LAST

        return StreamingResponse(chunks())

    async def events(request: Request) -> Response:
        stopping = request.state.aioserve.stopping

        async def chunks() -> AsyncIterator[str]:
            yield "data: hello\n\n"
            await stopping.wait()
            yield "data: the end\n\n"

        return StreamingResponse(chunks(), media_type="text/event-stream")

    async def endless(request: Request) -> Response:
        async def chunks() -> AsyncIterator[str]:
            try:
                yield "data: hello\n\n"
                await asyncio.Event().wait()
            finally:
                play.note("stream over")

        return StreamingResponse(chunks(), media_type="text/event-stream")

    async def background(request: Request) -> Response:
        async def work() -> None:
            await play.hold()
            play.note("background over")

        return PlainTextResponse("begun", background=BackgroundTask(work))

    async def echo(websocket: WebSocket) -> None:
        await websocket.accept()
        async for text in websocket.iter_text():
            await websocket.send_text(text)
        play.note("websocket over")

    return Starlette(
        lifespan=lifespan,
        routes=[
            Route("/json", as_json),
            Route("/form", form, methods=["POST"]),
            Route("/body", body, methods=["POST"]),
            Route("/greeting", greeting),
            Route("/hold", hold),
            Route("/sync", sync),
            Route("/stream", stream),
            Route("/events", events),
            Route("/endless", endless),
            Route("/background", background),
            WebSocketRoute("/echo", echo),
        ],
    )
