"""
`aioserve.testing.assert_nothing_left()`: what it finds, and what it does not count.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import threading

import anyio
import pytest
import trio

from aioserve import testing
from aioserve.testing import assert_nothing_left
from tests.helpers.apps import App
from tests.helpers.programs import Program

# What can be left behind, in a project of its own, since it stays there. The keys are the messages of the check.
LEFT_IN_THE_LOOP = {
    "a task: <Task pending name='forgotten'": "kept.append(loop.create_task(asyncio.Event().wait(), name='forgotten'))",
    "a timer: <TimerHandle": "loop.call_later(99, print)",
    "the loop's exception handler: <built-in function print>; it was ": "loop.set_exception_handler(print)",
    "a thread: <*(AnyIO worker thread,": "await anyio.to_thread.run_sync(print)",
    "a thread: <Thread(asyncio_0,": "await asyncio.to_thread(print)",
}


LEFT_IN_THE_PROCESS = {
    "a thread: <Thread(forgotten,": "threading.Thread(target=forever.wait, name='forgotten', daemon=True).start()",
    "a socket, ('127.0.0.1', *)": "kept.append(socket.create_server(('127.0.0.1', 0)))",
    "a socket, without a name": "kept.append(socket.socketpair())",
    "*test_left.py": "kept.append(open(__file__))",
    "a pipe": "kept.append(os.pipe())",
    "a handler of signal *: <function *>; it was ": "signal.signal(signal.SIGUSR1, lambda *_: None)",
    "handlers of the logger 'known': (<StreamHandler*,); it was ()": "known.addHandler(logging.StreamHandler())",
    "handlers of the logger 'new': (<StreamHandler*": "logging.getLogger('new').addHandler(logging.StreamHandler())",
    "handlers of the logger 'handled': (); it was (<Stream*": "logging.getLogger('handled').handlers.clear()",
    "level of the logger 'root': 10; it was 30": "logging.root.setLevel(logging.DEBUG)",
    "propagate of the logger 'known': False; it was True": "known.propagate = False",
    "disabled of the logger 'known': True; it was False": "known.disabled = True",
    "filters of the logger 'known': (<*": "known.addFilter(lambda record: True)",
    "warning filters: *'ignore', *UserWarning": "warnings.simplefilter('ignore', UserWarning)",
}


PROJECT = """
import asyncio, logging, os, signal, socket, threading, warnings
import anyio, pytest
from aioserve import _limits
from aioserve.testing import assert_nothing_left, clients
from aioserve.testing.fixtures import LiveServers, Opened

_limits.ENDING_THREADS = 0
kept = []
forever = threading.Event()
known = logging.getLogger("known")
logging.getLogger("handled").addHandler(logging.StreamHandler())

@pytest.fixture
def anyio_backend():
    return "asyncio"
"""


BLOCK = """
def test_{number}():
    with assert_nothing_left():
        {statement}
"""


BLOCK_IN_THE_LOOP = """
async def test_{number}():
    loop = asyncio.get_running_loop()
    async with assert_nothing_left(thread_pools=True):
        {statement}
"""


class TestNothingLeft:
    @pytest.mark.parametrize(
        ("block", "kinds"),
        [(BLOCK, LEFT_IN_THE_PROCESS), (BLOCK_IN_THE_LOOP, LEFT_IN_THE_LOOP | LEFT_IN_THE_PROCESS)],
        ids=["with", "async with"],
    )
    def test_assert_nothing_left_finds_every_kind_of_leak(
        self, pytester: pytest.Pytester, block: str, kinds: dict[str, str]
    ) -> None:
        """And says what it is."""
        blocks = [block.format(number=number, statement=each) for number, each in enumerate(kinds.values())]
        pytester.makepyfile(test_left=PROJECT + "".join(blocks))
        options = ("-o", "anyio_mode=auto", "-p", "no:asyncio", "-p", "no:randomly", "-p", "no:cacheprovider")
        done = pytester.runpytest_subprocess(*options)
        done.assert_outcomes(failed=len(kinds))
        for said in kinds:
            done.stdout.fnmatch_lines(f"E * {said}*")
        done.stdout.fnmatch_lines("E * AssertionError: left behind:")

    def test_assert_nothing_left_in_a_fixture_fails_the_test(self, pytester: pytest.Pytester) -> None:
        """At its end, on each plugin's loop; the next test is not affected."""
        test = """
            import asyncio, pytest, pytest_asyncio
            from aioserve.testing import assert_nothing_left
            from aioserve.testing.fixtures import LiveServers

            @pytest.fixture
            async def anyios():
                async with assert_nothing_left():
                    yield

            @pytest_asyncio.fixture
            async def asyncios():
                async with assert_nothing_left():
                    yield

            anyio_backend = pytest.fixture(lambda: "asyncio")

            @pytest.mark.anyio
            @pytest.mark.parametrize("leaves", [True, False])
            async def test_anyio(anyios, leaves):
                global kept
                if leaves:
                    kept = asyncio.create_task(asyncio.Event().wait(), name="one of anyio's")

            @pytest.mark.asyncio
            @pytest.mark.parametrize("leaves", [True, False])
            async def test_asyncio(asyncios, leaves):
                global kept
                if leaves:
                    kept = asyncio.create_task(asyncio.Event().wait(), name="one of asyncio's")
        """
        pytester.makepyfile(test)
        pytester.makeini("[pytest]\nasyncio_default_fixture_loop_scope = function")
        done = pytester.runpytest_subprocess("-p", "no:randomly", "-p", "no:cacheprovider")
        done.assert_outcomes(passed=4, errors=2)
        done.stdout.fnmatch_lines(['E * a task: <Task pending name="one of anyio\'s"*'])
        done.stdout.fnmatch_lines(['E * a task: <Task pending name="one of asyncio\'s"*'])

    def test_server_and_client_leave_nothing(self) -> None:
        """A thread of the loop's own pool belongs to the loop."""

        async def main() -> None:
            async with assert_nothing_left():
                async with testing.client(App()) as client:
                    await client.get("/")
                await asyncio.to_thread(gc.get_count)
                await anyio.to_thread.run_sync(gc.get_count)

        asyncio.run(main())

    async def test_objects_that_are_closing_are_given_some_turns(self) -> None:
        """A transport that is closing and a task that was cancelled end some turns later."""
        async with assert_nothing_left():
            ours, theirs = socket.socketpair()
            _, writer = await asyncio.open_connection(sock=ours)
            task = asyncio.create_task(asyncio.Event().wait())
            await asyncio.sleep(0)
            theirs.close()
            writer.close()
            task.cancel()

    def test_pipe_that_uvloop_keeps_from_its_first_loop_on_is_no_leak(self) -> None:
        """In a program of its own, which may leave nothing else, not even a pipe like that one."""
        program = """
import asyncio, os, sys, uvloop
from aioserve.testing import assert_nothing_left

def run():
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.sleep(0))

for leaves in ("nothing", "a pipe", "a byte in a pipe"):
    reading, writing = -1, -1
    try:
        with assert_nothing_left():
            run()
            if leaves != "nothing":
                reading, writing = os.pipe()
            if leaves == "a byte in a pipe":
                os.write(writing, b"x")
    except AssertionError as exc:
        print(leaves, str(exc).count("a pipe"))
        for each in (reading, writing):
            os.close(each)
    else:
        print(leaves, 0)
"""
        with Program("-c", program) as running:
            code, err = running.end()
        assert (code, running.said, err) == (0, ["nothing 0", "a pipe 2", "a byte in a pipe 2"], "")

    @pytest.mark.parametrize("package", ["winloop", "zuvloop", "another"])
    def test_pipe_of_another_libuv_is_no_leak(self, package: str) -> None:
        """Each of these packages has one beside uvloop's; here it is made by hand, and a second one is a leak."""
        program = f"""
import asyncio, os, sys, uvloop
from aioserve.testing import assert_nothing_left

def keep():
    reading, writing = os.pipe()
    os.write(writing, b"x")

sys.modules[{package!r}] = os
for _ in range(2):
    try:
        with assert_nothing_left():
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(asyncio.sleep(0))
            keep()
    except AssertionError as exc:
        print(str(exc).count("a pipe"))
    else:
        print(0)
"""
        with Program("-c", program) as running:
            code, err = running.end()
        assert (code, running.said, err) == (0, ["2", "2"] if package == "another" else ["0", "2"], "")

    def test_whole_program_leaves_nothing(self) -> None:
        """Here the threads of the loop's pool have to end, and do."""

        async def main() -> None:
            async with testing.server(App()):
                await anyio.to_thread.run_sync(gc.get_count)

        with assert_nothing_left():
            asyncio.run(main())

    @pytest.mark.parametrize("in_the_loop", [False, True])
    def test_exception_of_the_block_is_raised_without_a_check(self, in_the_loop: bool) -> None:
        """Nothing is looked for then."""
        error = KeyError("the test's own")
        with contextlib.ExitStack() as kept:

            async def fail() -> None:
                async with assert_nothing_left():
                    leave_and_raise()

            def leave_and_raise() -> None:
                kept.enter_context(open(__file__))
                raise error

            with pytest.raises(KeyError) as caught:
                if in_the_loop:
                    asyncio.run(fail())
                with assert_nothing_left():
                    leave_and_raise()
            assert caught.value is error

    def test_object_that_ended_in_the_block_is_no_leak(self) -> None:
        """A file that was open before, a thread that has ended."""
        file = open(__file__)  # noqa: SIM115
        going = threading.Event()
        thread = threading.Thread(target=going.wait)
        thread.start()
        with assert_nothing_left():
            file.close()
            going.set()
            thread.join()

    def test_garbage_of_the_block_is_collected_before_the_check(self) -> None:
        """So its finalizers run in this block, and not in another one."""
        finalized: list[str] = []

        class Forgotten:
            def __init__(self) -> None:
                self.itself = self

            def __del__(self) -> None:
                finalized.append("it")

        with assert_nothing_left():
            Forgotten()
        assert finalized == ["it"]

    def test_async_check_outside_asyncio_is_refused(self) -> None:
        """For example under trio."""

        async def main() -> None:
            async with assert_nothing_left():
                pass

        with pytest.raises(RuntimeError, match="requires a running asyncio event loop; without one, use a plain with"):
            trio.run(main)


@pytest.mark.parametrize("name", ["asyncio_0", "AnyIO worker thread", "another"])
async def test_thread_that_is_ending_is_awaited_while_the_loop_runs(name: str) -> None:
    """Its end may need the loop, and so it is not just joined."""
    loop = asyncio.get_running_loop()
    told = threading.Event()

    def end_with_the_loop() -> None:
        told.wait()
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result()

    async with assert_nothing_left(thread_pools=True):
        thread = threading.Thread(target=end_with_the_loop, name=name)
        thread.start()
        threading.Timer(0.1, told.set).start()  # more than the turns that everything gets
    assert not thread.is_alive()


async def test_timer_that_repeats_itself_is_no_leak() -> None:
    """Each is a new timer, but calls the same function as the one before."""

    def tick() -> None:
        pass

    loop = asyncio.get_running_loop()
    timer = loop.call_later(60, tick)
    async with assert_nothing_left():
        timer.cancel()
        timer = loop.call_later(60, tick)
    timer.cancel()


@pytest.mark.parametrize("loop_name", ["asyncio"])
async def test_second_timer_of_the_same_function_is_a_leak() -> None:
    """There was one, and there are two. (uvloop does not show its timers.)"""
    loop = asyncio.get_running_loop()
    timers = [loop.call_later(60, print)]
    with pytest.raises(AssertionError, match="a timer: <TimerHandle"):
        async with assert_nothing_left():
            timers.append(loop.call_later(60, print))
    for timer in timers:
        timer.cancel()
