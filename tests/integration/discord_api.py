"""
A server that answers as Discord's HTTP API and its gateway do, as far as a bot needs it that posts messages.
"""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

BOT = {"id": "42", "username": "bot", "discriminator": "0", "avatar": None, "bot": True}
APPLICATION = {
    "id": "42",
    "name": "bot",
    "icon": None,
    "description": "",
    "bot_public": True,
    "bot_require_code_grant": False,
    "verify_key": "",
    "flags": 0,
    "owner": BOT,
}
MESSAGE = {
    "id": "7",
    "author": BOT,
    "timestamp": "2026-01-01T00:00:00+00:00",
    "edited_timestamp": None,
    "type": 0,
    **dict.fromkeys(["tts", "mention_everyone", "pinned"], False),
    **dict.fromkeys(["mentions", "mention_roles", "attachments", "embeds"], ()),
}


class Discord:
    """The part of Discord that a bot needs which writes to a channel."""

    def __init__(self) -> None:
        self._sending: asyncio.Queue[str] = asyncio.Queue()
        self.accepting = asyncio.Event()
        """Until it is set, the bot waits for the answer to what it sends."""
        self.disconnected: list[int] = []
        """With which codes bots have left the gateway."""
        self.app = Starlette(
            routes=[
                Route("/api/users/@me", self.me),
                Route("/api/oauth2/applications/@me", self.application),
                Route("/api/channels/{channel}/messages", self.message, methods=["POST"]),
                WebSocketRoute("/gateway", self.gateway),
            ]
        )

    async def next_message(self) -> str:
        """Wait until the bot sends something; it has not got the answer to that yet."""
        async with asyncio.timeout(20):
            return await self._sending.get()

    async def me(self, request: Request) -> Response:
        return JSONResponse(BOT)

    async def application(self, request: Request) -> Response:
        return JSONResponse(APPLICATION)

    async def message(self, request: Request) -> Response:
        text = (await request.json())["content"]
        self._sending.put_nowait(text)
        await self.accepting.wait()
        return JSONResponse({**MESSAGE, "content": text, "channel_id": request.path_params["channel"]})

    async def gateway(self, websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_json({"op": 10, "d": {"heartbeat_interval": 41_250}})  # hello
        try:
            while True:
                await self._answer(websocket, await websocket.receive_json())
        except WebSocketDisconnect as exc:
            self.disconnected.append(exc.code)

    async def _answer(self, websocket: WebSocket, said: dict[str, Any]) -> None:
        match said["op"]:
            case 1:  # a heartbeat
                await websocket.send_json({"op": 11})
            case 2:  # who it is
                url = str(websocket.url)
                ready = {"user": BOT, "guilds": [], "session_id": "1", "resume_gateway_url": url}
                application = {"id": "42", "flags": 0}
                await websocket.send_json({"op": 0, "t": "READY", "s": 1, "d": {**ready, "application": application}})
