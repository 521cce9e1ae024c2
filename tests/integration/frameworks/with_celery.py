"""
A worker of Celery with a broker in a directory: `python -m tests.integration.frameworks.with_celery MODE DIRECTORY`.

    main        the main process has a server, from its start to its end
    main, left  the same, and nobody stops the server
    children    each process of the pool has a server
    task        each task has a server

It prints what happens.
"""

from __future__ import annotations

import os
import sys
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from celery import Celery, signals
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from aioserve import ThreadServer, start_in_thread

MODE, DIRECTORY = sys.argv[1], Path(sys.argv[2])
(DIRECTORY / "control").mkdir()

celery = Celery("worker", broker="filesystem://")
celery.conf.broker_transport_options = {
    "data_folder_in": str(DIRECTORY),
    "data_folder_out": str(DIRECTORY),
    "control_folder": str(DIRECTORY / "control"),
}
celery.conf.worker_redirect_stdouts = False


def say(*words: object) -> None:
    """Print a line in one piece: several processes print."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


async def pid(request: Request) -> PlainTextResponse:
    return PlainTextResponse(str(os.getpid()))


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    yield
    say("lifespan over", os.getpid())


web = Starlette(routes=[Route("/", pid)], lifespan=lifespan)
servers: list[ThreadServer] = []


def begin(**_: object) -> None:
    servers.append(start_in_thread(web))


def end(**_: object) -> None:
    servers[0].stop()
    say("stopped", os.getpid())


if MODE.startswith("main"):
    signals.worker_init.connect(begin)
if MODE == "main":
    signals.worker_shutdown.connect(end)
if MODE == "children":
    signals.worker_process_init.connect(begin)
    signals.worker_process_shutdown.connect(end)


def ask(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as response:  # noqa: S310 (our own server)
        answer: str = response.read().decode()
        return answer


@celery.task(name="work")  # type: ignore[untyped-decorator]
def work() -> None:
    if MODE == "task":
        with start_in_thread(web) as server:
            say("asked", os.getpid(), ask(server.url))
    else:
        say("asked", os.getpid(), ask(servers[0].url))


@signals.worker_ready.connect  # type: ignore[untyped-decorator]
def ready(**_: object) -> None:
    say("ready", os.getpid())
    work.delay()


celery.worker_main(["worker", "--concurrency=1", "--without-gossip", "--without-mingle", "--loglevel=ERROR"])
