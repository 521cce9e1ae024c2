"""
An asyncio program with a web server inside.

    python -m aioserve.demo

A worker counts. An app shows the count as JSON, as an endless stream of events and over a WebSocket, and a client calls
all three. The worker, the server and the client run in one loop. Then the app's page can be opened in a browser.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

try:
    import httpx
    from fastapi import FastAPI, Request, WebSocket, WebSocketDisconnect
    from fastapi.responses import HTMLResponse, StreamingResponse
    from websockets.asyncio.client import connect
except ImportError as _missing:
    sys.exit(f"The demo requires {_missing.name}; install it with pip install 'aioserve-asgi[demo]'")

from aioserve import Server, StartupInterruptedError, serving


class Worker:
    """The program's real work; here, it counts."""

    def __init__(self) -> None:
        self.count: int = 0
        self._counted = asyncio.Event()

    async def run(self) -> None:
        """Count until cancelled."""
        while True:
            await asyncio.sleep(0.1)
            self.count += 1
            self._counted.set()
            self._counted = asyncio.Event()

    async def counted(self, server: Server) -> None:
        """Wait until the next count, or until the server is asked to stop."""
        waiting = [asyncio.ensure_future(event.wait()) for event in (self._counted, server.stopping)]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in waiting:
                each.cancel()


def make_app(worker: Worker) -> FastAPI:
    """Make the app, which can use the worker directly, since both run in one loop."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, float]]:
        print("  app: started")
        yield {"since": time.time()}
        print("  app: shut down, after the last request")

    app = FastAPI(lifespan=lifespan)

    @app.get("/")
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE)

    @app.get("/count")
    async def count(request: Request) -> dict[str, Any]:
        return {"count": worker.count, "since": request.state.since, "served": request.state.aioserve.stats.served}

    @app.get("/events")
    async def events(request: Request) -> StreamingResponse:
        server: Server = request.state.aioserve

        async def counts() -> AsyncIterator[str]:
            while not server.stopping.is_set():  # so that the stream ends when the server stops
                yield f"data: {worker.count}\n\n"
                await worker.counted(server)

        return StreamingResponse(counts(), media_type="text/event-stream")

    @app.websocket("/echo")
    async def echo(websocket: WebSocket) -> None:
        await websocket.accept()
        with contextlib.suppress(WebSocketDisconnect):
            while True:
                await websocket.send_text(f"{await websocket.receive_text()} ({worker.count})")

    return app


async def call_everything(server: Server) -> None:
    """Call the server from a client in the same loop."""
    async with httpx.AsyncClient(base_url=server.url, trust_env=False) as client:
        print("  GET /count:     ", (await client.get("/count")).text)
        async with client.stream("GET", "/events") as response:
            lines = (line async for line in response.aiter_lines() if line)
            print("  GET /events:    ", ", ".join([await anext(lines) for _ in range(3)]), "...")
    async with connect(server.url.replace("http", "ws") + "/echo", proxy=None) as websocket:
        await websocket.send("hello")
        print("  WebSocket /echo:", await websocket.recv())


async def main(port: int, *, once: bool) -> bool:
    """Run the worker, the server and the client in one loop; return whether anything had to be forced."""
    worker = Worker()
    working = asyncio.create_task(worker.run())
    before = time.perf_counter()
    server: Server | None = None
    try:
        async with serving(make_app(worker), port=port, stop_on_signals=True) as server:
            took = time.perf_counter() - before
            print(f"started in {took * 1000:.1f} ms, with the import of uvicorn" + (f": {server.url}" if once else ""))
            await call_everything(server)
            if not once:
                print(f"open {server.url} in a browser; Ctrl+C stops, --port {server.port} uses this port again")
                await server.wait_closed()
    finally:
        working.cancel()
        report = None if server is None else server.report
        if report is not None:
            print(f"stopped in {report.duration * 1000:.1f} ms")
    return report is None or report.was_forced


PAGE: str = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>aioserve</title>
<style>
  :root { color-scheme: light dark }
  body { font: 1.1rem/1.5 system-ui, sans-serif; max-width: 40rem; margin: 3rem auto; padding: 0 1rem }
  output { font-weight: 600; font-variant-numeric: tabular-nums }
</style>
<h1>One loop, three ways to talk</h1>
<p>A worker counts, and this page shows the count in three ways. All of it is one asyncio program.</p>
<ul>
  <li><code>GET /count</code>, once a second: <output id="count">…</output>
  <li><code>GET /events</code>, an endless stream: <output id="events">…</output>
  <li><code>WebSocket /echo</code>, once a second: <output id="echo">…</output>
</ul>
<p>When the program stops, the stream ends, and the WebSocket closes with <code>1012</code>. When it is started again on
the same port, this page continues.</p>
<script>
  const show = (id, text) => document.getElementById(id).textContent = text
  const lost = "no server"

  const ask = async () => {
    try { show("count", (await (await fetch("count")).json()).count) } catch { show("count", lost) }
    setTimeout(ask, 1000)
  }
  ask()

  const events = new EventSource("events")
  events.onmessage = event => show("events", event.data)
  events.onerror = () => show("events", lost)

  const connect = () => {
    const socket = new WebSocket(location.href.replace("http", "ws") + "echo")
    socket.onopen = () => socket.send("hello")
    socket.onmessage = event => {
      show("echo", event.data)
      setTimeout(() => socket.readyState === WebSocket.OPEN && socket.send("hello"), 1000)
    }
    socket.onclose = event => {
      show("echo", `closed: ${event.code}`)
      setTimeout(connect, 1000)
    }
  }
  connect()
</script>
"""


def command_line() -> None:
    """Run the demo as its arguments say; the exit codes are those of the command line."""
    parser = argparse.ArgumentParser(prog="python -m aioserve.demo", description="A program with a server inside.")
    parser.add_argument("--port", type=int, default=0, help="the port to serve on; 0, the default, takes a free port")
    parser.add_argument("--once", action="store_true", help="exit after the calls; do not wait for a browser")
    arguments = parser.parse_args()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # also where it is no terminal
    with contextlib.suppress(KeyboardInterrupt, StartupInterruptedError):  # a signal before the start
        try:
            sys.exit(asyncio.run(main(arguments.port, once=arguments.once)))
        except (OSError, ValueError) as exc:  # the port is busy or invalid
            print(f"The demo cannot start: {exc}", file=sys.stderr)
            sys.exit(3)


if __name__ == "__main__":
    command_line()
