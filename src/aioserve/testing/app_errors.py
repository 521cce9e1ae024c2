"""
What left the app: raised by the client whose request it was, or shown in the report of a test that fails.

A server in a test calls its app through a `Recorder`, which passes on the very scope, `receive()` and `send()`. So that
it knows a request of a client of ours, that adds a header, which is taken out before the app is called.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import functools
import itertools
import secrets
import threading
import traceback
from collections.abc import AsyncIterator
from contextlib import aclosing
from types import ModuleType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from aioserve import _limits
from aioserve._server import Server

if TYPE_CHECKING:
    import pytest

    from aioserve._types import ASGIApp, Receive, Scope, Send

_HEADER = b"aioserve-request"
_PREFIX = secrets.token_hex(8)
_numbers = itertools.count()
_sent: dict[bytes, Call] = {}  # requests of our clients that have not reached a server yet
_running: set[Call] = set()
_untaken: collections.deque[str] = collections.deque(maxlen=_limits.SHOWN_EXCEPTIONS)  # what no client of ours raises
_has_failed = False  # the test that runs now


class Call:
    """A call of an app for a request or WebSocket."""

    has_begun: bool = False
    error: BaseException | None = None
    _thread: int | None = None  # of the server
    _description: str = ""
    _is_settled: bool = False  # what it raises from here on is shown in a report

    def __init__(self) -> None:
        self.ended: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._lock = threading.Lock()  # the client may run in another thread than the server

    async def run(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> Any:
        """Call the app, and keep what it raises."""
        __tracebackhide__ = True
        self.has_begun = True
        self._thread = threading.get_ident()
        _running.add(self)
        try:
            return await app(scope, receive, send)
        except BaseException as exc:
            if isinstance(exc, (asyncio.CancelledError, GeneratorExit, KeyboardInterrupt)):
                raise
            with self._lock:
                self.error = exc
                self._description = _describe(scope, exc)
                if self._description and self._is_settled:
                    _untaken.append(self._description)
            raise
        finally:
            _running.discard(self)
            self.ended.set_result(None)

    async def wait(self) -> None:
        """Wait until it has ended, if it has begun; for a limited time."""
        if self.has_begun and not self.ended.done() and asyncio._get_running_loop() is not None:
            await asyncio.wait([asyncio.wrap_future(self.ended)], timeout=_limits.RAISING_HANDLER)

    def take(self) -> BaseException | None:
        """Return what it has raised up to now, which is raised by the caller, and not shown."""
        with self._lock:
            self._is_settled = self._is_settled or self.error is not None
            return self.error

    def show(self) -> None:
        """Let the report of a failure show what it has raised and was not taken, or raises from here on."""
        with self._lock:
            if self._description and not self._is_settled:
                _untaken.append(self._description)
            self._is_settled = True

    def runs_elsewhere(self) -> bool:
        """Whether it runs in another thread."""
        return self._thread != threading.get_ident()


def _describe(scope: Scope, error: BaseException) -> str:
    """Return what a report shows of an exception; nothing, if that only says that the client has gone."""
    if _is_disconnect(error):
        return ""
    frames = error.__traceback__ and error.__traceback__.tb_next  # without ours
    lines = "".join(traceback.format_exception(type(error), error, frames))
    return f"{scope.get('method', 'WebSocket')} {scope['path']!r}\n{lines[-_limits.TRACEBACK_CHARACTERS :]}"


def _is_disconnect(error: BaseException) -> bool:
    """Whether it only says that the client has gone, by the names that uvicorn, Starlette and Litestar have for it."""
    if isinstance(error, BaseExceptionGroup):
        return all(map(_is_disconnect, error.exceptions))
    return type(error).__name__ in ("ClientDisconnect", "ClientDisconnected", "WebSocketDisconnect")


class Recorder:
    """An app that calls another one, and records what leaves that."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Any:
        """Call the app; no frame of this function is in a traceback."""
        if scope["type"] == "lifespan":  # of another server with this Config
            return self._app(scope, receive, send)
        call = _taken_from(scope["headers"])
        if call is None:
            call = Call()
            call.show()
        return call.run(self._app, scope, receive, send)


def _taken_from(headers: list[tuple[bytes, bytes]]) -> Call | None:
    """Take out the header of our clients, and return the call that it names."""
    for index, (name, value) in enumerate(headers):
        if name == _HEADER:
            del headers[index]
            return _sent.pop(value, None)
    return None


def record(server: Server) -> None:
    """Record what leaves the app of a running server, in answer to connections that are made from here on."""
    config = server._engine.settings.config
    if not isinstance(config.loaded_app, Recorder):
        config.loaded_app = Recorder(config.loaded_app)


class RaisingTransport:
    """A transport of httpx or httpx2 that raises what leaves the app of a server in answer to its requests."""

    def __init__(self, transport: Any, module: ModuleType, server: Server) -> None:
        record(server)
        self._transport = transport
        self._module: Any = module
        self._engine = server._engine
        self._places = {urlsplit(url).netloc for url in server.urls}
        self._places |= {f"localhost:{listener.port}" for listener in self._engine.listeners}
        self._is_unix = self._engine.listeners[0].port is None  # a client uses the first URL

    async def handle_async_request(self, request: Any) -> Any:
        """Send a request, or raise what the app raises."""
        __tracebackhide__ = True
        if not self._goes_to_server(request.url):
            return await self._transport.handle_async_request(request)
        call = Call()
        token = f"{_PREFIX}-{next(_numbers)}".encode()
        _sent[token] = call
        # A copy, since the test can look at the request.
        marked = self._module.Request(
            request.method,
            request.url,
            headers=[*request.headers.raw, (_HEADER, token)],
            stream=request.stream,
            extensions=request.extensions,
        )
        try:
            response = await self._send(marked, call)
        except BaseException:
            call.show()
            raise
        finally:
            _sent.pop(token, None)
        response.stream = _stream_class(self._module)(response.stream, call)
        return response

    def _goes_to_server(self, url: Any) -> bool:
        port = url.port or (443 if url.scheme == "https" else 80)
        host = f"[{url.host}]" if ":" in url.host else url.host
        return not self._engine.closed.is_set() and (self._is_unix or f"{host}:{port}" in self._places)

    async def _send(self, request: Any, call: Call) -> Any:
        __tracebackhide__ = True
        response = None
        try:
            response = await self._transport.handle_async_request(request)
            if response.status_code == 500:  # a middleware may have sent it, and raise then
                await call.wait()
        except self._module.TransportError as exc:
            if await _is_ours(exc, call, self._module):
                raise
        except BaseException:
            if response is not None:
                await response.aclose()
            raise
        error = call.take()
        if error is None:
            return response
        if response is not None:
            await response.aclose()
        raise error  # here, and not where the client's is handled, which would become its context

    async def aclose(self) -> None:
        """Close its connections."""
        await self._transport.aclose()

    async def __aenter__(self) -> RaisingTransport:
        await self._transport.__aenter__()
        return self

    async def __aexit__(self, *exc_info: Any) -> None:
        await self._transport.__aexit__(*exc_info)


async def _is_ours(error: Exception, call: Call, module: Any) -> bool:
    """Whether an error is the client's own: not the end of a connection that was closed since the app has raised."""
    if isinstance(error, module.TimeoutException):
        return True
    await call.wait()
    return call.error is None


@functools.cache
def _stream_class(module: Any) -> Any:
    class RaisingStream(module.AsyncByteStream):  # type: ignore[misc]
        """The body of a response."""

        def __init__(self, stream: Any, call: Call) -> None:
            self._stream = stream
            self._call = call

        async def __aiter__(self) -> AsyncIterator[bytes]:
            __tracebackhide__ = True
            try:
                async with aclosing(aiter(self._stream)) as parts:
                    async for part in parts:
                        yield part
            except module.TransportError as exc:
                if await _is_ours(exc, self._call, module):
                    raise
            error = self._call.take()
            if error is not None:
                raise error

        async def aclose(self) -> None:
            try:
                await self._stream.aclose()
            finally:
                self._call.show()

    return RaisingStream


def add_section(report: pytest.TestReport) -> None:
    """Add what no client has raised to the report of a test that fails."""
    global _has_failed
    _has_failed = _has_failed or report.failed
    if _has_failed:
        # Those in this thread go on when its loop runs again: when fixtures end, or not at all.
        running = [call.ended for call in tuple(_running) if call.runs_elsewhere()]
        concurrent.futures.wait(running, timeout=_limits.LATE_EXCEPTIONS)
        shown = [_untaken.popleft() for _ in range(len(_untaken))]
        if shown:
            when = "" if report.failed else f", until its {report.when}"  # pytest looks for this word
            report.sections.append((f"aioserve: what left the app{when}", "\n".join(shown)))
    if report.when == "teardown":
        _has_failed = False
        _untaken.clear()
