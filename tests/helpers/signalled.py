"""
A program with a server, which prints what happens: python -m tests.helpers.signalled WAY MOMENT LOOP [SIGNAL ...]

At the given moment, it waits for signals. SIGUSR1 lets the request in flight complete.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from aioserve import Server, StartupError, serve, serving, start
from tests.conftest import LOOPS
from tests.helpers.apps import App
from tests.helpers.clients import connect, get


class Said(list[str]):
    """A list that prints what is appended."""

    def append(self, note: str) -> None:
        print(note, flush=True)


class Program:
    def __init__(self, way: str, moment: str, options: dict[str, Any]) -> None:
        self.way = way
        self.moment = moment
        self.app = App(startup="hangs" if moment == "startup" else "completes")
        self.app.events = Said()
        self.options = options
        self.enough = asyncio.Event()

    async def run(self) -> None:
        # Not by `add_signal_handler()`: the loop would be woken up by all other signals, too.
        loop = asyncio.get_running_loop()
        signal.signal(signal.SIGUSR1, lambda *_: loop.call_soon_threadsafe(self.app.release.set))
        app: Any = "tests.helpers.blocking_module:app" if self.moment == "import" else self.app
        driving = asyncio.create_task(self.drive())
        try:
            await WAYS[self.way](self, app)
        except StartupError as exc:
            print(f"{type(exc).__name__}: {exc}")
        finally:
            driving.cancel()
            await asyncio.wait({driving})
        print("the program goes on to its end")

    async def drive(self) -> None:
        """Be the client of the server."""
        if self.moment in ("stop", "second"):
            server = await self.found()
            async with connect(server) as connection:
                connection.ask("/hold")
                await self.app.holding.wait()
                if self.moment == "stop":
                    self.enough.set()
                    if self.way == "serve":
                        server.close()
                    await server.stopping.wait()
                print("holding", flush=True)
                await asyncio.Event().wait()

    async def found(self) -> Server:
        while not self.app.state or not self.app.state["aioserve"].is_serving():
            await asyncio.sleep(0)
        server: Server = self.app.state["aioserve"]
        return server

    async def by_serving(self, app: Any) -> None:
        async with serving(app, **self.options) as server:
            print("the body runs")
            try:
                await self.enough.wait()
            finally:
                if self.moment == "body":
                    print("the body says:", (await get(server)).text)
                print("the body is over")

    async def by_start(self, app: Any) -> None:
        server = await start(app, **self.options)
        print("the body runs")
        waiting = asyncio.create_task(self.enough.wait())
        closed = asyncio.create_task(server.wait_closed())
        await asyncio.wait({waiting, closed}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        await server.aclose()
        await closed

    async def by_serve(self, app: Any) -> None:
        await serve(app, **self.options)


WAYS: dict[str, Callable[[Program, Any], Awaitable[None]]] = {
    "serving": Program.by_serving,
    "start": Program.by_start,
    "serve": Program.by_serve,
}


def main() -> None:
    way, moment, loop, *signals = sys.argv[1:]
    options: dict[str, Any] = {"shutdown_timeout": None}
    if signals:
        options["stop_on_signals"] = [signal.Signals[name] for name in signals]
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(name)s: %(message)s")
    for name in ("asyncio", "httpx", "uvicorn.access"):
        logging.getLogger(name).setLevel(logging.WARNING)

    async def run() -> None:
        await Program(way, moment, options).run()

    with asyncio.Runner(**LOOPS[loop]) as runner:
        runner.run(run())


if __name__ == "__main__":
    main()
