"""
What the user holds.
"""

from __future__ import annotations

import asyncio
import logging
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio

from aioserve._options import check_timeout
from aioserve._waiting import begin

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from types import TracebackType
    from typing import Protocol, Self

    import uvicorn

    from aioserve._engine import Engine
    from aioserve._shutdown import Report

    class Runs(Protocol):
        """What a server is to those who hold it: when it begins and ends, and how to ask for that."""

        ready: asyncio.Future[None]
        """Done when it has started, or failed to."""
        started: bool
        urls: list[str]
        closed: asyncio.Event
        error: BaseException | None
        on_crash: Callable[[], None] | None

        def close(self, deadline: float | None = None) -> None: ...

        def is_ours(self, task: asyncio.Task[Any] | None) -> bool: ...


logger = logging.getLogger("aioserve")


class Stats(NamedTuple):
    """What a server is doing and has done, at the moment of asking."""

    connections: int
    """Open connections, idle ones and WebSockets included."""
    in_flight: int
    """Requests and WebSockets whose handler is running."""
    served: int
    """HTTP responses completed since the start."""


class Closable:
    """
    How a running server is ended, and waited for.
    """

    _engine: Runs
    _loop: asyncio.AbstractEventLoop
    _host: str | None
    _port: int | None
    _awaited: bool = False  # whoever awaits its end hears how it went, and a test need not hear of it again

    @property
    def url(self) -> str:
        """
        Where a client on this machine reaches it, like ``"http://127.0.0.1:8000"``: no slash at the end.

        A wildcard address becomes loopback; IPv6 stands in brackets. Of a Unix socket it is
        ``"http+unix://%2Frun%2Fapp.sock"``, the path percent-encoded in the place of the host. It stays when the server
        has closed.
        """
        return self._engine.urls[0]

    @property
    def urls(self) -> list[str]:
        """The same for every address that it listens on."""
        return list(self._engine.urls)

    @property
    def host(self) -> str | None:
        """The first address that it is bound to, as the system gives it; `None` of a Unix socket."""
        return self._host

    @property
    def port(self) -> int | None:
        """The port, the same on every address; the real one, where 0 was asked for; `None` of a Unix socket."""
        return self._port

    def close(self, timeout: float | None = None) -> None:
        """
        Ask for a graceful stop, and return at once.

        It can be called at any time, any number of times: from a request's handler, from another task, from another
        thread, from a signal handler.
        `wait_closed()` waits for the end.

        Args:
            timeout: A deadline for the requests in flight, in seconds from this call, the drain included. It can only
                shorten what the server was started with; 0 forces, which cancels the handlers at once.

        Raises:
            TypeError: The timeout is no number.
            ValueError: The timeout is negative.
        """
        seconds = check_timeout("timeout", timeout)
        self._engine.close(None if seconds is None else self._loop.time() + seconds)

    async def wait_closed(self) -> None:
        """
        Wait until all is over: the last response sent, the lifespan ended, the port free.

        It only watches: cancelling it does nothing to the server.

        Raises:
            ServerCrashedError: The app's lifespan died in the middle of serving.
            ShutdownError: The app's lifespan failed at its shutdown.
            RuntimeError: A request or the lifespan of this server calls it, and would wait for itself; or it is called
                from another event loop. (A request whose handler runs in a task of its own, as under Starlette's
                BaseHTTPMiddleware, is not known as one: it waits until the budget is over.)
        """
        self._check_caller("wait_closed()")
        await self._engine.closed.wait()
        self._awaited = True
        if self._engine.error is not None:
            raise self._engine.error

    async def aclose(self) -> None:
        """
        Close, and wait until all is over.

        A cancellation that arrives meanwhile waits for the end as well; a second one forces.

        Raises:
            ServerCrashedError: The app's lifespan died in the middle of serving.
            ShutdownError: The app's lifespan failed at its shutdown.
            RuntimeError: As in `wait_closed()`.
        """
        await self.__aexit__(None, None, None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._check_caller("aclose()")
        self._close_at_once()
        cancelled = isinstance(exc, asyncio.CancelledError)
        late = await self._outlast(cancellations=1 if cancelled else 0)
        self._awaited = True

        # Who is heard? The body before the server, and a cancellation before both.
        error = self._engine.error
        heard = late if late is not None and not cancelled else exc
        if heard is None or isinstance(heard, GeneratorExit):  # a generator that is closed has no error of its own
            if error is not None:
                raise error
            return
        if error is not None and error is not heard:
            heard.add_note(f"aioserve: the server failed as well: {type(error).__name__}: {error}")
            logger.error("%s", error, exc_info=error)
        if heard is not exc:
            raise heard

    def _close_at_once(self) -> None:
        """Ask for a stop, and do already what needs no waiting; where that is possible."""
        self.close()

    async def _wait_started(self) -> None:
        """Wait until the server has started, or raise what prevented it; cancelled, wait until it has stopped again."""
        task = asyncio.current_task()
        assert task is not None
        try:
            if self._engine.ready.done() and (task.cancelling() or not self._engine.started):
                # It took a single step, in which somebody may have cancelled us; and that comes before what we have.
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
        Wait for the server's end whatever happens, and return the cancellation that arrived meanwhile, for the caller
        to raise.

        Two things are held off. An anyio scope delivers its cancellation anew on every loop turn, hence the shield,
        where there is a cancellation; after it, the scope will have its way. A native one comes through a shield, but
        once only; and waiting for an event does not pass it on to the server. The second one, counting those that came
        before, forces.
        """
        closed = self._engine.closed
        late: asyncio.CancelledError | None = None
        if not cancellations:
            try:
                await closed.wait()
            except asyncio.CancelledError as exc:
                late = exc  # a scope's own does not count
                cancellations = 0 if anyio.current_effective_deadline() == -math.inf else 1
            else:
                return None

        with anyio.CancelScope(shield=True):
            while not closed.is_set():
                try:
                    await closed.wait()
                except asyncio.CancelledError as exc:
                    late = exc if cancellations == 0 else late or exc
                    cancellations += 1
                    if cancellations > 1:
                        self.close(timeout=0)
        return late

    def _how(self) -> str:
        """Say in a word how it is."""
        raise NotImplementedError

    def _repr_html_(self) -> str:
        """Return what a notebook shows: links to where it listens, as long as it does, and how it is."""
        from html import escape  # for notebooks only

        how = self._how()
        where = [escape(url) for url in self.urls]
        if how != "closed":
            where = [url if "+unix:" in url else f'<a href="{url}" target="_blank">{url}</a>' for url in where]
        return f"aioserve.{type(self).__name__} {', '.join(where)} <em>{how}</em>"

    def _check_caller(self, called: str) -> None:
        loop = _running_loop()
        if loop is not self._loop:
            raise RuntimeError(f"{called} is for the event loop that the server runs in; from elsewhere use close()")
        if self._engine.is_ours(asyncio.current_task()):
            raise RuntimeError(
                f"{called} in a request or the lifespan of this server would wait for itself; use close()"
            )


class Server(Closable):
    """
    A running server: where it listens, how it fares, and how to end it.

    You get one from `serving()`, `start()` or `serve()`. It is an async context manager too, which closes it at the end
    of the block: ``async with await start(app) as server``. The app's handlers find it as ``request.state.aioserve``
    (``scope["state"]["aioserve"]``).

    All but `close()` is for the event loop in which it was started.
    """

    _engine: Engine

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._host = engine.listeners[0].host
        self._port = engine.listeners[0].port
        engine.lifespan.state["aioserve"] = self
        self._task = begin(engine.serve(), name=f"aioserve {self.url}")
        self._task.add_done_callback(engine.ended)

    @property
    def sockets(self) -> tuple[socket.socket, ...]:
        """The listening sockets; none once it has stopped accepting. Look at them, but do not close them."""
        return self._engine.acceptor.sockets if self.is_serving() else ()

    @property
    def state(self) -> dict[str, Any]:
        """The ASGI lifespan state: what the app's lifespan has put there for its handlers."""
        return self._engine.lifespan.state

    @property
    def stats(self) -> Stats:
        """What it is doing and has done."""
        state = self._engine.server_state
        return Stats(connections=len(state.connections), in_flight=len(state.tasks), served=state.total_requests)

    @property
    def report(self) -> Report | None:
        """How it was closed, and what had to be forced; `None` before that."""
        return self._engine.report

    @property
    def stopping(self) -> anyio.Event:
        """
        Set the moment a stop is asked for, by whomever.

        A long stream can await it to end in time; a readiness check answers 503 from then on.
        """
        return self._engine.stopping

    @property
    def uvicorn(self) -> uvicorn.Server:
        """
        The `uvicorn.Server` underneath, for code that knows it.

        Setting its `should_exit` closes this server; `force_exit` forces it.
        """
        return self._engine

    def is_serving(self) -> bool:
        """Whether it accepts new connections."""
        return self._engine.acceptor.is_serving()

    def _close_at_once(self) -> None:
        self._engine.begin_to_stop()
        self.close()

    def _how(self) -> str:
        if self._engine.closed.is_set():
            return "closed"
        if self._engine.is_stopping:
            return "stopping"
        return "serving" if self.is_serving() else "starting"

    def __repr__(self) -> str:
        return f"<aioserve.Server {self.url} {self._how()}>"


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
