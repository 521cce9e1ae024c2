"""
Attacks that need a test or two each.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import anyio
import pytest

from aioserve import ServerCrashedError, _limits, serving, serving_process, start
from aioserve._net import forks
from aioserve._shutdown import Shutdown
from aioserve._waiting import Condition
from tests.helpers import not_portable
from tests.helpers.apps import App, Receive, Scope, Send
from tests.helpers.clients import PIPELINING, REQUEST, connect
from tests.helpers.processes import TALKING, is_free, linux_only
from tests.helpers.processes import get as get_from_child
from tests.helpers.turns import MOMENT, turns

pytestmark = pytest.mark.usefixtures("short_grace")


# `Server.stopping`, from several threads.

THREADS = 4
ROUNDS = 300


@pytest.fixture
def switching() -> Iterator[None]:
    """Let threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


class Looking:
    """Threads that look at several things, at each of them all at once."""

    def __init__(self, things: list[Any], look: Callable[[Any], anyio.Event]) -> None:
        self.found: list[list[anyio.Event]] = [[] for _ in things]
        """For each thing, what each thread has seen."""
        self._things = things
        self._look = look
        self._barrier = threading.Barrier(THREADS)
        self._threads = [threading.Thread(target=self._look_at_all) for _ in range(THREADS)]
        for thread in self._threads:
            thread.start()

    def _look_at_all(self) -> None:
        for thing, found in zip(self._things, self.found, strict=True):
            self._barrier.wait(10)
            found.append(self._look(thing))

    def end(self) -> None:
        for thread in self._threads:
            thread.join()


@pytest.mark.usefixtures("switching")
async def test_threads_that_look_at_stopping_for_the_first_time_get_the_same_event() -> None:
    """Another one would never be set."""
    nothing: Any = None
    shutdowns = [Shutdown(nothing, nothing, nothing, Condition(), "") for _ in range(ROUNDS)]
    looking = Looking(shutdowns, lambda shutdown: shutdown.event)
    looking.end()
    for shutdown, events in zip(shutdowns, looking.found, strict=True):
        assert {id(each) for each in events} == {id(shutdown.event)}
        shutdown.set()
        assert [each.is_set() for each in events] == [True] * THREADS


@pytest.mark.usefixtures("switching")
async def test_event_that_threads_have_looked_at_is_set_when_the_server_closes() -> None:
    """Also where it is closed while they look."""
    for number in range(30):
        async with serving(App()) as server:
            looking = Looking([server], lambda server: server.stopping)
            await turns(number % 5)
            server.close()
            looking.end()
            (events,) = looking.found
            async with asyncio.timeout(10):
                await server.stopping.wait()
            assert [each.is_set() for each in events] == [True] * THREADS
            assert {id(each) for each in events} == {id(server.stopping)}


# Tracebacks.


def length(traceback: TracebackType | None) -> int:
    return 0 if traceback is None else 1 + length(traceback.tb_next)


async def test_traceback_of_a_crash_does_not_grow_with_each_wait() -> None:
    """A program that waits again and again would keep all of its frames."""
    app = App()
    server = await start(app)
    app.crash.set()
    lengths = []
    for call in [server.wait_closed] * 5 + [server.aclose] * 5:
        try:
            await call()
        except ServerCrashedError as exc:
            lengths.append(length(exc.__traceback__))
    assert lengths == [lengths[0]] * 5 + [lengths[5]] * 5
    assert max(lengths) < 10


# The search path of a child.


@linux_only
@not_portable.child_processes
async def test_child_process_starts_where_the_search_path_has_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's import ignores what is no string, and so does the child."""
    odd: list[Any] = [b"/tmp", None, *sys.path, b"\xff"]
    monkeypatch.setattr(sys, "path", odd)
    async with serving_process(TALKING) as server:
        assert (await get_from_child(server)).text == "hello"


# Task factories.


class Failing:
    """A task factory that raises, as long as it is told to."""

    def __init__(self) -> None:
        self.fails = False
        self.errors: list[BaseException] = []

    def __call__(self, loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        if self.fails:
            raise MemoryError("no more tasks")
        return asyncio.Task(coroutine, loop=loop, **options)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        before = loop.get_task_factory(), loop.get_exception_handler()
        loop.set_task_factory(self)
        loop.set_exception_handler(lambda _, context: self.errors.append(context["exception"]))
        try:
            yield
        finally:
            loop.set_task_factory(before[0])
            loop.set_exception_handler(before[1])


def is_over(client: socket.socket) -> bool:
    """Whether the other side has closed or reset a connection, within a few seconds."""
    client.settimeout(5)
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False


@not_portable.loop_accepts
async def test_connection_for_which_the_task_factory_raises_is_closed() -> None:
    """Its client sees that; the error is the loop's to tell, and the server goes on."""
    failing = Failing()
    with failing.installed(), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        async with serving(App()) as server:
            failing.fails = True
            with socket.create_connection((server.host, server.port)) as client:
                while not failing.errors:
                    await asyncio.sleep(0)
                failing.fails = False
                assert is_over(client)
            assert isinstance(failing.errors[0], MemoryError)
            failing.errors.clear()
            async with connect(server) as connection:
                connection.ask("/")
                await connection.answer()
            assert server.stats.connections == 1
        gc.collect()
    assert [str(each.message) for each in warned] == []
    assert server.report is not None
    assert not server.report.was_forced


@not_portable.loop_accepts
async def test_server_for_whose_last_connection_the_task_factory_raises_leaves_no_socket() -> None:
    failing = Failing()
    with failing.installed():
        server = await start(App())
        (listening,) = server.sockets
        with socket.create_connection((server.host, server.port)) as client:
            failing.fails = True
            with contextlib.suppress(ServerCrashedError):  # uvloop may have accepted it before
                await server.aclose()
            failing.fails = False
            assert is_over(client)
        assert listening.fileno() < 0


# Lent sockets that block.


class Stalls:
    """Ends an accept() that blocks the loop, and counts that."""

    def __init__(self, lent: socket.socket) -> None:
        self.count = 0
        self._lent = lent
        self._timer = threading.Timer(3, self._end)

    def _end(self) -> None:
        self.count += 1
        self._lent.setblocking(False)
        for _ in range(2):
            socket.create_connection(self._lent.getsockname()).close()

    def __enter__(self) -> Stalls:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        self._timer.join()


@not_portable.lent_twice
async def test_lent_socket_that_is_set_to_blocking_does_not_stall_two_servers() -> None:
    """Both see that a connection has come, and one gets it; the other one finds an empty queue."""
    with socket.create_server(("127.0.0.1", 0)) as lent, Stalls(lent) as stalls:
        async with serving(App(), sockets=[lent]) as one, serving(App(), sockets=[lent]) as other:
            for count in range(1, 4):
                lent.setblocking(True)
                async with connect(one) as client:
                    client.ask("/")
                    await client.answer()
                await turns(5)
                assert stalls.count == 0
                assert one.stats.served + other.stats.served == count


@not_portable.loop_accepts
async def test_lent_socket_that_is_set_to_blocking_does_not_stall_after_a_pause(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Accepting was paused for want of a descriptor, and goes on."""
    failures = [OSError(errno.EMFILE, "Too many open files")]
    accept = forks.accept

    def fail_once(sock: socket.socket) -> socket.socket:
        if failures:
            raise failures.pop()
        return accept(sock)

    monkeypatch.setattr(forks, "accept", fail_once)
    monkeypatch.setattr(_limits, "ACCEPT_RETRY", MOMENT)
    with socket.create_server(("127.0.0.1", 0)) as lent, Stalls(lent) as stalls:
        async with serving(App(), sockets=[lent]) as server, connect(server) as client:
            client.ask("/")
            while failures:
                await asyncio.sleep(0)
            lent.setblocking(True)
            await client.answer()
        assert stalls.count == 0


@not_portable.loop_accepts
async def test_lent_socket_that_is_set_to_blocking_does_not_stall_where_its_owner_accepts_first() -> None:
    """The owner's accept() takes the connection in the same turn of the loop."""

    def accept(twin: socket.socket) -> None:
        lent.setblocking(False)  # and with it the twins
        with contextlib.suppress(BlockingIOError):
            taken.append(twin.accept()[0])
        lent.setblocking(True)

    loop = asyncio.get_running_loop()
    taken: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as lent, lent.dup() as before, lent.dup() as after:
        # Which of the readers is called first, the kernel decides.
        loop.add_reader(before.fileno(), accept, before)
        async with serving(App(), sockets=[lent]):
            loop.add_reader(after.fileno(), accept, after)
            lent.setblocking(True)
            with Stalls(lent) as stalls:
                for _ in range(3):
                    with socket.create_connection(lent.getsockname()):
                        await turns(10)
                    assert stalls.count == 0
        assert taken
        for twin in (before, after):
            loop.remove_reader(twin.fileno())
        for each in taken:
            each.close()


# Pipelined requests behind an event stream.


@pytest.mark.parametrize("http", PIPELINING)
async def test_event_stream_with_a_request_behind_it_ends_with_the_stop(http: str) -> None:
    """Its handler hears of the stop at once, although the connection's current request is another one."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] != "/stream":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
            await send({"type": "http.response.body", "body": b"hello"})
            return
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass
        heard.append("stop")

    heard: list[str] = []
    stream = REQUEST % b"/stream" + b"accept: text/event-stream\r\n\r\n"
    stream = stream.replace(b"\r\n\r\naccept", b"\r\naccept")
    async with serving(app, http=http, lifespan="off", shutdown_timeout=None) as server, connect(server) as client:
        client.writer.write(stream + REQUEST % b"/")
        await client.reader.readuntil(b"data: 1\n\n")
        await turns(10)
        assert heard == []
        async with asyncio.timeout(10):
            await server.aclose()
        assert heard == ["stop"]
        assert (await client.rest()).startswith(b"\r\n0\r\n\r\n")
    assert server.report is not None
    assert not server.report.was_forced


# Reports.


async def wrapped(coroutine: Any) -> Any:
    return await coroutine


@pytest.mark.parametrize("http", PIPELINING)
@pytest.mark.parametrize("layers", [1, 20, 40])
async def test_report_names_a_handler_behind_many_wrapping_coroutines(http: str, layers: int) -> None:
    """Each of several tools that trace tasks adds one or two."""

    def factory(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        for _ in range(layers):
            coroutine = wrapped(coroutine)
        return asyncio.Task(coroutine, loop=loop, **options)

    app = App()
    loop = asyncio.get_running_loop()
    loop.set_task_factory(factory)
    try:
        async with serving(app, http=http, shutdown_timeout=MOMENT) as server, connect(server) as client:
            client.ask("/hold")
            await app.holding.wait()
    finally:
        loop.set_task_factory(None)
    assert server.report is not None
    (handler,) = server.report.cancelled
    assert (handler.method, handler.path) == ("GET", "/hold")
    assert ", waiting at App.request (" in str(handler)


# Forks during a bind.


def sockets_of(pid: int | str) -> set[str]:
    """Return the sockets that a process has."""
    found = set()
    for each in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one that was used to list the directory
            found.add(os.readlink(f"/proc/{pid}/fd/{each}"))
    return {each for each in found if each.startswith("socket:")}


@linux_only
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@not_portable.forks
async def test_port_is_free_after_the_block_although_a_thread_forks_all_the_time() -> None:
    """No child, of those that live on, has a socket that was being bound when it was forked."""

    def fork() -> None:
        while not over.is_set() and len(children) < 400:
            if not (pid := os.fork()):
                signal.alarm(60)
                while True:
                    signal.pause()
            children.append(pid)

    before = sockets_of("self")
    over = threading.Event()
    children: list[int] = []
    ports: list[int] = []
    thread = threading.Thread(target=fork)
    thread.start()
    until = time.monotonic() + 2
    try:
        while len(ports) < 200 and time.monotonic() < until:
            async with serving(App()) as server:
                ports.append(server.port)
        over.set()
        while thread.is_alive():
            await asyncio.sleep(0)
        assert len(children) > 5
        patience = time.monotonic() + 20
        kept = children  # on a busy machine, a child may still be about to let go
        while kept and time.monotonic() < patience:
            await asyncio.sleep(MOMENT)
            kept = [pid for pid in kept if sockets_of(pid) - before]
        assert kept == []
        # Another program on this machine may have got one of the ports by now, but hardly all of them.
        assert any(is_free(port) for port in ports)
    finally:
        over.set()
        thread.join()
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)  # noqa: ASYNC222 (it is dead)
