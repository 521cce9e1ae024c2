"""
FastAPI.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import BackgroundTasks, FastAPI, Form, Request, UploadFile, WebSocket, WebSocketDisconnect
from fastapi.responses import PlainTextResponse, StreamingResponse

from tests.integration.frameworks import FIRST, LAST, Play, Received, received


def make(play: Play) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, str]]:
        play.note("startup")
        yield {"greeting": "hello"}
        play.note("shutdown")

    app = FastAPI(lifespan=lifespan)

    @app.get("/json")
    async def as_json() -> dict[str, str]:
        return {"hello": "world"}

    @app.post("/form")
    async def form(name: Annotated[str, Form()], file: UploadFile) -> dict[str, Any]:
        return {"name": name, **received(await file.read())}

    @app.post("/body")
    async def body(request: Request) -> Received:
        return received(b"".join([chunk async for chunk in request.stream()]))

    @app.get("/greeting", response_class=PlainTextResponse)
    async def greeting(request: Request) -> str:
        return str(request.state.greeting)

    @app.get("/hold", response_class=PlainTextResponse)
    async def hold() -> str:
        await play.hold()
        return "held"

    @app.get("/sync", response_class=PlainTextResponse)
    def sync() -> str:
        play.hold_thread()
        return "held"

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        async def chunks() -> AsyncIterator[bytes]:
            yield FIRST
            await play.hold()
            yield LAST

        return StreamingResponse(chunks())

    @app.get("/events")
    async def events(request: Request) -> StreamingResponse:
        stopping = request.state.aioserve.stopping

        async def chunks() -> AsyncIterator[str]:
            yield "data: hello\n\n"
            await stopping.wait()
            yield "data: the end\n\n"

        return StreamingResponse(chunks(), media_type="text/event-stream")

    @app.get("/endless")
    async def endless() -> StreamingResponse:
        async def chunks() -> AsyncIterator[str]:
            try:
                yield "data: hello\n\n"
                await asyncio.Event().wait()
            finally:
                play.note("stream over")

        return StreamingResponse(chunks(), media_type="text/event-stream")

    @app.get("/background", response_class=PlainTextResponse)
    async def background(tasks: BackgroundTasks) -> str:
        async def work() -> None:
            await play.hold()
            play.note("background over")

        tasks.add_task(work)
        return "begun"

    @app.websocket("/echo")
    async def echo(websocket: WebSocket) -> None:
        await websocket.accept()
        try:
            while True:
                await websocket.send_text(await websocket.receive_text())
        except WebSocketDisconnect:
            play.note("websocket over")

    return app
