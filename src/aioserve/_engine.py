"""
The one file that knows uvicorn's insides. When uvicorn changes, this file changes and nothing else.

What it relies on, in uvicorn 0.40 to 0.54:

- `Server(config)` keeps `server_state`; the protocols are made with `config`, `server_state` and `app_state`, and put
  themselves into `server_state.connections` with `add()` and out of it with `discard()` (HTTP) or `remove()`
  (WebSocket); an upgrade takes one out and puts another in. `server_state.tasks` holds a task per request or WebSocket.
- HTTP protocols read `server_state.default_headers` at each request, and count up `server_state.total_requests`.
- Each protocol has `transport`, and `shutdown()`: it closes an idle connection, makes the response of a busy one its
  last, and closes a WebSocket with 1012.
- A lost HTTP connection can leave its keep-alive timer behind: `timeout_keep_alive_task`.
- The legacy WebSocket protocol runs tasks of its own: `handler_task`, which outlives its others.
- A request's or WebSocket's task runs a coroutine `run_asgi()`, whose `self` has the `scope`.
- `Config.load()` imports the app, calls a factory, makes the TLS context, and may raise `SystemExit`.

What is ours in place of uvicorn's: `serve()`, which runs on events instead of a tick; the lifespan; the sockets; and no
signal handlers at all.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from email.utils import formatdate
from typing import TYPE_CHECKING, Any

import anyio
import uvicorn
from uvicorn.importer import import_from_string
from uvicorn.server import ServerState

from aioserve._errors import ServerCrashedError, StartupError
from aioserve._lifespan import Lifespan
from aioserve._shutdown import shut_down
from aioserve._sockets import url_of
from aioserve._waiting import Waiting

if TYPE_CHECKING:
    from aioserve._options import Scope, Settings

logger = logging.getLogger("aioserve")
uvicorn_logger = logging.getLogger("uvicorn.error")


class Engine(uvicorn.Server):
    """
    A `uvicorn.Server` whose `serve()` is a well-behaved task.

    `serve()` never raises, whatever happens: what went wrong is in `error`. It survives being cancelled, which only
    hurries it. `ready` is done when it has started or failed to; the task's end is the end of everything.
    """

    error: BaseException | None = None
    """What went wrong: an `OSError` or a `ServingError`."""

    on_crash: Callable[[], None] | None = None
    """Called when the server dies in the middle of serving, from its own task."""

    def __init__(self, settings: Settings, sockets: Sequence[socket.socket]) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self.waiting: Waiting = Waiting()
        self.ready: asyncio.Future[None] = self._loop.create_future()
        self.stopping: anyio.Event = anyio.Event()
        self.closed: asyncio.Event = asyncio.Event()
        self.servers: list[asyncio.Server] = []

        super().__init__(settings.config)
        load(settings.config)
        self.settings = settings
        self.sockets = sockets
        self.urls: list[str] = [url_of(sock, "https" if settings.config.ssl else "http") for sock in sockets]

        limit = getattr(self, "limit_max_requests", settings.config.limit_max_requests)
        self.server_state: _State = _State(self) if limit is None else _LimitedState(self, limit)
        self.lifespan: Lifespan = Lifespan(
            settings.config.loaded_app,
            mode=settings.config.lifespan,
            asgi_version=settings.config.asgi_version,
            state={},
            waiting=self.waiting,
        )

        self._running = False
        self._accepting = False
        self._watched: set[asyncio.Task[Any]] = set()
        self._background: set[asyncio.Task[Any]] = set()
        self._date_timer: asyncio.TimerHandle | None = None
        self._deadline: asyncio.TimerHandle | None = None

    # The story.

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until asked to close; then stop, and close the sockets. Only aioserve calls this, and only once."""
        if self._running:
            raise RuntimeError("this server is run by aioserve, and only once")
        self._running = True
        try:
            await self._serve_until_asked()
            await shut_down(self)
        except GeneratorExit:
            # Its loop was closed under it, and now it is garbage.
            self._close_sockets()
            raise
        except BaseException as exc:  # noqa: BLE001 (nothing may leave our task)
            self._fail("the server's own task failed while it was stopping", exc)
        self._clean_up()

    async def _serve_until_asked(self) -> None:
        try:
            await self.lifespan.startup(self.settings.startup_timeout)
            await self._start_accepting()
        except (StartupError, OSError) as exc:
            self.error = exc
            return
        except GeneratorExit:
            raise
        except BaseException as exc:  # noqa: BLE001 (the same; and the lifespan must be ended all the same)
            self._fail("the server's own task failed while it was starting", exc)
            return
        self.started = True
        uvicorn_logger.info("Serving on %s", ", ".join(self.urls))
        self._tell_starter()

        await self.waiting.wait_for(lambda: self.stopping.is_set() or self.lifespan.died)
        if self.lifespan.died and not self.stopping.is_set() and not self.waiting.forced:
            self._fail("the app's lifespan died while it was serving", self.lifespan.error)
        self.close()

    def ended(self, _: object) -> None:
        """Make sure of the end; for the task that was cancelled before its first step, so that `serve()` never ran."""
        if not self.closed.is_set():
            self.error = StartupError("the server's own task was cancelled before it had begun")
            self._clean_up()

    async def _start_accepting(self) -> None:
        self._refresh_default_headers()
        self._accepting = True
        for sock in self.sockets:
            # In two steps: should our task be cancelled in the second, we have what to close.
            server = await self._loop.create_server(
                self._create_protocol,
                sock=sock,
                ssl=self.config.ssl,
                backlog=self.config.backlog,
                start_serving=False,
            )
            self.servers.append(server)
        for server in self.servers:
            try:
                await server.start_serving()
            except asyncio.CancelledError:
                self.waiting.force()

    def _fail(self, what: str, cause: BaseException | None) -> None:
        self.error = ServerCrashedError(f"{what}: {type(cause).__name__}: {cause}")
        self.error.__cause__ = cause
        self.close()
        if self.on_crash is not None:
            self.on_crash()
        else:
            logger.error("%s", self.error, exc_info=cause)

    def _clean_up(self) -> None:
        self._accepting = False
        self.close_listeners()
        self._close_sockets()
        for timer in (self._date_timer, self._deadline):
            if timer is not None:
                timer.cancel()
        self.stopping.set()
        if self.started:
            uvicorn_logger.info("Closed %s", ", ".join(self.urls))
        self._tell_starter()
        self.closed.set()

    def _close_sockets(self) -> None:
        for sock in self.sockets:
            sock.close()

    def _tell_starter(self) -> None:
        if not self.ready.done():
            self.ready.set_result(None)

    # Being asked to close.

    def close(self, deadline: float | None = None) -> None:
        """
        Ask for a graceful stop, from anywhere; a deadline, in the loop's time, can only shorten it.
        """
        if threading.get_ident() == self._thread:
            self._close(deadline)
            if asyncio.current_task(self._loop) is not None:
                return
            # A signal handler, perhaps, which has interrupted the loop in its sleep: it has to be woken up.
        try:
            self._loop.call_soon_threadsafe(self._close, deadline)
        except RuntimeError:
            pass  # its loop is closed, and so is the server

    def _close(self, deadline: float | None) -> None:
        if self.closed.is_set():
            return
        self.stopping.set()
        self.waiting.notify()
        if deadline is None:
            return

        if deadline <= self._loop.time():
            self.waiting.force()
        elif self._deadline is None or deadline < self._deadline.when():
            if self._deadline is not None:
                self._deadline.cancel()
            self._deadline = self._loop.call_at(deadline, self.waiting.force)

    # What the shutdown is told in.

    @property
    def accepting(self) -> bool:
        return self._accepting and bool(self.servers)

    def stop_accepting(self) -> None:
        """
        Accept nothing more, but leave the listeners open for the turns in which the last connections are made.

        asyncio drops a connection that it has accepted and not yet made when its server is closed, and leaks its
        socket. (uvloop makes it at once, and knows no such reader.)
        """
        self._accepting = False
        for server in self.servers:
            for sock in server.sockets:
                self._loop.remove_reader(sock.fileno())

    def close_listeners(self) -> None:
        for server in self.servers:
            server.close()

    def finish_connections(self) -> None:
        """Close what is idle, with 1012 what is a WebSocket; let what is busy finish, and be its last."""
        for connection in list(self.server_state.connections):
            self._finish(connection)

    def is_quiet(self) -> bool:
        """Whether no connection and no handler is left."""
        if self.server_state.connections:
            return False
        return not self._handlers()

    def cancel_handlers(self) -> int:
        """Cancel the handlers that are left, and return how many."""
        handlers = self._handlers()
        for task in handlers:
            task.cancel()
        return len(handlers)

    def is_ours(self, task: asyncio.Task[Any] | None) -> bool:
        """Whether it is the lifespan's task, or a request's or WebSocket's."""
        if task is None:
            return False
        if task is self.lifespan.task or task in self.server_state.tasks:
            return True
        # An eager task runs before uvicorn has it in its set.
        scope = scope_of(task)
        return scope is not None and getattr(scope["state"].get("aioserve"), "_engine", None) is self

    def has_handlers(self) -> bool:
        return bool(self._handlers())

    def abort_connections(self) -> int:
        """Drop the connections that are left, and return how many."""
        connections = list(self.server_state.connections)
        for connection in connections:
            connection.transport.abort()
        return len(connections)

    def _handlers(self) -> set[asyncio.Task[Any]]:
        """The tasks that are left of the handlers; their ends are noticed from here on."""
        tasks: set[asyncio.Task[Any]] = self.server_state.tasks | self._background
        for task in tasks - self._watched:
            task.add_done_callback(self._handler_done)
        self._watched |= tasks
        return tasks

    def _handler_done(self, task: asyncio.Task[Any]) -> None:
        self._watched.discard(task)
        self.waiting.notify()

    def _finish(self, connection: Any) -> None:
        background = getattr(connection, "handler_task", None)
        if background is not None and not background.done():
            self._background.add(background)
            background.add_done_callback(self._background.discard)
        if connection.transport.is_closing():
            return
        try:
            connection.shutdown()
        except Exception:  # noqa: BLE001
            # The protocol is in no state to say goodbye, as h11 after a request that was none.
            connection.transport.abort()

    # Connections come and go.

    def _create_protocol(self, _loop: asyncio.AbstractEventLoop | None = None) -> asyncio.Protocol:
        protocol: Any = self.config.http_protocol_class(
            config=self.config,  # type: ignore[call-arg]  # uvicorn types it as a bare asyncio.Protocol
            server_state=self.server_state,
            app_state=self.lifespan.state,
            _loop=_loop,
        )
        if not self.settings.access_log:
            protocol.access_log = False
        return protocol  # type: ignore[no-any-return]

    def connection_added(self, connection: Any) -> None:
        if not self._accepting:
            # It was accepted in the last moment, or has just been upgraded to a WebSocket.
            self._loop.call_soon(self._finish, connection)
        elif self._date_timer is None and self.config.date_header:
            self._tick()

    def connection_removed(self, connection: Any) -> None:
        timer = getattr(connection, "timeout_keep_alive_task", None)
        if timer is not None:
            timer.cancel()
        if not self._accepting and not self.server_state.connections:
            self.waiting.notify()

    def requests_exhausted(self, limit: int) -> None:
        if not self.stopping.is_set():
            uvicorn_logger.info("Maximum request limit of %d exceeded. Closing.", limit)
            self.close()

    # The date header, kept right by one timer a second, and by none when nobody is connected.

    def _tick(self) -> None:
        if not self.server_state.connections:
            self._date_timer = None
            return
        self._refresh_default_headers()
        self._date_timer = self._loop.call_later(1.0, self._tick)

    def _refresh_default_headers(self) -> None:
        date = [(b"date", formatdate(time.time(), usegmt=True).encode())] if self.config.date_header else []
        self.server_state.default_headers = date + self.config.encoded_headers

    # For code that knows uvicorn.Server and uses it on ours.

    @property
    def should_exit(self) -> bool:
        return self.stopping.is_set()

    @should_exit.setter
    def should_exit(self, value: bool) -> None:
        if value:
            self.close()

    @property
    def force_exit(self) -> bool:
        return self.waiting.forced

    @force_exit.setter
    def force_exit(self, value: bool) -> None:
        if value:
            self.close(deadline=0)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        raise RuntimeError("this server is started by aioserve, and only once")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.close()


class _State(ServerState):
    """uvicorn's state, whose connections tell when they come and go: the price of it is paid once per connection."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.connections: _Connections = _Connections(engine)


class _LimitedState(_State):
    """Says at the very request that the limit is reached, where uvicorn looks ten times a second."""

    def __init__(self, engine: Engine, limit: int) -> None:
        self._engine = engine
        self._limit = limit
        self._total = 0
        super().__init__(engine)

    @property
    def total_requests(self) -> int:
        return self._total

    @total_requests.setter
    def total_requests(self, value: int) -> None:
        self._total = value
        if value >= self._limit > 0:
            self._engine.requests_exhausted(self._limit)


class _Connections(set[Any]):
    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self._engine = engine

    def add(self, connection: Any) -> None:
        super().add(connection)
        self._engine.connection_added(connection)

    def discard(self, connection: Any) -> None:
        super().discard(connection)
        self._engine.connection_removed(connection)

    def remove(self, connection: Any) -> None:
        self.discard(connection)


def scope_of(task: asyncio.Task[Any]) -> Scope | None:
    """What the handler that runs in the task was called with; `None` where the task is no handler."""
    coroutine: Any = task.get_coro()
    frame = getattr(coroutine, "cr_frame", None)
    if frame is None or frame.f_code.co_name != "run_asgi":
        return None
    scope: Scope | None = getattr(frame.f_locals.get("self"), "scope", None)
    return scope


def load(config: uvicorn.Config) -> None:
    """
    Import the app and all that the Config names, if that is not done.

    It takes as long as the import takes, and the loop stands still meanwhile.

    Raises:
        OSError: A certificate or key file cannot be read.
        StartupError: The app cannot be imported, its factory failed, or what came out cannot be called.
    """
    for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs"):
        path = getattr(config, name)
        if path:
            with open(path, "rb"):  # for the error: ssl's own does not say which file is missing
                pass
    if config.loaded:
        return

    app = config.app if isinstance(config.app, str) else "the app"
    try:
        import_from_string(config.app)  # before uvicorn does it, and logs what it raises
        config.load()
    except SystemExit as exc:
        reason = exc.__context__ or exc  # uvicorn's has a reason; the app's own is one
        raise StartupError(f"cannot load {app}: {type(reason).__name__}: {reason}") from reason
    except Exception as exc:
        if isinstance(exc, ssl.SSLError) and not hasattr(config, "ssl"):  # it comes before the app is imported
            files = f"ssl_certfile={config.ssl_certfile!r}, ssl_keyfile={config.ssl_keyfile!r}"
            raise type(exc)(exc.errno, f"{exc.strerror}; with {files}") from exc
        raise StartupError(f"cannot load {app}: {type(exc).__name__}: {exc}") from exc

    loaded = config.loaded_app
    while type(loaded).__module__.startswith("uvicorn.middleware."):
        loaded = loaded.app
    if inspect.iscoroutine(loaded):
        loaded.close()
        raise StartupError(f"cannot load {app}: its factory is a coroutine function, and must be a plain one")
    if not callable(loaded):
        raise StartupError(f"cannot load {app}: it is no ASGI app, but {loaded!r}")
