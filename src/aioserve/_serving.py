"""
Lifetimes: when a server starts, when it ends, and what comes out of it.

The exit contract, which is what the rest of this package is for:

1. The start fails: the error is raised, the body never runs, nothing is left.
2. The body raises: that very object comes out, not in a group, after a graceful stop.
3. The server crashes while the body runs (the app's lifespan raises): the task that entered `serving()` is cancelled,
   as an `asyncio.TaskGroup` would, and `ServerCrashedError` comes out. If somebody else cancelled it as well, that
   cancellation wins and the crash is logged. A server from `start()` cancels nobody: `aclose()` raises.
4. The server is asked to close (by a handler, by `close()`): the body goes on, and the block ends normally.
5. Both fail: the body's exception wins; the server's is added as a note, and logged.
6. A cancellation from outside: the body unwinds first, while its server still answers; then the server stops within
   its budget, which the cancellation cannot cut short; then the cancellation goes on, neither swallowed nor counted
   twice. A second native one (`Task.cancel()`) forces: no grace, but everything is still awaited.
7. (Signals are left to the program.)
8. Afterwards, always: no task, timer, socket or handler of ours is left, and the port can be bound again at once.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio
from anyio.lowlevel import checkpoint_if_cancelled

from aioserve._engine import Engine
from aioserve._options import parse
from aioserve._server import Server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from types import TracebackType
    from typing import Self, Unpack

    from anyio.abc import TaskStatus

    from aioserve._options import App, Options


@asynccontextmanager
async def serving(app: App, **options: Unpack[Options]) -> AsyncIterator[Server]:
    """
    Serve an ASGI app for the length of a block.

        async with serving(app, port=8000) as server:
            print(server.url)
            await run_everything_else()

    The block begins when the app has started and the port is open. It ends gracefully, however it ends: the server
    stops accepting, answers the requests in flight, ends the app's lifespan, and leaves nothing behind.

    If the app's lifespan dies while the body runs, the body is cancelled and `ServerCrashedError` is raised. A server
    that is asked to close (by a handler, or by `Server.close()`) does not end the block: await `Server.wait_closed()`
    in it for that.

    Args:
        app: An ASGI callable, an import string ``"package.module:attribute"``, or a `uvicorn.Config`, which then says
            everything but the two timeouts.
        host: A name or an address, or a sequence of them; `None` is every interface, IPv4 and IPv6. Default:
            ``"127.0.0.1"``.
        port: 0, the default, takes a free one, the same on every address.
        reuse_port: Whether other programs of yours may listen on the same port; the kernel gives each its share of the
            connections. Default: `False`.
        uds: The path of a Unix socket, in place of a host and a port. A stale one there is replaced, anything else
            refused; what was made is removed at the end. Default: `None`.
        uds_mode: The permissions of that file; connecting takes the right to write. Default: 0o600.
        fd: The descriptor of a listening socket, TCP or Unix, in place of all that. A duplicate is used; yours stays
            open, as with `sockets`. Default: `None`.
        sockets: Bound sockets to accept on, TCP or Unix, in place of all that. They are lent: they are never closed,
            and what waits in their queue at the end is left to whoever takes them next. Default: `None`.
        systemd: Whether to accept on the sockets that systemd hands down (``LISTEN_FDS``), and only if there are none
            on those of the other options; a string is the name of one of them. Where systemd wants to know
            (``NOTIFY_SOCKET``), it is told when the server is ready, and when it stops; of one with a name, only the
            former. Default: `False`.
        ssl: A ready `ssl.SSLContext`; whoever holds it can load new certificates into it meanwhile. Default: `None`;
            uvicorn's ``ssl_certfile``, ``ssl_keyfile`` and so on work as well.
        lifespan: ``"auto"``, the default: an app that refuses the lifespan does without; one that began it and raised
            has failed. ``"on"``: every exception is a failure. ``"off"``: the app is not asked.
        startup_timeout: How long the app's startup may take, in seconds; `None` is no limit. Default: 60.
        shutdown_timeout: How long the requests in flight may take to finish when the block ends, in seconds; `None` is
            no limit. Then their handlers are cancelled. Default: 10.
        drain_delay: How long to go on accepting when a stop is asked for, in seconds, while every response says
            ``connection: close``: for balancers and kept-alive clients. Default: 0.
        disconnect_after: How long after that a handler that waits in `receive()` is told ``http.disconnect``, in
            seconds. The default, `None`, is not before the `shutdown_timeout`. Starlette's streaming responses listen,
            also those that would end by themselves: 0 cuts downloads short.
        factory: Whether the app is a function that makes the app. Default: `False`.
        options: The other options of `uvicorn.Config`, under their names. Those that make no sense inside a running
            program are refused, each with its reason. `log_config` and `log_level` default to `None`: logging is left
            as it is. `access_log=False` silences this server only.

    Yields:
        Server: It says where it listens.

    Raises:
        OSError: An address or a path cannot be bound, a name cannot be resolved, or a certificate cannot be read; the
            message says which.
        StartupError: The app could not be imported or started; `__cause__` is the app's own exception.
        StartupTimeoutError: Its startup took too long.
        ServerCrashedError: The app's lifespan died while the body ran.
        ShutdownError: The app's lifespan failed at its shutdown.
        TypeError: An option is unknown, refused, of the wrong type, or in conflict with another.
        ValueError: An option is out of range.
        RuntimeError: There is no running asyncio event loop.
    """
    async with await start(app, **options) as server, _Body(server):
        yield server


async def start(app: App, **options: Unpack[Options]) -> Server:
    """
    Start serving an ASGI app, and return when it has started.

    This is for where a block does not fit: hooks for startup and shutdown, fixtures, notebook cells. Start and stop may
    happen in different tasks, and nobody is ever cancelled: should the app's lifespan die, that is logged, and
    `Server.wait_closed()` and `Server.aclose()` raise it.

    End it with ``await server.aclose()``. Where a block does fit: ``async with await start(app) as server``.

    Args:
        app: As in `serving()`.
        options: As in `serving()`.

    Raises:
        OSError, StartupError, TypeError, ValueError, RuntimeError: As in `serving()`.
    """
    _check_backend()
    settings = parse(app, options)
    listeners = await settings.where.listen(settings.config.backlog)
    try:
        server = Server(Engine(settings, listeners))
    except BaseException:
        for listener in listeners:
            listener.close()
        raise
    await server._wait_started()
    return server


async def serve(
    app: App, *, task_status: TaskStatus[Server] = anyio.TASK_STATUS_IGNORED, **options: Unpack[Options]
) -> None:
    """
    Serve an ASGI app until the task or the scope around it is cancelled, or the server closes.

    In an anyio task group, this returns the `Server` once it has started:

        server = await task_group.start(partial(serve, app, port=8000))

    It can also be a task of an `asyncio.TaskGroup`, or a program: ``asyncio.run(serve(app, port=8000))``.

    Args:
        app: As in `serving()`.
        task_status: Given by anyio.
        options: As in `serving()`.

    Raises:
        ServerCrashedError: The app's lifespan died.
        OSError, StartupError, ShutdownError, TypeError, ValueError, RuntimeError: As in `serving()`.
    """
    async with serving(app, **options) as server:
        task_status.started(server)
        await server.wait_closed()


class _Body:
    """
    The body of a block, which a crash of its server cancels.

    The cancel is taken back where the body ends; so to the world around, the crash is an exception and never was a
    cancellation.
    """

    def __init__(self, server: Server) -> None:
        self._engine = server._engine
        self._crashed = False

    async def __aenter__(self) -> Self:
        if self._engine.error is not None:
            raise self._engine.error  # it died between its start and now
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        # Cancellations that came before us are none of our business.
        self._before = task.cancelling()
        self._engine.on_crash = self._cancel
        return self

    def _cancel(self) -> None:
        # This runs in the server's task, so the body is waiting for something, and meets the cancellation there. It
        # cannot end without meeting it, and so leave it to whatever comes after us.
        self._crashed = True
        self._task.cancel()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> bool:
        self._engine.on_crash = None
        if not self._crashed:
            return False

        others = self._task.uncancel() > self._before
        if not isinstance(exc, asyncio.CancelledError):
            return False
        if not others:
            return True  # ours alone: the server, which closes next, raises ServerCrashedError in its place

        # Two cancellations have come as one. If the other is an anyio scope's, the scope would not know this one for
        # its own, and would let it pass; here it can put in its own.
        await checkpoint_if_cancelled()
        return False


def _check_backend() -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        raise RuntimeError(
            "aioserve needs a running asyncio event loop, and there is none here; under trio, run on anyio's asyncio "
            'backend instead: anyio.run(main, backend="asyncio")'
        ) from None
