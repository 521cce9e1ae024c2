"""What a user holds of a running server."""

from __future__ import annotations

import asyncio
import math
import socket
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self

import anyio
import uvicorn

from aioserve._engine import Engine
from aioserve._errors import add_note, describe_error, public
from aioserve._limits import check_timeout
from aioserve._log import logger
from aioserve._report import Report, Stats
from aioserve._server_task import ServerTask
from aioserve._waiting import outlast


class ServerHandle:
    """How a running server is found, closed, and waited for."""

    _engine: ServerTask
    _awaited: bool = False  # its end was awaited, so its error was raised; a test need not raise it again

    def __init__(self, engine: ServerTask) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()

    @property
    def url(self) -> str:
        """
        Where a client on this machine reaches it, like ``"http://127.0.0.1:8000"``: without a slash at the end.

        A wildcard address becomes loopback; IPv6 is in brackets. For a Unix socket it is
        ``"http+unix://%2Frun%2Fapp.sock"``, with the percent-encoded path in place of the host. It stays when the
        server has closed.
        """
        return self._engine.urls[0]

    @property
    def urls(self) -> list[str]:
        """The same for all that it listens on, in the order TCP, `uds`, `fd`, `sockets`, systemd."""
        return list(self._engine.urls)

    @property
    def ws_url(self) -> str:
        """The same for WebSockets: ``"ws://127.0.0.1:8000"``, ``"wss://..."`` with TLS, or ``"ws+unix://..."``."""
        return "ws" + self.url.removeprefix("http")

    @property
    def host(self) -> str:
        """
        The first address that it is bound to, as the system gives it.

        Raises:
            AttributeError: It listens on Unix sockets only; ``getattr(server, "host", None)`` is `None` then.
        """
        return self._first_address()[0]

    @property
    def port(self) -> int:
        """
        The port of the first address: the real one where 0 was asked for.

        Raises:
            AttributeError: It listens on Unix sockets only; ``getattr(server, "port", None)`` is `None` then.
        """
        return self._first_address()[1]

    @property
    def report(self) -> Report | None:
        """How it was closed, and what had to be forced; `None` before that, and where the server could not report."""
        return self._engine.report

    def close(self, timeout: float | None = None) -> None:
        """
        Ask for a graceful stop, and return at once.

        It can be called at any time, any number of times: from a request's handler, from another task, from another
        thread, from a signal handler. `wait_closed()` waits for the end.

        Args:
            timeout: How long the requests in flight get, in seconds from this call, the drain included. It can only
                shorten what the server was started with; 0 forces, which cancels the handlers at once.

        Raises:
            TypeError: The timeout is not a number.
            ValueError: The timeout is negative.
        """
        seconds = check_timeout("timeout", timeout)
        self._engine.close(None if seconds is None else self._loop.time() + seconds)

    async def wait_closed(self) -> None:
        """
        Wait until everything is over: the last response sent, the lifespan ended, the port free.

        Cancelling this does nothing to the server.

        Raises:
            ServerCrashedError: The app's lifespan died while it was serving.
            ShutdownError: The app's lifespan failed at its shutdown.
            RuntimeError: It was called by a request or the lifespan of this server, and would wait for itself; or from
                another event loop. (A handler that runs in a task of its own, as under Starlette's BaseHTTPMiddleware,
                is not recognized: it waits until the budget is over.)
        """
        self._check_caller("wait_closed()")
        await self._engine.closed.wait()
        self._awaited = True
        if self._engine.error is not None:
            raise self._engine.error.with_traceback(None)  # or it would grow with each call

    async def aclose(self) -> None:
        """
        Close, and wait until everything is over.

        A cancellation that arrives during the wait is raised at its end; a second one forces.

        Raises:
            ServerCrashedError: The app's lifespan died while it was serving.
            ShutdownError: The app's lifespan failed at its shutdown.
            RuntimeError: As in `wait_closed()`. But where the server's loop has ended, what can be closed without it is
                closed, and that is logged.
        """
        await self.__aexit__(None, None, None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        if asyncio._get_running_loop() is not self._loop and self._engine.has_lost_its_loop(exc):
            self._engine.abandon()
            return
        self._check_caller("aclose()")
        self._engine.close(begin=True)
        cancelled = isinstance(exc, asyncio.CancelledError)
        late = await self._outlast(cancellations=int(cancelled and _is_native(exc)))
        self._awaited = True

        # What is raised? A cancellation first, then the body's exception, then the server's.
        error = self._engine.error
        raised = late if late is not None and not cancelled else exc
        if raised is None or isinstance(raised, GeneratorExit):  # a generator that is closed has no error of its own
            if error is not None:
                raise error.with_traceback(None)  # or it would grow with each call
            return
        if error is not None and error is not raised:
            add_failure(raised, error)
        if raised is not exc:
            raise raised

    async def _wait_started(self) -> None:
        """Wait until the server has started, or raise what prevented it; if cancelled, wait until it has stopped."""
        task = asyncio.current_task()
        assert task is not None
        try:
            if self._engine.ready.done() and (task.cancelling() or not self._engine.started):
                # It took a single step, in which somebody may have cancelled this task. That comes first.
                await asyncio.sleep(0)
            await self._engine.ready
        except asyncio.CancelledError:
            self.close(timeout=None if self._engine.started else 0)
            await self._outlast(cancellations=1)
            if self._engine.error is not None and self._engine.error.__cause__ is not None:
                logger.error("%s", self._engine.error, exc_info=self._engine.error)
            raise
        if not self._engine.started:
            assert self._engine.error is not None
            raise self._engine.error

    async def _outlast(self, *, cancellations: int) -> asyncio.CancelledError | None:
        """
        Wait for the server's end whatever happens; return the cancellation that arrived, for the caller to raise.

        The second native one, counting those that came before, forces.
        """
        closed = self._engine.closed
        late: asyncio.CancelledError | None = None
        if not cancellations:
            try:
                await closed.wait()
            except asyncio.CancelledError as exc:
                late, cancellations = exc, int(_is_native(exc))
            else:
                return None

        def count() -> None:
            nonlocal cancellations
            cancellations += 1
            if cancellations > 1:
                logger.warning("%s: a second cancellation forces the stop", self.url)
                self.close(timeout=0)

        first = late if cancellations else None
        later = await outlast(closed.is_set, closed.wait, count)
        return first or later or late

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self  # so that the lifespan state, which it is in, can be copied

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"an aioserve.{type(self).__name__} cannot be pickled; pass its url instead")

    def _first_address(self) -> tuple[str, int]:
        for each in self._engine.listeners:
            if each.host is not None and each.port is not None:
                return each.host, each.port
        raise AttributeError(f"a server on a Unix socket has no host and no port; its url is {self.url!r}")

    def _status(self) -> str:
        raise NotImplementedError

    def _repr_html_(self) -> str:
        """Return what a notebook shows: links to where it listens, until it has closed, and its status."""
        from html import escape  # only for notebooks

        status = self._status()
        where = [escape(url) for url in self.urls]
        if not self._engine.closed.is_set() and not self._loop.is_closed():
            where = [url if "+unix:" in url else f'<a href="{url}" target="_blank">{url}</a>' for url in where]
        return f"aioserve.{type(self).__name__} {', '.join(where)} <em>{status}</em>"

    def _check_caller(self, called: str) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            loop = None
        if loop is not self._loop:
            raise RuntimeError(f"call {called} in the event loop that the server runs in; close() works from anywhere")
        if self._engine.owns(asyncio.current_task()):
            raise RuntimeError(
                f"{called} in a request or the lifespan of this server would wait for itself; use close()"
            )


def add_failure(raised: BaseException, error: BaseException) -> None:
    """Say of what is raised that the server has failed as well."""
    add_note(raised, f"aioserve: the server failed as well: {describe_error(error)}")
    logger.error("%s", error, exc_info=error)


def _is_native(cancellation: BaseException | None) -> bool:
    """Whether it comes from `Task.cancel()`, and not from an anyio scope, whose cancellations say so."""
    return anyio.current_effective_deadline() > -math.inf or "cancel scope" not in str(cancellation)


@public
class Server(ServerHandle):
    """
    A running server: where it listens, what it is doing, and how to end it.

    You get one from `serving()`, `start()` or `serve()`. It is an async context manager too, which closes it at the end
    of the block: ``async with await start(app) as server``. The app's handlers find it as ``request.state.aioserve``
    (``scope["state"]["aioserve"]``). A copy of it, as in a copy of that state, is the server itself.

    Everything but `close()` has to be called in the event loop in which it was started.
    """

    if TYPE_CHECKING:  # `typing.get_type_hints()` looks for the names of a public class in the package
        _engine: Engine
        _uvicorn: uvicorn.Server | None
    else:
        _uvicorn = None

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        engine.lifespan.state["aioserve"] = self

    @property
    def sockets(self) -> tuple[socket.socket, ...]:
        """
        The listening sockets; none when it has stopped accepting. Look at them, but do not close them.

        A process that is forked from this one does not keep them; for it, make a duplicate (`socket.dup()`).
        """
        return self._engine.connections.acceptor.sockets if self.is_serving() else ()

    @property
    def state(self) -> dict[str, Any]:
        """The ASGI lifespan state: what the app's lifespan has put there for its handlers."""
        return self._engine.lifespan.state

    @property
    def stats(self) -> Stats:
        """What it is doing and has done."""
        state = self._engine.connections.state
        return Stats(connections=len(state.connections), in_flight=len(state.tasks), served=state.total_requests)

    @property
    def stopping(self) -> anyio.Event:
        """
        Set when a stop is asked for, by anyone.

        A long stream can await it to end in time; a readiness check can answer 503 when it is set.
        """
        return self._engine.shutdown.event

    @property
    def uvicorn(self) -> uvicorn.Server:
        """
        A `uvicorn.Server`, for code that knows one.

        Setting its `should_exit` closes this server; `force_exit` forces it.
        """
        if self._uvicorn is None:
            from aioserve._uvicorn.facade import UvicornServer  # only for those who look at it

            self._uvicorn = UvicornServer(self._engine)
        return self._uvicorn

    def is_serving(self) -> bool:
        """Whether it accepts new connections."""
        return self._engine.connections.acceptor.is_serving()

    def _status(self) -> str:
        if self._engine.closed.is_set():
            return "closed"
        if self._loop.is_closed():
            return "its loop was closed"
        if self._engine.is_stopping:
            return "stopping"
        return "serving" if self.is_serving() else "starting"

    def __repr__(self) -> str:
        return f"<aioserve.Server {self.url} {self._status()}>"
