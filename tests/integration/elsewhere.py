"""
Run a program whose bot asks a server of the test: `python -m tests.integration.elsewhere LIBRARY URL PROGRAM`.

The libraries have an option for that, but the programs of the documentation do not need it.
"""

from __future__ import annotations

import logging
import runpy
import sys
from typing import Any


def aiogram(url: str) -> None:
    from aiogram.client.telegram import PRODUCTION, TelegramAPIServer

    vars(PRODUCTION).update(vars(TelegramAPIServer.from_base(url)))


def telegram(url: str) -> None:
    from telegram.ext import ApplicationBuilder

    build: Any = ApplicationBuilder.build
    ApplicationBuilder.build = lambda self: build(self.base_url(f"{url}/bot"))  # type: ignore[method-assign]


def discord(url: str) -> None:
    from discord.gateway import DiscordWebSocket
    from discord.http import Route
    from yarl import URL

    Route.BASE = f"{url}/api"
    DiscordWebSocket.DEFAULT_GATEWAY = URL(f"{url}/gateway").with_scheme("ws")


if __name__ == "__main__":
    _, library, url, program = sys.argv
    logging.basicConfig(level=logging.INFO, stream=sys.stdout)
    {"aiogram": aiogram, "discord": discord, "telegram": telegram}[library](url)
    runpy.run_path(program, run_name="__main__")
