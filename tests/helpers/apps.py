"""
Small ASGI apps, named after what they do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

Message = dict[str, Any]
Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class AppError(Exception):
    """Raised by the apps, and never by aioserve."""


class App:
    """
    Answers every path with "hello", and records in `events` what its lifespan and its handlers do.

    Args:
        startup: What the lifespan does when it starts: "completes", "raises", "raises early" (before receive()),
            "fails" (with startup.failed, and then raises), "fails quietly" (and returns), "fails without a word" (no
            message), "fails and hangs", "hangs", "returns" (sends nothing).
        shutdown: What it does at its end: "completes", "raises", "fails" (with shutdown.failed), "hangs",
            "clings" (hangs, and swallows its cancellation until `release` is set), "receives on".
    """

    def __init__(self, startup: str = "completes", shutdown: str = "completes") -> None:
        self.startup = startup
        self.shutdown = shutdown
        self.events: list[str] = []
        self.state: dict[str, Any] | None = None
        """The state of the lifespan, once that has begun."""
        self.error: BaseException = AppError("the app's own")
        self.crash = asyncio.Event()
        """When it is set, the lifespan raises `error` while the app is served."""
        self.release = asyncio.Event()
        """The handlers of "/hold" and "/cling" wait for it."""
        self.holding = asyncio.Event()
        """Set when a handler has begun to wait for `release`."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            try:
                await self.lifespan(scope, receive, send)
            finally:
                self.events.append("lifespan over")
        elif scope["type"] == "websocket":
            await self.websocket(receive, send)
        else:
            await self.request(scope, receive, send)

    async def lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.state = scope["state"]
        if self.startup == "raises early":
            raise self.error
        await receive()
        self.events.append("startup")
        match self.startup:
            case "raises":
                raise self.error
            case "fails":
                await send({"type": "lifespan.startup.failed", "message": "as told"})
                raise self.error
            case "fails quietly":
                await send({"type": "lifespan.startup.failed", "message": "as told"})
                return
            case "fails without a word":
                await send({"type": "lifespan.startup.failed", "message": None})
                return
            case "fails and hangs":
                await send({"type": "lifespan.startup.failed", "message": "as told"})
                await asyncio.Event().wait()
            case "hangs":
                await asyncio.Event().wait()
            case "returns":
                return
        scope["state"]["greeting"] = "hello"
        await send({"type": "lifespan.startup.complete"})

        stop = asyncio.ensure_future(receive())
        crash = asyncio.ensure_future(self.crash.wait())
        try:
            await asyncio.wait({stop, crash}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            crash.cancel()
            if not stop.done():
                stop.cancel()
        if self.crash.is_set():
            raise self.error

        self.events.append("shutdown")
        match self.shutdown:
            case "raises":
                raise self.error
            case "fails":
                await send({"type": "lifespan.shutdown.failed", "message": "as told"})
                raise self.error
            case "hangs":
                await asyncio.Event().wait()
            case "clings":
                await self.cling()
        await send({"type": "lifespan.shutdown.complete"})
        if self.shutdown == "receives on":
            await receive()

    async def request(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.events.append(f"{scope['method']} {scope['path']}")
        try:
            match scope["path"]:
                case "/hold":
                    self.holding.set()
                    await self.release.wait()
                case "/cling":
                    await self.cling()
                case "/close":
                    scope["state"]["aioserve"].close()
                case "/exit":
                    raise SystemExit(7)
                case "/stream":
                    await self.stream(send)
                    return
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
            await send({"type": "http.response.body", "body": scope["state"].get("greeting", "hello").encode()})
            self.events.append(f"answered {scope['path']}")
        except asyncio.CancelledError:
            self.events.append(f"cancelled {scope['path']}")
            raise

    async def stream(self, send: Send) -> None:
        """Send a stream that does not end by itself, like an event stream."""
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"data: 0\n\n", "more_body": True})
        await self.release.wait()
        await send({"type": "http.response.body", "body": b"data: 1\n\n"})

    async def websocket(self, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            await send({"type": "websocket.send", "text": message["text"]})
        self.events.append(f"websocket {message['code']}")

    async def cling(self) -> None:
        self.holding.set()
        while not self.release.is_set():
            try:
                await self.release.wait()
            except asyncio.CancelledError:
                self.events.append("clung")


async def without_lifespan(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request; a lifespan is not supported."""
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    await send({"type": "http.response.body", "body": b"hello"})


def factory() -> App:
    """Make an app."""
    return App()


def broken_factory() -> App:
    """Raise instead of making an app."""
    raise AppError("the factory's own")


async def async_factory() -> App:
    """Look like a factory, and be a coroutine function."""
    return App()


not_callable = 42
