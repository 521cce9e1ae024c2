"""
A Telegram bot with a web page beside it, which lists the chats of the bot, and can write to them.

    pip install aiogram fastapi
    BOT_TOKEN=... python bot.py

The page is on http://127.0.0.1:8000. Ctrl+C and SIGTERM stop both.
"""

import asyncio
import html
import logging
import os
import sys

from aiogram import Bot, Dispatcher
from aiogram.client.session.aiohttp import AiohttpSession
from aiogram.client.telegram import TelegramAPIServer
from aiogram.exceptions import TelegramAPIError
from aiogram.types import Message
from fastapi import FastAPI, HTTPException
from fastapi.responses import HTMLResponse
from pydantic import BaseModel

from aioserve import serving

telegram = TelegramAPIServer.from_base(os.environ.get("BOT_API", "https://api.telegram.org"))
bot = Bot(os.environ["BOT_TOKEN"], AiohttpSession(api=telegram))
dispatcher = Dispatcher()
page = FastAPI()
chats: dict[int, str] = {}


@dispatcher.message()
async def hear(message: Message) -> None:
    chats[message.chat.id] = message.text or ""
    await message.answer(f"You are number {len(chats)}.")


@page.get("/", response_class=HTMLResponse)
async def show() -> str:
    rows = "".join(f"<li>{chat}: {html.escape(text)}" for chat, text in chats.items())
    return f"<!doctype html><title>Chats</title><h1>Chats</h1><ul>{rows or 'None yet'}</ul>"


class Text(BaseModel):
    text: str


@page.post("/chats/{chat}")
async def write(chat: int, body: Text) -> int:
    try:
        return (await bot.send_message(chat, body.text)).message_id
    except TelegramAPIError as exc:
        raise HTTPException(502, exc.message) from exc


async def main() -> None:
    # The page stops before the session of the bot closes: the last request can still send something.
    async with bot, serving(page, port=int(os.environ.get("PORT", "8000"))):
        # It ends at Ctrl+C and SIGTERM, which it handles itself.
        await dispatcher.start_polling(bot, close_bot_session=False)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stdout)
    asyncio.run(main())
