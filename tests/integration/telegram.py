"""
A server that answers as Telegram does.
"""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

TOKEN = "42:token"  # noqa: S105 (not a real one)
CHAT = 12
MESSAGE = {"message_id": 1, "date": 1, "chat": {"id": CHAT, "type": "private"}}
USER = {"id": CHAT, "is_bot": False, "first_name": "User"}


class Telegram:
    """The part of Telegram's Bot API that the bot needs: a user writes to it, and reads its answers."""

    def __init__(self) -> None:
        self._sending: asyncio.Queue[str] = asyncio.Queue()
        self.sent: list[str] = []
        """The messages that the bot has sent."""
        self.accepting = asyncio.Event()
        """Until it is set, the bot waits for the answer to what it sends."""
        self.refusing = False
        self._numbers = itertools.count(1)
        self._updates: list[dict[str, Any]] = []
        self._said = asyncio.Event()
        methods = [self.getMe, self.deleteWebhook, self.getUpdates, self.sendMessage]
        self.app = Starlette(routes=[Route(f"/bot{TOKEN}/{each.__name__}", each, methods=["POST"]) for each in methods])

    async def next_message(self) -> str:
        """Wait until the bot sends something; it has not got the answer to that yet."""
        async with asyncio.timeout(20):
            return await self._sending.get()

    def say(self, text: str) -> None:
        number = next(self._numbers)
        self._updates.append(
            {"update_id": number, "message": {**MESSAGE, "message_id": number, "text": text, "from": USER}}
        )
        self._said.set()

    async def getMe(self, request: Request) -> Response:  # noqa: N802 (the name of Telegram's method)
        return accepted({"id": 42, "is_bot": True, "first_name": "Bot", "username": "bot"})

    async def deleteWebhook(self, request: Request) -> Response:  # noqa: N802
        return accepted(True)

    async def getUpdates(self, request: Request) -> Response:  # noqa: N802
        asked = await form(request)
        # A request for the next updates confirms those before.
        self._updates = [each for each in self._updates if each["update_id"] >= int(asked.get("offset", 0))]
        if not self._updates:
            self._said.clear()
            waiting = {asyncio.ensure_future(self._said.wait()), asyncio.ensure_future(request.receive())}
            timeout = int(asked.get("timeout", 0))
            await asyncio.wait(waiting, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            for each in waiting:
                each.cancel()
        return accepted(self._updates)

    async def sendMessage(self, request: Request) -> Response:  # noqa: N802
        text = (await form(request))["text"]
        self._sending.put_nowait(text)
        if self.refusing:
            return JSONResponse({"ok": False, "error_code": 400, "description": "Bad Request: chat not found"}, 400)
        await self.accepting.wait()
        self.sent.append(text)
        return accepted({**MESSAGE, "text": text})


def accepted(result: Any) -> Response:
    return JSONResponse({"ok": True, "result": result})


async def form(request: Request) -> dict[str, str]:
    """Return what was sent: python-telegram-bot encodes it as a URL, aiogram in several parts."""
    async with request.form() as fields:
        return {name: str(value) for name, value in fields.items()}
