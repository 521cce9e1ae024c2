"""
A program with a page of NiceGUI, whose button stops the server: one server after the other, then two at once.

It prints what happens. It is a program of its own because NiceGUI's state belongs to the process.
"""

from __future__ import annotations

import asyncio
import os

os.environ.pop("PYTEST_CURRENT_TEST", None)  # with it, NiceGUI does not end what it has started

from fastapi import FastAPI, Request
from nicegui import app as gui
from nicegui import ui
from nicegui.server import Server as NiceGUIServer

from aioserve import ShutdownError, serving

app = FastAPI()


@ui.page("/")
def page(request: Request) -> None:
    ui.label("hello from a page")
    ui.button("Stop", on_click=lambda: request.state.aioserve.close())


ui.run_with(app)
gui.on_startup(lambda: print("startup"))
gui.on_connect(lambda: print("connected"))
gui.on_disconnect(lambda: print("disconnected"))
gui.on_shutdown(lambda: print("shutdown"))


def names_of_tasks() -> list[str]:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    return sorted({getattr(task.get_coro(), "__qualname__", "") for task in tasks})


async def main() -> None:
    for _ in range(2):
        async with serving(app) as server:
            print(server.url)
            await server.wait_closed()
        assert server.report is not None
        print("forced:", server.report.was_forced)
        print("left:", *names_of_tasks())

    async with serving(app) as server:
        try:
            gui.shutdown()
        except AttributeError:
            print("shutdown() knows no server")
        NiceGUIServer.instance = server.uvicorn
        gui.shutdown()
        await server.wait_closed()

    try:
        async with serving(app), serving(app):
            print("two at once")
    except ShutdownError:
        print("two at once fail to shut down")


asyncio.run(main())
