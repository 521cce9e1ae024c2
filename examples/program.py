"""
A bot, a worker, a scheduler, an API, and the metrics of them all, which end together and lose nothing.

    pip install apscheduler fastapi prometheus_client python-telegram-bot redis
    BOT_TOKEN=... REDIS_URL=redis://127.0.0.1 python program.py
"""

import asyncio
import logging
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from apscheduler.schedulers.asyncio import AsyncIOScheduler
from fastapi import FastAPI
from prometheus_client import Counter, Gauge, make_asgi_app
from pydantic import BaseModel
from redis.asyncio import Redis, ResponseError
from telegram import Update
from telegram.ext import Application, ContextTypes, MessageHandler, filters

from aioserve import serving

telegram = os.environ.get("BOT_API", "https://api.telegram.org/bot")
bot = Application.builder().token(os.environ["BOT_TOKEN"]).base_url(telegram).job_queue(None).build()
redis = Redis.from_url(os.environ["REDIS_URL"], decode_responses=True)
api, scheduler = FastAPI(), AsyncIOScheduler()
done, waiting = Counter("jobs_done", "Jobs that are done"), Gauge("jobs_waiting", "Jobs that are not")


class Job(BaseModel):
    chat: int
    text: str


@api.post("/jobs", status_code=202)
async def add(job: Job) -> str:
    return await redis.xadd("jobs", job.model_dump())


async def hear(update: Update, context: ContextTypes.DEFAULT_TYPE) -> None:
    await add(Job(chat=update.effective_chat.id, text=update.effective_message.text))


@scheduler.scheduled_job("interval", seconds=2)
async def count() -> None:
    waiting.set(await redis.xlen("jobs"))


async def do(number: str, job: Job) -> None:
    await bot.bot.send_message(job.chat, f"done: {job.text}")
    await redis.pipeline().xack("jobs", "workers", number).xdel("jobs", number).execute()
    done.inc()


async def work() -> None:
    try:
        await redis.xgroup_create("jobs", "workers", id="0", mkstream=True)
    except ResponseError as exc:
        if "BUSYGROUP" not in str(exc):  # it is there already
            raise
    begin = "0"  # first what was begun and not acknowledged before the last end
    while True:
        for _, jobs in await redis.xreadgroup("workers", "first", {"jobs": begin}, count=1, block=3_000):
            for number, fields in jobs:
                doing = asyncio.create_task(do(number, Job(**fields)))
                try:
                    await asyncio.shield(doing)
                finally:  # a signal does not interrupt it; a second one does
                    await doing
            if not jobs:
                begin = ">"


@asynccontextmanager
async def scheduling() -> AsyncIterator[None]:
    scheduler.start()
    try:
        yield
    finally:
        scheduler.shutdown()


@asynccontextmanager
async def listening() -> AsyncIterator[None]:
    bot.add_handler(MessageHandler(filters.TEXT, hear))
    async with bot:
        await bot.start()
        await bot.updater.start_polling()
        try:
            yield
        finally:
            await bot.updater.stop()
            await bot.stop()


async def main() -> None:
    async with (
        serving(make_asgi_app(), port=int(os.environ.get("METRICS_PORT", "9000")), stop_on_signals=True),
        redis,
        serving(api, port=int(os.environ.get("PORT", "8000"))),
        scheduling(),
        listening(),
    ):
        await work()


logging.basicConfig(level=logging.INFO, stream=sys.stdout)
logging.getLogger("httpx").setLevel(logging.WARNING)  # it would log the bot's token
asyncio.run(main())
