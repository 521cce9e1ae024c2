"""
Apps that are swapped again and again, under load from clients in another process.
"""

from __future__ import annotations

import asyncio
import gc
import json
import subprocess
import sys
import tracemalloc
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import pytest

from aioserve import Swappable, serving
from tests.helpers.plain import Plain
from tests.helpers.turns import turns

LOAD = Path(__file__).parents[1] / "helpers" / "load.py"
SWAPS = 200
WARM_UP = 50
CLIENTS = 20

# How many bytes a swap may leave in memory: fewer than a task with its coroutine. Some 35,000 in all were measured, for
# 200 swaps as for 2,000.
LEFT_BY_A_SWAP = 500


class Counting:
    """An app that counts its lifespans, and sets an event when it has answered a number of requests."""

    lives: ClassVar = Counter[str]()
    late: ClassVar = Counter[str]()
    swappable: ClassVar[Swappable]

    def __init__(self) -> None:
        self.left = 2 * CLIENTS
        self.enough = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            self.lives["started"] += 1
            scope["state"]["app"] = id(self)
            await send({"type": "lifespan.startup.complete"})
            assert await receive() == {"type": "lifespan.shutdown"}
            self.lives["ended"] += 1
            await send({"type": "lifespan.shutdown.complete"})
            return
        await turns(30)  # so that swaps come in the middle of requests
        assert scope["state"]["app"] == id(self)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
        await send({"type": "http.response.body", "body": b"hello"})
        self.late["answered"] += self.swappable.app is not self
        self.left -= 1
        if self.left <= 0:
            self.enough.set()


@pytest.mark.parametrize("kind", ["fresh", "kept-alive"])
@pytest.mark.parametrize("server", [serving, Plain], ids=["serving", "uvicorn.Server"])
@pytest.mark.timeout(300)
async def test_two_hundred_swaps_lose_no_request(server: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each app's lifespan begins and ends once, and nothing is left of the app."""
    monkeypatch.setattr(Counting, "lives", Counter())
    monkeypatch.setattr(Counting, "late", Counter())
    apps = weakref.WeakSet[Counting]()

    def make() -> Counting:
        app = Counting()
        apps.add(app)
        return app

    def traced() -> int:
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    swappable = Swappable(make())
    monkeypatch.setattr(Counting, "swappable", swappable, raising=False)
    async with server(swappable) as running:
        command = [sys.executable, str(LOAD), str(running.port), str(CLIENTS), kind]
        with (
            ThreadPoolExecutor(1) as executor,
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as load,  # noqa: ASYNC220, S603
        ):
            assert load.stdin is not None
            assert load.stdout is not None
            counting = asyncio.get_running_loop().run_in_executor(executor, load.stdout.read)
            for swap in range(SWAPS):
                if swap == WARM_UP:
                    tracemalloc.start()
                    before = traced()
                app: Any = swappable.app
                enough = asyncio.create_task(app.enough.wait())
                await asyncio.wait({enough, counting}, return_when=asyncio.FIRST_COMPLETED)
                assert enough.done(), "a client got something that is not an answer, and all clients have ended"
                await swappable.swap(make())
            del app, enough
            load.stdin.close()
            counted = await counting
            assert load.wait() == 0
        left = traced() - before
        tracemalloc.stop()
        assert list(apps) == [swappable.app]
        assert Counting.lives == {"started": SWAPS + 1, "ended": SWAPS}
    assert Counting.lives == {"started": SWAPS + 1, "ended": SWAPS + 1}

    counts = json.loads(counted)
    assert Counting.late["answered"] > 0  # by apps that were no longer the current one
    assert counts["answered"] >= 2 * CLIENTS * SWAPS
    assert (counts["unanswered"], counts["broken"]) == (0, 0)
    assert left < LEFT_BY_A_SWAP * (SWAPS - WARM_UP)
