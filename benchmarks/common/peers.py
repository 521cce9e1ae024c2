"""
The servers that are compared: each started and stopped in the running loop, in its best way, on an event if it has one.

All serve the same app (aiohttp its like), with a lifespan, on a free port of 127.0.0.1, with a backlog of 2048 and
without logs. Each gives requests in flight `GRACE` seconds at its stop (but granian, which has no option for it), and
idle connections more time than we have. The environment can set another `GRACE`, for a run that only tries the scripts.

Each function below is called once, to import and to make what one server after another can share; what it returns is
timed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, NamedTuple, cast

HOST = "127.0.0.1"
BACKLOG = 2048
GRACE = int(os.environ.get("GRACE", "3"))
KEEP_ALIVE = 75

HELLO = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello"


class Running(NamedTuple):
    """A server that has started."""

    port: Callable[[], int]
    stop: Callable[[], Awaitable[object]]


Start = Callable[[], Awaitable[Running]]


async def app(scope: Any, receive: Any, send: Any) -> None:
    """A lifespan that does nothing; a page; a WebSocket; and, at "/stream", events without an end."""
    if scope["type"] == "lifespan":
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})
    elif scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        while (await receive())["type"] != "websocket.disconnect":
            pass
    elif scope["path"] == "/stream":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        await send({"type": "http.response.body", "body": b"data: hello\n\n", "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass
    else:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
        await send({"type": "http.response.body", "body": b"hello"})


def bare() -> Start:
    """Asyncio's own server, with a protocol that says hello and knows its connections: what the others are built on."""
    transports: set[asyncio.Transport] = set()

    class Hello(asyncio.Protocol):
        gone: asyncio.Event

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
            transports.add(self.transport)

        def data_received(self, data: bytes) -> None:
            self.transport.write(HELLO)

        def connection_lost(self, exc: Exception | None) -> None:
            transports.discard(self.transport)
            if not transports:
                self.gone.set()

    async def start() -> Running:
        Hello.gone = gone = asyncio.Event()
        server = await asyncio.get_running_loop().create_server(Hello, HOST, 0, backlog=BACKLOG)

        async def stop() -> None:
            server.close()
            for transport in list(transports):
                transport.close()
            if transports:
                await gone.wait()
            await server.wait_closed()

        return Running(lambda: _port(server.sockets[0]), stop)

    return start


def sketch() -> Start:
    """
    What an ASGI server is at least, if its end is to be waited for: a task for the lifespan, and one for the server.

    It has not one error path, and no HTTP.
    """

    async def serve(port: asyncio.Future[int], ask: asyncio.Future[None], closed: asyncio.Event) -> None:
        loop = asyncio.get_running_loop()
        started, stopping = loop.create_future(), loop.create_future()
        messages = iter(("lifespan.startup", "lifespan.shutdown"))

        async def receive() -> dict[str, str]:
            message = next(messages)
            if message == "lifespan.shutdown":
                await stopping
            return {"type": message}

        async def send(message: Any) -> None:
            if message["type"] == "lifespan.startup.complete":
                started.set_result(None)

        lifespan = _start_task(app({"type": "lifespan", "state": {}}, receive, send))
        await started
        server = await loop.create_server(asyncio.Protocol, HOST, 0, backlog=BACKLOG)
        port.set_result(_port(server.sockets[0]))
        await ask
        server.close()
        await server.wait_closed()
        stopping.set_result(None)
        await lifespan
        closed.set()

    async def start() -> Running:
        loop = asyncio.get_running_loop()
        port, ask, closed = loop.create_future(), loop.create_future(), asyncio.Event()
        task = _start_task(serve(port, ask, closed))
        listening = await port

        async def stop() -> None:
            ask.set_result(None)
            await closed.wait()
            assert task.done()

        return Running(lambda: listening, stop)

    return start


def _start_task(coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """Make a task, and run its first step at once where asyncio can do that (Python 3.12 and later)."""
    if sys.version_info >= (3, 12):
        return asyncio.Task(coroutine, loop=asyncio.get_running_loop(), eager_start=True)
    return asyncio.create_task(coroutine)


def aioserve(*, keep: bool = False, **options: Any) -> Start:
    """
    `async with serving(app)`, in its two halves.

    Args:
        keep: Whether to keep the connections until the server has stopped. A version whose connections are part of
            reference cycles leaves them to the garbage collector, which would look like a quicker stop.
        options: Those of `serving()`.
    """
    from aioserve import serving

    settings = {"access_log": False, "timeout_keep_alive": KEEP_ALIVE, **options}

    async def start() -> Running:
        block = serving(app, shutdown_timeout=GRACE, **settings)
        server = await block.__aenter__()
        connections = server.uvicorn.server_state.connections if keep else ()

        async def stop() -> None:
            kept = [(connection, connection.transport) for connection in connections]
            await block.__aexit__(None, None, None)
            asyncio.get_running_loop().call_soon(kept.clear)

        return Running(lambda: server.port or 0, stop if keep else lambda: block.__aexit__(None, None, None))

    return start


def aioserve_thread(**options: Any) -> Start:
    """`start_in_thread()`, in place of the popular snippet."""
    from aioserve import start_in_thread

    settings = {"access_log": False, "timeout_keep_alive": KEEP_ALIVE, **options}

    async def start() -> Running:
        server = start_in_thread(app, shutdown_timeout=GRACE, **settings)

        async def stop() -> None:
            server.stop()

        return Running(lambda: server.port or 0, stop)

    return start


def websockets() -> Start:
    """Its own `serve()`, without HTTP and without a lifespan: for questions about WebSockets."""
    from websockets.asyncio.server import ServerConnection, serve

    async def read(connection: ServerConnection) -> None:
        async for _ in connection:
            pass

    async def start() -> Running:
        server = await serve(read, HOST, 0, backlog=BACKLOG)

        async def stop() -> None:
            server.close()
            await server.wait_closed()

        return Running(lambda: _port(server.sockets[0]), stop)

    return start


def aiohttp(*, anew: bool = False) -> Start:
    """
    `AppRunner` and `TCPSite`; WebSockets and streams are ended by `on_shutdown`, as its documentation advises.

    Args:
        anew: Whether each server gets an `Application` of its own, as there, though it could have the last one's.
    """
    from aiohttp import WSCloseCode, web

    sockets: weakref.WeakSet[web.WebSocketResponse] = weakref.WeakSet()
    streams: set[asyncio.Event] = set()

    async def hello(request: web.Request) -> web.Response:
        return web.Response(body=b"hello")

    async def websocket(request: web.Request) -> web.WebSocketResponse:
        response = web.WebSocketResponse()
        await response.prepare(request)
        sockets.add(response)
        async for _ in response:
            pass
        return response

    async def stream(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data: hello\n\n")
        stop = asyncio.Event()
        streams.add(stop)
        try:
            await stop.wait()
        finally:
            streams.discard(stop)
        return response

    async def end_all(application: web.Application) -> None:
        for stop in streams:
            stop.set()
        for response in set(sockets):
            await response.close(code=WSCloseCode.GOING_AWAY, message=b"stop")

    async def nothing(application: web.Application) -> None:
        pass

    def make() -> web.Application:
        application = web.Application()
        application.router.add_get("/", hello)
        application.router.add_get("/ws", websocket)
        application.router.add_get("/stream", stream)
        application.on_startup.append(nothing)
        application.on_shutdown.append(end_all)
        application.on_cleanup.append(nothing)
        return application

    application = make()

    async def start() -> Running:
        runner = web.AppRunner(
            make() if anew else application, access_log=None, keepalive_timeout=KEEP_ALIVE, shutdown_timeout=GRACE
        )
        await runner.setup()
        await web.TCPSite(runner, HOST, 0, backlog=BACKLOG).start()
        return Running(lambda: int(runner.addresses[0][1]), runner.cleanup)

    return start


def _configured(config: Any) -> Any:
    """Set what hypercorn and anycorn, a fork of it, call by the same names."""
    config.bind = [f"{HOST}:0"]
    config.backlog = BACKLOG
    config.errorlog = config.accesslog = None
    config.graceful_timeout = GRACE
    config.keep_alive_timeout = KEEP_ALIVE
    return config


def hypercorn() -> Start:
    """Its `serve()` with a `shutdown_trigger`; that it has started, and where, it says only in its log."""
    from hypercorn.asyncio import serve
    from hypercorn.config import Config
    from hypercorn.logging import Logger

    class Announcing(Logger):
        started: asyncio.Future[str]

        async def info(self, message: str, *args: Any, **kwargs: Any) -> None:
            if message.startswith("Running on "):
                self.started.set_result(message)

    async def start() -> Running:
        config = _configured(Config())
        config.logger_class = Announcing
        Announcing.started = started = asyncio.get_running_loop().create_future()
        ask = asyncio.Event()
        # Its types know one framework's app only.
        running = asyncio.create_task(serve(app, config, shutdown_trigger=ask.wait))  # type: ignore[arg-type, unused-ignore]
        message = await started

        async def stop() -> None:
            ask.set()
            await running

        return Running(lambda: int(message.split("://")[1].split(" ")[0].rpartition(":")[2]), stop)

    return start


def anycorn() -> Start:
    """Its `serve()` with a `shutdown_trigger`, and a `task_status` that is told the addresses."""
    from anycorn import Config, serve

    class Status:
        def __init__(self) -> None:
            self.addresses: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()

        def started(self, value: Any = None) -> None:
            self.addresses.set_result(value)

    async def start() -> Running:
        config = _configured(Config())
        status, ask = Status(), asyncio.Event()
        running = asyncio.create_task(serve(app, config, shutdown_trigger=ask.wait, task_status=status))  # type: ignore[arg-type, unused-ignore]
        addresses = await status.addresses

        async def stop() -> None:
            ask.set()
            await running

        return Running(lambda: int(addresses[0].rpartition(":")[2].rstrip("/")), stop)

    return start


def h2corn() -> Start:
    """Its `Server` in a task, with `wait_started()` and `shutdown()`; no option stops its banner, so we do."""
    from h2corn import Config, Server, _lib

    _lib.emit_banner = lambda *args, **kwargs: None

    config = Config(
        bind=(f"{HOST}:0",),
        backlog=BACKLOG,
        access_log=False,
        timeout_graceful_shutdown=GRACE,
        timeout_keep_alive=KEEP_ALIVE,
    )

    async def start() -> Running:
        server = Server(app, config)
        running = asyncio.create_task(server.serve())
        await server.wait_started()

        async def stop() -> None:
            server.shutdown()
            await running

        return Running(lambda: int(server.addresses[0].rpartition(":")[2]), stop)

    return start


def granian() -> Start:
    """
    Its embedded `Server`, which it calls experimental, in a task; it does not say when it has started.

    So the app does, with its lifespan; what follows is Rust's. It cannot say which free port it has taken either, so it
    is given one.
    """
    from granian.constants import HTTPModes, Interfaces
    from granian.http import HTTP1Settings
    from granian.server.embed import Server

    with socket.socket() as free:
        free.bind((HOST, 0))
        port = _port(free)

    async def start() -> Running:
        started = asyncio.Event()

        async def telling(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] != "lifespan":
                return await app(scope, receive, send)

            async def send_and_tell(message: Any) -> None:
                await send(message)
                started.set()

            return await app(scope, receive, send_and_tell)

        server = Server(
            telling,
            address=HOST,
            port=port,
            interface=Interfaces.ASGI,
            http=HTTPModes.http1,
            http1_settings=HTTP1Settings(header_read_timeout=KEEP_ALIVE * 1000),
            backlog=BACKLOG,
            backpressure=4 * BACKLOG,  # its limit of connections
            log_enabled=False,
        )
        running = asyncio.create_task(server.serve())
        await started.wait()

        async def stop() -> None:
            server.stop()  # type: ignore[no-untyped-call]
            await running

        return Running(lambda: port, stop)

    return start


def uvicorn_config(**options: Any) -> Any:
    """What uvicorn is given in all its ways; the same as ours."""
    import uvicorn

    settings = {"port": 0, "access_log": False, "timeout_keep_alive": KEEP_ALIVE, **options}
    return uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=GRACE, **settings)


def uvicorn_task(**options: Any) -> Start:
    """
    `uvicorn.Server.serve()` in a task, looked at on every turn, which is as soon as a loop can know.

    Without its signal handlers, which are not asked about.
    """
    import uvicorn

    async def start() -> Running:
        server = uvicorn.Server(uvicorn_config(**options))
        server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]
        running = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0)

        async def stop() -> None:
            server.should_exit = True
            await running

        return Running(lambda: _port(server.servers[0].sockets[0]), stop)

    return start


def uvicorn_thread(**options: Any) -> Start:
    """`uvicorn.Server.run()` in a thread, polled each millisecond, as the popular snippet does."""
    import uvicorn

    async def start() -> Running:
        uvloop = type(asyncio.get_running_loop()).__module__.startswith("uvloop")
        server = uvicorn.Server(uvicorn_config(loop="uvloop" if uvloop else "asyncio", **options))
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            time.sleep(0.001)

        async def stop() -> None:
            server.should_exit = True
            thread.join()

        return Running(lambda: _port(server.servers[0].sockets[0]), stop)

    return start


def _port(listening: Any) -> int:
    port: int = listening.getsockname()[1]
    return port


PEERS: dict[str, Callable[[], Start]] = {
    "bare": bare,
    "sketch": sketch,
    "aioserve": aioserve,
    "aioserve, thread": aioserve_thread,
    "aiohttp": aiohttp,
    "aiohttp, new app": partial(aiohttp, anew=True),
    "hypercorn": hypercorn,
    "anycorn": anycorn,
    "h2corn": h2corn,
    "granian": granian,
    "websockets": websockets,
    "uvicorn, task": uvicorn_task,
    "uvicorn, thread": uvicorn_thread,
}
