"""
Rule 7 of the exit contract: what a stop signal does, to whom, and what stands in its place afterwards.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from types import FrameType
from typing import Any

import anyio
import pytest

from aioserve import StartupInterruptedError, _signals, serve, serving, start
from aioserve._signals import Signals
from tests.apps import App
from tests.clients import connect, get
from tests.doors import DOORS, Door
from tests.programs import Program

SERVING = "uvicorn.error: Serving on http://127.0.0.1:8000"
CLOSED = "uvicorn.error: Closed http://127.0.0.1:8000"
END = "the program goes on to its end"

LOOPS = ["asyncio", "uvloop"]
BOTH = ["SIGINT", "SIGTERM"]


# A signal in the body.


@pytest.mark.parametrize("loop_name", LOOPS)
@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("door", DOORS)
def test_a_signal_ends_the_block_and_the_program_goes_on(door: str, name: str, loop_name: str) -> None:
    """The body unwinds while its server still answers, the lifespan ends, and the exit code is 0."""
    with Program("-m", "tests.signalled", door, "body", loop_name, *BOTH) as program:
        program.wait_for("uvicorn.error: Serving" if door == "serve" else "the body runs")
        program.send(signal.Signals[name])
        assert program.end() == (0, "")
    body = ["GET /", "answered /", "the body says: hello", "the body is over"] if door == "serving" else []
    (noticed,) = [line for line in program.masked if line.startswith("aioserve: ")]
    assert noticed.startswith(f"aioserve: {name}: ")
    assert [line for line in program.masked if line not in (noticed, "the body runs")] == [
        "startup",
        SERVING,
        *body,
        "shutdown",
        "lifespan over",
        CLOSED,
        END,
    ]


# Before it.


@pytest.mark.parametrize("loop_name", LOOPS)
@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("door", DOORS)
def test_a_signal_during_the_startup_gives_it_up(door: str, name: str, loop_name: str) -> None:
    """At once, and orderly; `serve()` returns, and the others say what it was."""
    with Program("-m", "tests.signalled", door, "startup", loop_name, *BOTH) as program:
        program.wait_for("startup")
        program.send(signal.Signals[name])
        assert program.end() == (0, "")
    said = [] if door == "serve" else [f"StartupInterruptedError: {name} stopped the server before it had started"]
    assert [line for line in program.masked if not line.startswith("aioserve: ")] == [
        "startup",
        "lifespan over",
        *said,
        END,
    ]


@pytest.mark.parametrize("loop_name", LOOPS)
@pytest.mark.parametrize("door", DOORS)
def test_a_signal_ends_even_an_import(door: str, loop_name: str) -> None:
    """Which holds up the loop, so that nothing else could."""
    with Program("-m", "tests.signalled", door, "import", loop_name, *BOTH) as program:
        program.wait_for("importing")
        program.send(signal.SIGTERM)
        assert program.end() == (0, "")
    said = [] if door == "serve" else ["StartupInterruptedError: SIGTERM stopped the server before it had started"]
    assert program.said == ["importing", *said, END]


# During the stop, and the second one.


@pytest.mark.parametrize("loop_name", LOOPS)
@pytest.mark.parametrize("door", DOORS)
def test_the_first_signal_does_not_force_a_stop_that_had_another_cause(door: str, loop_name: str) -> None:
    """The request in flight is answered."""
    with Program("-m", "tests.signalled", door, "stop", loop_name, *BOTH) as program:
        program.wait_for("holding")
        program.send(signal.SIGTERM)
        program.wait_for("aioserve: SIGTERM")
        program.send(signal.SIGUSR1)
        assert program.end() == (0, "")
    assert "answered /hold" in program.said
    assert program.said[-1] == END


@pytest.mark.parametrize("loop_name", LOOPS)
@pytest.mark.parametrize("moment", ["stop", "second"])
@pytest.mark.parametrize("door", DOORS)
def test_the_second_signal_forces(door: str, moment: str, loop_name: str) -> None:
    """Also where it is another one than the first; the lifespan still ends in good order."""
    with Program("-m", "tests.signalled", door, moment, loop_name, *BOTH) as program:
        program.wait_for("holding")
        program.send(signal.SIGTERM)
        program.wait_for("aioserve: SIGTERM")
        program.send(signal.SIGINT)
        assert program.end() == (0, "")
    rest = program.masked[program.masked.index("cancelled /hold") :]
    assert [line for line in rest if not line.startswith("aioserve: ")] == [
        "cancelled /hold",
        "shutdown",
        "lifespan over",
        CLOSED,
        END,
    ]


# By default.


@pytest.mark.parametrize("loop_name", LOOPS)
def test_by_default_sigterm_is_the_programs(loop_name: str) -> None:
    """Which has no handler for it here, and dies of it."""
    with Program("-m", "tests.signalled", "serving", "body", loop_name) as program:
        program.wait_for("uvicorn.error: Serving")
        program.send(signal.SIGTERM)
        assert program.end() == (-signal.SIGTERM, "")
    assert [line for line in program.masked if line != "the body runs"] == ["startup", SERVING]


@pytest.mark.parametrize("loop_name", LOOPS)
@pytest.mark.parametrize("door", DOORS)
def test_by_default_ctrl_c_is_asyncios(door: str, loop_name: str) -> None:
    """Which cancels the main task; all unwinds, and `KeyboardInterrupt` comes out of `asyncio.run()`."""
    with Program("-m", "tests.signalled", door, "body", loop_name) as program:
        program.wait_for("uvicorn.error: Serving")
        program.send(signal.SIGINT)
        code, err = program.end()
    assert code == -signal.SIGINT
    assert err.endswith("\nKeyboardInterrupt\n")
    assert program.masked[-2:] == ["lifespan over", CLOSED]


@pytest.mark.parametrize("loop_name", LOOPS)
@pytest.mark.skipif(sys.platform != "linux", reason="it has to know when the program is asleep")
def test_by_default_the_second_ctrl_c_forces(loop_name: str) -> None:
    """By way of `asyncio.run()`, which cancels all that is left."""
    with Program("-m", "tests.signalled", "serving", "second", loop_name) as program:
        program.wait_for("holding")
        program.send(signal.SIGINT)
        program.wait_for("the body is over")
        program.wait_until_asleep()
        program.send(signal.SIGINT)
        code, err = program.end()
    assert code == -signal.SIGINT
    assert err.endswith("\nKeyboardInterrupt\n")
    assert "cancelled /hold" in program.said
    assert "lifespan over" in program.said


# Inside a program.


@pytest.fixture
async def calls() -> AsyncIterator[list[str]]:
    """Stand in for a host that handles SIGUSR1 and SIGTERM, and note its calls."""
    called: list[str] = []
    before = {}
    for each in (signal.SIGUSR1, signal.SIGTERM):
        before[each] = signal.signal(each, functools.partial(note, called, "host"))
    yield called
    for signum, handler in before.items():
        signal.signal(signum, handler)


def note(called: list[str], name: str, signum: int, frame: FrameType | None) -> None:
    called.append(name)


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
async def test_the_task_counts_no_cancellation(door: Door, calls: list[str]) -> None:
    """To the task, it never was one; and the host is not called, unless it is its turn again."""
    app = App()

    async def body(server: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        await server.wait_closed() if door is DOORS["start"] else await asyncio.Event().wait()

    await door(app, body, stop_on_signals=True)

    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    await asyncio.sleep(0)
    assert app.events == ["startup", "shutdown", "lifespan over"]
    assert calls == []
    signal.raise_signal(signal.SIGTERM)
    assert calls == ["host"]


async def test_the_bodys_exception_wins_over_the_signal(calls: list[str]) -> None:
    """It is what the body made of it."""
    with pytest.raises(ValueError, match="the body's"):
        async with serving(App(), stop_on_signals=True):
            signal.raise_signal(signal.SIGTERM)
            try:
                await asyncio.Event().wait()
            finally:
                raise ValueError("the body's")


@pytest.mark.parametrize("native", [True, False], ids=["natively", "by a scope"])
async def test_a_cancellation_wins_over_the_signal(native: bool, calls: list[str]) -> None:
    """Both come in the same turn of the loop; the one from outside goes on."""

    async def block() -> None:
        task = asyncio.current_task()
        assert task is not None
        with scope:
            async with serving(App(), stop_on_signals=True):
                signal.raise_signal(signal.SIGTERM)
                asyncio.get_running_loop().call_soon(task.cancel if native else scope.cancel)
                await asyncio.Event().wait()
            came_out.append("of the block")

    came_out: list[str] = []
    scope = anyio.CancelScope()
    task = asyncio.create_task(block())
    await asyncio.wait({task})

    assert task.cancelled() == native
    assert came_out == []
    assert task.cancelling() == int(native)


async def test_the_second_signal_cancels_what_is_left_of_the_body(calls: list[str]) -> None:
    """Else a clean-up that hangs could only be killed."""
    seen = []

    async with serving(App(), stop_on_signals=True):
        try:
            signal.raise_signal(signal.SIGTERM)
            await asyncio.Event().wait()
        finally:
            signal.raise_signal(signal.SIGTERM)
            try:
                await asyncio.Event().wait()
            finally:
                seen.append("over")

    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    assert seen == ["over"]


async def test_a_signal_ends_a_block_whose_server_has_closed_already(calls: list[str]) -> None:
    """Its handlers are there for as long as the block is."""
    async with serving(App(), stop_on_signals=True) as server:
        server.close()
        await server.wait_closed()
        signal.raise_signal(signal.SIGTERM)
        await asyncio.Event().wait()
    assert calls == []


async def test_all_servers_that_asked_for_it_end(calls: list[str]) -> None:
    """And no other does."""
    both = await start(App(), stop_on_signals=True)
    another = await start(App(), stop_on_signals=[signal.SIGUSR1])
    async with serving(App(), stop_on_signals=[signal.SIGTERM]), serving(App()) as without:
        signal.raise_signal(signal.SIGTERM)
        await both.wait_closed()
        assert another.is_serving()
        assert without.is_serving()
        await asyncio.Event().wait()
    await another.aclose()


async def test_a_group_that_waits_for_the_server_hears_of_the_signal(calls: list[str]) -> None:
    """From `serve()`, which returns where nobody waits: there is no server to give."""
    with pytest.raises(ExceptionGroup) as caught:
        async with anyio.create_task_group() as group:
            app = App(startup="hangs")
            asyncio.get_running_loop().call_later(0.01, signal.raise_signal, signal.SIGTERM)
            await group.start(functools.partial(serve, app, stop_on_signals=True))
    assert caught.group_contains(StartupInterruptedError, match="SIGTERM stopped")


async def test_a_signal_while_a_name_is_resolved(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The start is given up there, too; nothing has been bound."""
    asked = threading.Event()
    answer = threading.Event()
    literal = os.strerror  # any function will do: the name is asked for in a thread

    def slowly(host: str, flags: int) -> Any:
        if threading.current_thread() is threading.main_thread():
            raise OSError(literal(22))
        asked.set()
        answer.wait()
        return []

    monkeypatch.setattr("aioserve._sockets._getaddrinfo", slowly)
    monkeypatch.setattr("aioserve._sockets._literal", lambda host: (_ for _ in ()).throw(UnicodeError))
    starting = asyncio.create_task(start(App(), host="slow.test", stop_on_signals=True))
    while not asked.is_set():
        await asyncio.sleep(0)
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(StartupInterruptedError, match="SIGTERM stopped the server before it had started"):
        await starting
    answer.set()
    for thread in threading.enumerate():
        if thread.name.startswith("aioserve-resolve"):
            thread.join()


# What stands in its place afterwards.


async def test_two_servers_that_end_as_they_began_leave_the_handlers_as_they_were(calls: list[str]) -> None:
    """Each of them, in each order."""
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    for first in (0, 1):
        servers = [await start(App(), stop_on_signals=True), await start(App(), stop_on_signals=True)]
        await servers[first].aclose()
        assert {each: signal.getsignal(each) for each in before} != before
        await servers[1 - first].aclose()
        assert {each: signal.getsignal(each) for each in before} == before


def interleavings() -> Iterator[tuple[str, ...]]:
    """All orders of two who ask, and of a host that sets a handler, and puts back what it found, or does not."""
    for steps in (("A+", "A-", "B+", "B-", "H+"), ("A+", "A-", "B+", "B-", "H+", "H-")):
        for order in itertools.permutations(steps):
            if all(order.index(f"{each}+") < order.index(f"{each}-") for each in "ABH" if f"{each}-" in order):
                yield order


async def test_handlers_are_put_back_in_every_order(calls: list[str]) -> None:
    """A host's own, set in between, stays; and what it puts back does what was there in the beginning."""
    tried = 0
    original = signal.getsignal(signal.SIGUSR1)
    hosts = functools.partial(note, calls, "newer")
    for order in interleavings():
        asking: dict[str, Signals] = {}
        found: Any = None
        for step in order:
            match step:
                case "H+":
                    found = signal.signal(signal.SIGUSR1, hosts)
                case "H-":
                    signal.signal(signal.SIGUSR1, found)
                case "A+" | "B+":
                    asking[step[0]] = Signals([signal.SIGUSR1])
                case "A-" | "B-":
                    asking.pop(step[0]).release()
            # Whoever asks is heard, if a handler of ours is on top.
            signal.raise_signal(signal.SIGUSR1)
            if asking and isinstance(signal.getsignal(signal.SIGUSR1), _signals._Handler):
                assert calls == [], order
                assert all(each.count for each in asking.values()), order
            else:
                assert len(calls) == 1, order
            calls.clear()

        last = signal.getsignal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGUSR1)
        assert calls == ["newer" if "H-" not in order else "host"], order
        if "H-" not in order:
            assert last is hosts, order
        elif not isinstance(last, _signals._Handler):  # the host has put one of ours back, after its time
            assert last is original, order
        calls.clear()

        # And whoever begins next, and ends, leaves what was there in the beginning.
        Signals([signal.SIGUSR1]).release()
        if "H-" in order:
            assert signal.getsignal(signal.SIGUSR1) is original, order
        signal.signal(signal.SIGUSR1, original)
        tried += 1
    assert tried == 30 + 90


async def test_a_host_that_calls_what_it_found_does_not_call_a_dead_handler(calls: list[str]) -> None:
    """It reaches what ours had replaced."""
    ours = Signals([signal.SIGUSR1])
    found = signal.getsignal(signal.SIGUSR1)
    assert callable(found)

    def chaining(signum: int, frame: FrameType | None) -> None:
        calls.append("chaining")
        found(signum, frame)

    signal.signal(signal.SIGUSR1, chaining)
    signal.raise_signal(signal.SIGUSR1)
    assert (calls, ours.count) == (["chaining"], 1)
    ours.release()
    signal.raise_signal(signal.SIGUSR1)
    assert (calls, ours.count) == (["chaining", "chaining", "host"], 1)


def test_what_a_runner_set_and_could_not_take_back_is_not_put_back() -> None:
    """asyncio handles SIGINT for the length of one `run()`; a server that outlives it must not bring that back."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    try:
        with asyncio.Runner() as runner:
            server = runner.run(start(App(), stop_on_signals=True))
            assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
            runner.run(server.aclose())
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_server_that_nobody_closes_leaves_the_handlers_as_they_were() -> None:
    """Its loop's end is its own."""
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    asyncio.run(leave())
    after = {each: signal.getsignal(each) for each in before}
    assert after == {**before, signal.SIGINT: before[signal.SIGINT]}


async def leave() -> None:
    await start(App(), stop_on_signals=True)


def test_a_fork_does_not_answer_for_its_parent() -> None:
    """A process that was forked dies of SIGTERM as it always did, and the server of its parent goes on."""
    with Program("-W", "ignore:.*use of fork:DeprecationWarning", "-c", FORKING) as program:
        assert program.end() == (0, "")
    assert program.said == [f"the fork died of {int(signal.SIGTERM)}", "the server goes on: True"]


FORKING = """
import asyncio, os, signal
from aioserve import serving
from tests.apps import App

async def main():
    async with serving(App(), stop_on_signals=True) as server:
        told, tell = os.pipe()
        if not (pid := os.fork()):
            os.write(tell, b"!")
            signal.pause()
            os._exit(0)
        os.read(told, 1)
        os.kill(pid, signal.SIGTERM)
        print("the fork died of", os.waitpid(pid, 0)[1])
        await asyncio.sleep(0)
        print("the server goes on:", server.is_serving())

asyncio.run(main())
"""


# What is refused, before anything starts.


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
async def test_a_signal_that_the_loop_handles_is_refused(door: Door, calls: list[str]) -> None:
    """As is every other with it."""
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, calls.append, "the loop's")
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(RuntimeError, match=r"handles SIGTERM already .* call close"):
            await door(App(), never, stop_on_signals=True)
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
        signal.raise_signal(signal.SIGTERM)
        await asyncio.sleep(0.01)
        assert calls == ["the loop's"]
    finally:
        loop.remove_signal_handler(signal.SIGTERM)


async def never(_: object) -> None:
    raise AssertionError("the body ran")


def test_another_thread_than_the_main_one_is_refused() -> None:
    """Python handles signals in the main thread only."""

    def elsewhere() -> None:
        try:
            asyncio.run(serve(App(), stop_on_signals=True))
        except RuntimeError as exc:
            said.append(str(exc))

    said: list[str] = []

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    (line,) = said
    assert line.startswith("stop_on_signals: Python handles SIGINT in the main thread only, and this is another")


async def test_what_could_not_be_put_back_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A handler that was there before Python was."""
    monkeypatch.setattr(signal, "getsignal", lambda signum: None)
    with pytest.raises(RuntimeError, match="could not be put back"):
        await serve(App(), stop_on_signals=True)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (15, TypeError, "must be True, False, or a sequence of signals, not 15"),
        ("SIGTERM", TypeError, "must be True, False, or a sequence of signals, not 'SIGTERM'"),
        (None, TypeError, "must be True, False, or a sequence of signals, not None"),
        (["SIGTERM"], TypeError, "and not 'SIGTERM'"),
        ([True], TypeError, "and not True"),
        ([999], ValueError, "there is no signal 999"),
        ([signal.SIGTERM, signal.SIGKILL], ValueError, "SIGKILL is not for a program to handle"),
        ([signal.SIGSEGV], ValueError, "SIGSEGV is not for a program to handle"),
    ],
)
async def test_a_bad_value_is_refused(value: Any, error: type[Exception], message: str) -> None:
    """With the value; and nothing is installed."""
    with pytest.raises(error, match=message):
        await serve(App(), stop_on_signals=value)


@pytest.mark.parametrize("value", [[], {signal.SIGUSR1}, (signal.SIGUSR1, signal.SIGUSR1)], ids=repr)
async def test_any_collection_of_signals_will_do(value: Any, calls: list[str]) -> None:
    """An empty one is none."""
    async with serving(App(), stop_on_signals=value) as server, connect(server):
        assert (await get(server)).text == "hello"
        assert isinstance(signal.getsignal(signal.SIGUSR1), _signals._Handler) == bool(value)


def test_an_import_that_swallows_the_first_signal_is_ended_by_the_second() -> None:
    """What is raised in somebody else's code may be lost there."""
    with Program("-c", SWALLOWING) as program:
        program.wait_for("importing")
        program.wait_until_asleep()
        program.send(signal.SIGTERM)
        program.wait_for("swallowed")
        program.wait_until_asleep()
        program.send(signal.SIGTERM)
        assert program.end() == (0, "")
    assert program.said == ["importing", "swallowed"]


SWALLOWING = """
import asyncio
from aioserve import serve
asyncio.run(serve("tests.swallowing_module:app", stop_on_signals=True))
"""
