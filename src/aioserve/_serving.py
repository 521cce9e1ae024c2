"""
Lifetimes: when a server starts, when it ends, and what is raised.

The exit contract, which is what the rest of this package is for:

1. The start fails: the error is raised, the body never runs, nothing is left.
2. The body raises: that very object is raised, not in a group, after a graceful stop.
3. The server crashes while the body runs (the app's lifespan raises): the task that entered `serving()` is cancelled,
   as an `asyncio.TaskGroup` would do it, and `ServerCrashedError` is raised. If something else cancelled it as well,
   that cancellation is raised and the crash is logged. A server from `start()` cancels nobody: `aclose()` raises.
   A lifespan that raises before it was told to shut down is a crash in any case, also if the body has just ended.
4. The server is asked to close (by a handler, by `close()`): the body goes on, and the block ends normally.
5. Both fail: the body's exception is raised; the server's is added to it as a note, and logged.
6. A cancellation from outside: the body unwinds first, while its server still answers; then the server stops within
   its budget, which the cancellation cannot cut short; then the cancellation goes on, neither swallowed nor counted
   twice. A second native one (`Task.cancel()`) forces: no grace, but everything is still awaited.
7. A stop signal, where `stop_on_signals` asks for it: the body is cancelled, and the block ends normally; `serve()`
   returns; a server from `start()` closes. All servers that asked for it end. A second signal forces, and cancels what
   is left of the body once more. Before the body has begun, the start is aborted: rule 1, but `serve()` returns.
   Signal handlers are put back as they were. By default, no signal is touched. If the app takes a signal over while it
   starts, that is left so, and a warning says it; only the command line puts its handlers in front again.
8. Afterwards: no task, timer, socket or signal handler of the server is left, except a handler or a lifespan that
   ignores its cancellation (see `Report`); the port can be bound again at once, also where a process lives on that was
   forked in the meantime.
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

    If the app's lifespan dies while the body runs, the body is cancelled and `ServerCrashedError` is raised. A server
    that is asked to close (by a handler, or by `Server.close()`) does not end the block; to end it then, await
    `Server.wait_closed()` in it.

    Args:
        app: An ASGI callable, an import string ``"package.module:attribute"``, or a `uvicorn.Config`. Beside a Config,
            only `sockets` (in place of the Config's own address, as with uvicorn's ``Server.serve(sockets=...)``),
            `uds_mode`, `cancel_on_disconnect`, `stop_on_signals` and aioserve's own timeouts can be given.
        host: A name or an address, or a sequence of them; `None` is every interface, IPv4 and IPv6. Default:
            ``"127.0.0.1"``.
        port: 0, the default, takes a free one, the same on every address.
        reuse_port: Whether other programs of yours may listen on the same port; the kernel gives each its share of the
            connections. Default: `False`.
        uds: The path of a Unix socket. A stale socket file there is replaced, anything else is refused; the file is
            removed at the end. Default: `None`.
        uds_mode: The permissions of that file; to connect, a client needs the right to write. Default: 0o600.
        fd: The descriptor of a listening socket, TCP or Unix. A duplicate is used; yours stays open. Default: `None`.
        sockets: Bound sockets to accept on, TCP or Unix. They are lent: they are never closed, and what waits in their
            queue at the end is left to their next user. Default: `None`.
        systemd: Whether to accept on the sockets that systemd passes (``LISTEN_FDS``). If there are some, they take the
            place of `host`, `port` and `uds`, which are for a start without systemd; `fd` and `sockets` are served in
            both cases. A string is the name of one of them. Where systemd asks for it
            (``NOTIFY_SOCKET``), it is told when the server is ready, and when it stops, and its watchdog
            (``WATCHDOG_USEC``) is answered from the loop until the server has closed, so that it kills a program
            whose loop is blocked; a server with a named socket reports only that it is ready. Default: `False`.
        ssl: A ready `ssl.SSLContext`, for all listeners. You can load new certificates into it while the server runs.
            Default: `None`; uvicorn's ``ssl_certfile``, ``ssl_keyfile`` and so on work as well.
        lifespan: ``"auto"``, the default: an app may have no lifespan, but one that began it and raised has failed.
            ``"on"``: every exception is a failure. ``"off"``: the app's lifespan is not run.
        startup_timeout: How long the app's startup may take, in seconds; `None` is no limit. Default: 60.
        shutdown_timeout: How long the requests in flight may take to finish when the block ends, in seconds; `None` is
            no limit. Then their handlers are cancelled. Default: 10.
        drain_delay: How long to keep accepting when a stop is asked for, in seconds, while every response says
            ``connection: close``: for load balancers and kept-alive clients. Default: 0.
        disconnect_after: How long after the drain a handler that waits in `receive()` is told ``http.disconnect``, in
            seconds. The default, `None`, is at the end of the `shutdown_timeout`. Starlette's streaming responses wait
            for it, also those that would end by themselves: 0 cuts downloads short.
        header_timeout: How long a client may take to send the head of a request, in seconds, from when it is connected,
            or from the first byte of a later request; up to two seconds longer, since connections are looked at once a
            second. Then its connection is closed; where bytes had come, with a 408. A TLS handshake may take so
            long as well, but never more than a minute. `None` is no limit. Default: 60.
        cancel_on_disconnect: Whether to cancel the handler of a request when its client has gone, as far as the loop
            notices: not while it reads nothing, since the handler leaves a big body unread, or the client has sent
            more requests. One that waits for a thread is cancelled when that is done. The handler may clean up. A
            WebSocket's handler is told by `receive()`. Default: `False`.
        stop_on_signals: `True` (SIGINT and SIGTERM, on Windows also SIGBREAK), or the signals that end the block: its
            body is cancelled, and the block ends normally. A second one forces, except SIGHUP, which a closing terminal
            may send twice. Only in the main thread, and only where the loop does not handle the signal already. If the
            app takes one of them over while it starts, a warning is logged: call `Server.close()` in its handler, and
            await `Server.wait_closed()` in the block. Default: `False`.
        factory: Whether the app is a function that makes the app. Default: `False`.
        http2: Whether to serve HTTP/2 beside HTTP/1.1: over TLS where a client asks for it (ALPN, which is set on a
            ready context, too), and in clear text to clients that begin with it. uvicorn's own, experimental since
            0.50; it needs zttp, and chooses ``http="zttp"``. Default: `False`.
        options: The other options of `uvicorn.Config`, under their names. Those that make no sense inside a running
            program are refused, each with its reason. `log_config` and `log_level` default to `None`: logging is left
            as it is. `access_log=False` is for this server only.

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
        if not context.was_signalled() or task_status is not None:
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
        server = Server(Engine(settings, listeners, acceptor))
        server._engine.start()
    except BaseException as exc:
        for listener in listeners:
            listener.close()
        if isinstance(exc, Interrupted):
            raise interrupted(signals) from None
        if isinstance(exc, StartupError) and signals.first is not None:
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
        return await settings.bind()
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

    def was_signalled(self) -> bool:
        """Whether a signal has come that was to end the block."""
        return self._signals is not None and self._signals.first is not None


def check_loop() -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        raise RuntimeError(
            "aioserve needs a running asyncio event loop, and there is none here; under trio, run on anyio's asyncio "
            'backend instead: anyio.run(main, backend="asyncio")'
        ) from None
