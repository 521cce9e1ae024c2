"""
Lifetimes: when a server starts, when it ends, and what is raised.

The exit contract, which is what the rest of this package is for. The documentation repeats these rules, and a test
compares them.

1. A start that fails raises before the body runs, and leaves nothing behind. A busy port, an unknown host or a missing
   certificate raises the system's own `OSError`, before the app runs. If another program begins to listen on the port
   while the app starts, the app is shut down before the `OSError` is raised. An app that cannot be imported or started
   raises `StartupError`, whose `__cause__` is what the app or its import raised. A startup that takes longer than
   `startup_timeout` is cancelled, and raises `StartupTimeoutError`.
2. The exception of the body comes out unchanged. It is the same object, not in a group, and it is raised after a
   graceful stop. If the body returns normally, the server stops in the same way.
3. A server that crashes cancels the body and raises `ServerCrashedError`. A server crashes when the app's lifespan
   raises before it is told to shut down, even if the body has just ended; `__cause__` is what the lifespan raised. An
   exception in a request handler is not a crash: the client gets a 500. The task that entered `serving()` is cancelled,
   as `asyncio.TaskGroup` does it. If that task was also cancelled from elsewhere, the `CancelledError` is raised, and
   the crash is logged. A server from `start()` cancels no task: the crash is logged, and `wait_closed()` and `aclose()`
   raise it. A lifespan that fails at its shutdown, or takes too long, raises `ShutdownError`.
4. A call of `close()` stops the server, and the body continues. It may come from a handler, another task or another
   thread. Await `server.wait_closed()` in the body to end it together with the server.
5. If body and server both fail, the exception of the body is raised. The server's exception is added to it as a note,
   and logged.
6. A cancellation from outside is raised once, after a graceful stop. First the `finally` blocks of the body run, while
   its server still answers. Then the server stops; the cancellation does not shorten its timeouts. A second
   `Task.cancel()` forces the stop: handlers are cancelled at once, but still awaited.
7. A stop signal ends the block normally, if `stop_on_signals` asks for it. With `serving()`, the body is cancelled.
   With `serve()`, the call returns. With `start()`, the server closes. All servers with this option stop. A second
   signal forces the stop, and cancels the body again if it is still running. Before the body has begun, the start
   raises `StartupInterruptedError`; `serve()` returns instead, unless it was called by `task_group.start()`, which
   raises. The previous signal handlers are restored. By default, no signal is touched.
8. After the block, nothing is left. No task, timer, socket or signal handler of the server remains, and the port can be
   bound again, even if a forked process is still running. Only a handler or a lifespan that ignores its cancellation
   continues, and the `report` names it.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Generic, TypeVar, Unpack

from aioserve._engine import Engine
from aioserve._errors import StartupError, StartupInterruptedError
from aioserve._functions import AsyncBlock, with_options
from aioserve._log import logger
from aioserve._net.acceptor import acceptors
from aioserve._net.listeners import Listener
from aioserve._options import App, Options
from aioserve._server import Server, ServerHandle
from aioserve._settings import Settings, parse
from aioserve._signals import Interrupted, Signals
from aioserve._uvicorn.config import load_config
from aioserve._waiting import InterruptScope

if TYPE_CHECKING:
    from anyio.abc import TaskStatus

Handle = TypeVar("Handle", bound=ServerHandle)


@with_options()
def serving(app: App, **options: Unpack[Options]) -> AbstractAsyncContextManager[Server]:
    """
    Serve an ASGI app for the length of a block.

        async with serving(app, port=8000) as server:
            print(server.url)
            await run_everything_else()

    The block begins when the app has started and the port is open. However the block ends, the server stops
    gracefully: it stops accepting, answers the requests in flight, ends the app's lifespan, and leaves nothing behind.

    `host` and `port`, `uds`, `fd`, `sockets` and `systemd` can be combined: one app with one lifespan on all these
    listeners, and one stop. If one of them fails, the start fails, and none is left. TCP is opened if `host`, `port` or
    `reuse_port` is given, or nothing else to listen on.

    Args:
        app: An ASGI callable, an import string ``"package.module:attribute"``, or a `uvicorn.Config`. A Config keeps
            its own defaults, such as port 8000. Beside it, only `sockets` (in place of the Config's own address, as in
            uvicorn's ``Server.serve(sockets=...)``), `uds_mode`, `cancel_on_disconnect`, `stop_on_signals` and
            aioserve's own timeouts can be given. Its `timeout_graceful_shutdown` becomes the `shutdown_timeout`; its
            `workers` and `reload` are ignored, with a warning.
        host: A name or an address to listen on. A sequence of them is possible; `None` is every interface, IPv4 and
            IPv6. Default: ``"127.0.0.1"``.
        port: The TCP port; 0 takes a free one, the same on every address. Default: 0.
        reuse_port: Whether other programs may listen on the same port. All of them need this option; the kernel
            distributes the connections among them. Default: `False`.
        uds: The path of a Unix socket to listen on. A stale socket there is replaced, anything else is refused. The
            file appears when the app has started, and is removed at the end. Default: `None`.
        uds_mode: The permissions of the Unix socket's file. Clients need write permission to connect. Default: 0o600.
        fd: The descriptor of a socket to listen on, TCP or Unix. A duplicate is used; yours stays open. Default:
            `None`.
        sockets: Bound sockets to listen on, TCP or Unix. They are lent: aioserve never closes them, and leaves the
            connections that wait in their queue at the end to their next user. A socket that does not listen yet
            listens when the app has started. Default: `None`.
        systemd: Whether to listen on the sockets that systemd passes (``LISTEN_FDS``), and to notify systemd. If there
            are such sockets, they take the place of `host`, `port` and `uds`, which are for a start without systemd;
            `fd` and `sockets` are served in both cases. systemd is told when the server is ready and when it stops
            (``NOTIFY_SOCKET``), and its watchdog (``WATCHDOG_USEC``) is answered from the loop until the server has
            closed. A string selects the socket with this name, for which only "ready" is reported. Default: `False`.
        ssl: A ready `ssl.SSLContext`, for all listeners. You can load new certificates into it while the server runs.
            Default: `None`; uvicorn's ``ssl_certfile``, ``ssl_keyfile`` and so on work as well.
        lifespan: ``"auto"``, ``"on"`` or ``"off"``. With ``"auto"``, the default, an app may have no lifespan, but one
            that began its lifespan and raised has failed to start. With ``"on"``, every exception is a failure. With
            ``"off"``, the lifespan is not run.
        startup_timeout: How long the app's startup may take, in seconds. `None` is no limit. Default: 60.
        shutdown_timeout: How long requests in flight may take to finish at a stop, in seconds. It counts from the end
            of the `drain_delay`. When it is over, their handlers are cancelled. `None` is no limit. Default: 10.
        drain_delay: How long to keep accepting after a stop was asked for, in seconds. Every response says
            ``connection: close`` meanwhile. For load balancers and kept-alive clients. Default: 0.
        disconnect_after: How long a stop waits until ``receive()`` returns ``http.disconnect``, in seconds. It counts
            from the end of the `drain_delay`. Handlers of event streams get the disconnect at once in any case. Other
            streaming responses of Starlette wait in ``receive()`` as well, also finite ones such as downloads, and so
            do all requests of Quart and Django: 0 cuts them short. `None`, the default, is the end of the
            `shutdown_timeout`.
        header_timeout: How long a client may take to send the head of a request, in seconds. It counts from when the
            client is connected, or from the first byte of a later request; between two requests, uvicorn's
            `timeout_keep_alive` applies. Connections are looked at once a second, so the limit can be exceeded by two
            seconds. Then the connection is closed; if bytes had come, with a 408. A TLS handshake may take as long, but
            never more than a minute. `None` is no limit. Default: 60.
        cancel_on_disconnect: Whether to cancel the handler of a request when its client has gone. It works below
            middleware as well, as far as the loop notices that the client has gone. A handler that waits for a thread
            is cancelled when the thread is done; a background task after a response is not cancelled. The handler of a
            WebSocket learns it from ``receive()`` instead. Default: `False`.
        stop_on_signals: `True`, or the signals that end the block. `True` is SIGINT and SIGTERM, on Windows also
            SIGBREAK. The body is cancelled, and the block ends normally. A second signal forces the stop, except
            SIGHUP, which a closing terminal may send twice. It works in the main thread only, and only if the loop does
            not handle the signal already. If the app replaces the signal handler while it starts, a warning is logged:
            call `Server.close()` in its handler, and await `Server.wait_closed()` in the block. Default: `False`.
        factory: Whether the app is a function that makes the app. Default: `False`.
        http2: Whether to serve HTTP/2 beside HTTP/1.1. Over TLS, clients choose it by ALPN (which is set on a ready
            context, too); in clear text, they begin with it. It is uvicorn's own implementation, experimental since
            0.50; it needs zttp, and chooses ``http="zttp"``. Default: `False`.
        options: The other options of `uvicorn.Config`, under their names. Those that make no sense inside a running
            program are refused with a reason. `log_config` and `log_level` default to `None`, so logging is left as
            it is; once given, they change uvicorn's loggers for the whole process. `access_log=False` silences only
            this server.

    Returns:
        A context manager, whose block gets the `Server`.

    Raises:
        OSError: An address or a path cannot be bound, a name cannot be resolved, or a certificate cannot be read; the
            message says which.
        StartupError: The app could not be imported or started; `__cause__` is the app's own exception.
        StartupTimeoutError: Its startup took too long.
        StartupInterruptedError: A signal, or ``close(timeout=0)``, came before it had started.
        ServerCrashedError: The app's lifespan died while the body ran.
        ShutdownError: The app's lifespan failed at its shutdown.
        TypeError: An option is unknown, refused, of the wrong type, or cannot be combined with another.
        ValueError: An option is out of range.
        RuntimeError: There is no running asyncio event loop, or a signal cannot be handled here.
    """
    return ServingContext("serving", app, partial(parse, app, options), start_with)


@with_options(serving)
async def start(app: App, **options: Unpack[Options]) -> Server:
    """
    Start serving an ASGI app, and return when it has started.

    Use it where a block does not fit: in hooks for startup and shutdown, fixtures, notebook cells. Start and stop may
    happen in different tasks, and no task is ever cancelled: if the app's lifespan dies, that is logged, and
    `Server.wait_closed()` and `Server.aclose()` raise it. A signal that `stop_on_signals` asks for closes the server.

    End it with ``await server.aclose()``; or with a block: ``async with await start(app) as server``.

    Args:
        app: As in `serving()`.
        options: As in `serving()`.

    Raises:
        OSError, StartupError, TypeError, ValueError, RuntimeError: As in `serving()`.
    """
    check_loop()
    settings = parse(app, options)
    signals = Signals(settings.stop_on_signals)
    signals.install()
    try:
        server = await start_with(settings, signals)
        if signals.first is not None:
            async with server:
                raise interrupted(signals)
    except BaseException:
        signals.release()
        raise
    if server._engine.closed.is_set():
        signals.release()
    server._engine.on_closed = signals.release
    if "IPython" in sys.modules:
        from aioserve._ipython import warn_if_loop_pauses  # only where it can be needed

        warn_if_loop_pauses(server.url)
    return server


@with_options(serving)
async def serve(app: App, *, task_status: TaskStatus[Server] | None = None, **options: Unpack[Options]) -> None:
    """
    Serve an ASGI app until the task or the scope around it is cancelled, or the server closes.

    In an anyio task group, `start()` returns the `Server` once it has started:

        server = await task_group.start(partial(serve, app, port=8000))

    It can also be a task of an `asyncio.TaskGroup`, or a program:
    ``asyncio.run(serve(app, port=8000, stop_on_signals=True))``.

    Args:
        app: As in `serving()`.
        task_status: Given by anyio's `TaskGroup.start()`.
        options: As in `serving()`.

    Raises:
        ServerCrashedError: The app's lifespan died.
        StartupInterruptedError: A signal came before it had started, and a task group waits for the server. (With
            nobody waiting, it returns.)
        OSError, StartupError, ShutdownError, TypeError, ValueError, RuntimeError: As in `serving()`.
    """
    context = ServingContext("serving", app, partial(parse, app, options), start_with)
    try:
        async with context as server:
            if task_status is not None:
                task_status.started(server)
            await server.wait_closed()
    except StartupInterruptedError:
        if task_status is not None or context._signals is None or context._signals.first is None:
            raise


async def start_with(settings: Settings, signals: Signals, listeners: Sequence[Listener] | None = None) -> Server:
    """Start a server, unless a signal comes; on listeners, where there are some already."""
    if listeners is None:
        listeners = await bind(settings, signals)
    try:
        with signals:  # a signal interrupts the import
            load_config(settings.config, settings.ssl, settings.app_dir)
        signals.take_back()
        has_tls = settings.config.ssl is not None
        acceptor = acceptors.get((type(asyncio.get_running_loop()), has_tls))
        if acceptor is None:
            from aioserve._net.loops import choose_acceptor  # only for other loops than asyncio's

            acceptor = await choose_acceptor(tls=has_tls)
            if signals.first is not None:
                raise Interrupted
        server = Server(Engine(settings, listeners, acceptor))
        server._engine.start()
    except BaseException as exc:
        for listener in listeners:
            listener.close()
        if isinstance(exc, (Interrupted, StartupError)) and signals.first is not None:
            raise interrupted(signals) from None
        raise
    await wait_started(server, signals)
    return server


async def wait_started(server: ServerHandle, signals: Signals) -> None:
    """Wait until a server has started, unless a signal comes."""
    signals.on_signal(lambda: stop_by_signal(server, signals))
    try:
        await server._wait_started()
    except StartupInterruptedError:
        if signals.first is not None:
            raise interrupted(signals) from None
        raise
    if signals.wanted:
        signals.look_again(server.url)


async def bind(settings: Settings, signals: Signals) -> list[Listener]:
    """Bind what the settings say, unless a signal comes."""
    if not settings.stop_on_signals:
        return await settings.bind()
    async with InterruptScope() as scope:
        signals.on_signal(scope.interrupt)
        listeners = await settings.bind()
        signals.on_signal(None)
        return listeners
    raise interrupted(signals)


def stop_by_signal(server: ServerHandle, signals: Signals) -> None:
    """Close a server at a signal, while there is no body to cancel."""
    if signals.count > 1:
        logger.warning("%s: a second signal forces the stop of %s", signals.latest, server.url)
    else:
        logger.info("%s: stopping %s", signals.first, server.url)
    server.close(timeout=0 if signals.count > 1 or not server._engine.started else None)


def interrupted(signals: Signals) -> StartupInterruptedError:
    return StartupInterruptedError(f"{signals.first} stopped the server before it had started")


class ServingContext(AsyncBlock, Generic[Handle]):
    """A server for the length of a block, once; a crash of the server and a signal cancel the body."""

    _server: Handle
    _signals: Signals | None = None

    def __init__(
        self,
        function: str,
        app: object,
        parse_options: Callable[[], Settings],
        start: Callable[[Settings, Signals], Awaitable[Handle]],
    ) -> None:
        self._function = function
        self._app = app
        self._parse_options = parse_options
        self._start = start
        self._body = InterruptScope()

    async def __aenter__(self) -> Handle:
        check_loop()
        if self._signals is not None:
            raise RuntimeError(f"{self!r} was entered before; call {self._function}() for each block")
        settings = self._parse_options()
        self._signals = signals = Signals(settings.stop_on_signals)
        signals.install()
        try:
            self._server = server = await self._start(settings, signals)
            # Something may have happened since the start.
            if server._engine.error is not None or signals.first is not None:
                async with server:  # which closes it
                    raise server._engine.error or interrupted(signals)
        except BaseException:
            signals.release()
            raise
        self._body.begin()
        server._engine.on_crash = self._body.interrupt
        signals.on_signal(self._end_by_signal)
        return server

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> bool:
        server, signals = self._server, self._signals
        assert signals is not None
        server._engine.on_crash = None
        signals.on_signal(lambda: stop_by_signal(server, signals))
        try:
            try:
                swallow = await self._body.__aexit__(exc_type, exc, tb)
            except BaseException:
                async with server:
                    raise
            if swallow:  # the server must not take it for a cancellation from outside
                exc_type = exc = tb = None
            await server.__aexit__(exc_type, exc, tb)
            return swallow
        finally:
            signals.release()

    def _end_by_signal(self) -> None:
        assert self._signals is not None
        if self._signals.count > 1:
            logger.warning("%s: a second signal forces the stop of %s", self._signals.latest, self._server.url)
            self._server.close(timeout=0)
        if self._body.interrupt():
            logger.info("%s: cancelling the block of %s", self._signals.first, self._server.url)
        else:
            logger.warning(
                "%s: closing %s; its block cannot be cancelled, since the task that entered it has ended",
                self._signals.first,
                self._server.url,
            )
            self._server.close()


def check_loop() -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        raise RuntimeError(
            "aioserve needs a running asyncio event loop, and there is none here; under trio, run on anyio's asyncio "
            'backend instead: anyio.run(main, backend="asyncio")'
        ) from None
