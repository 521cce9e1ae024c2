"""
The pieces for tests as blocks, and the check that nothing is left behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import io
import socket
import ssl
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anyio
import httpx
import httpx2
import pytest
import trio

from aioserve import ServerCrashedError, ShutdownError, StartupError, testing
from aioserve.testing import LiveServers, assert_nothing_left
from tests.apps import App, AppError


async def hold(app: App, client: httpx.AsyncClient) -> asyncio.Task[httpx.Response]:
    """Ask for what is not answered."""
    asking = asyncio.create_task(client.get("/hold"))
    await app.holding.wait()
    return asking


class TestAServer:
    async def test_it_serves_the_block(self) -> None:
        """With its options."""
        app = App()
        async with testing.server(app, root_path="/api") as server:
            assert server.is_serving()
            assert server.uvicorn.config.root_path == "/api"
        assert app.events == ["startup", "shutdown", "lifespan over"]

    async def test_what_had_to_be_forced_is_raised_at_the_end(self) -> None:
        """The message says which handler it was, and what to do."""
        app = App()
        with pytest.raises(AssertionError, match=r"cancelled: 1; .*GET /hold of .*\. End in the test what it began"):
            async with (
                testing.server(app, shutdown_timeout=0) as server,
                httpx.AsyncClient(base_url=server.url) as http,
            ):
                (await hold(app, http)).cancel()

    async def test_the_bodys_exception_wins(self) -> None:
        """What else went wrong is in its notes."""
        app = App(shutdown="raises")
        error = KeyError("the test's own")
        with pytest.raises(KeyError) as caught:
            async with (
                testing.server(app, shutdown_timeout=0) as server,
                httpx.AsyncClient(base_url=server.url) as http,
            ):
                (await hold(app, http)).cancel()
                raise error
        assert caught.value is error
        notes = "\n".join(error.__notes__)
        assert "ShutdownError: the app's lifespan failed to shut down: AppError" in notes
        assert "cancelled: 1" in notes

    async def test_a_crash_cancels_nobody_and_is_raised_at_the_end(self) -> None:
        """The note says which server it was."""
        app = App()
        with pytest.raises(ServerCrashedError) as caught:
            async with testing.server(app) as server:
                app.crash.set()
                await server._engine.closed.wait()
                await asyncio.sleep(0)  # where a cancellation would be met
        assert caught.value.__cause__ is app.error
        assert caught.value.__notes__ == [f"aioserve: this happened to {server.url}"]

    async def test_with_a_failed_shutdown_and_something_forced_both_are_told(self) -> None:
        """One is raised, and has the other for a note."""
        app = App(shutdown="raises")
        with pytest.raises(ShutdownError) as caught:
            async with (
                testing.server(app, shutdown_timeout=0) as server,
                httpx.AsyncClient(base_url=server.url) as http,
            ):
                (await hold(app, http)).cancel()
        assert "cancelled: 1" in "\n".join(caught.value.__notes__)

    async def test_whoever_has_awaited_the_end_has_heard_of_it(self) -> None:
        """Then the block ends quietly."""
        app = App()
        async with testing.server(app) as server:
            app.crash.set()
            with pytest.raises(ServerCrashedError):
                await server.wait_closed()

    async def test_a_cancelled_block_is_cancelled(self) -> None:
        """An anyio scope's cancellation stays in its scope."""
        app = App()
        with anyio.CancelScope() as scope:
            async with testing.server(app):
                scope.cancel()
                await anyio.sleep_forever()
        assert app.events[-2:] == ["shutdown", "lifespan over"]


class TestAClient:
    async def test_it_has_a_server_for_its_app(self) -> None:
        """And is closed before that is."""
        app = App()
        async with testing.client(app, headers={"x": "y"}) as client:
            assert (await client.get("/")).text == "hello"
            assert client.headers["x"] == "y"
            assert "shutdown" not in app.events
        assert client.is_closed
        assert app.events[-2:] == ["shutdown", "lifespan over"]

    async def test_it_takes_a_server_that_is_running(self) -> None:
        """And leaves it running."""
        async with testing.server(App()) as server:
            for _ in range(2):
                async with testing.client(server) as client:
                    assert (await client.get("/")).text == "hello"

    async def test_it_streams(self) -> None:
        """What comes, as it comes: the end of an endless body is not waited for."""
        app = App()
        async with testing.client(app) as client, client.stream("GET", "/stream") as response:
            assert await anext(response.aiter_text()) == "data: 0\n\n"
            app.release.set()

    async def test_it_knows_no_proxy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whatever the environment says."""
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
        async with testing.client(App()) as client:
            assert (await client.get("/")).text == "hello"

    async def test_it_trusts_the_authority_for_tests_and_no_other(self) -> None:
        """For another one, it is told whom to trust."""
        theirs = testing._make_tls.__wrapped__()
        async with testing.server(App(), ssl=testing.tls().server, host="localhost") as server:
            async with testing.client(server) as client:
                assert str(client.base_url).startswith("https://")
                assert (await client.get("/")).text == "hello"
            async with testing.client(server, verify=theirs.client) as client:
                with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                    await client.get("/")
            async with testing.server(App()) as plain, testing.client(plain) as client:
                with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                    await client.get(server.url)

    @pytest.mark.parametrize("scheme", ["http", "https"])
    async def test_it_takes_unix_sockets(self, tmp_path: Path, scheme: str) -> None:
        """With options of httpx's, and with TLS."""
        context = testing.tls().server if scheme == "https" else None
        async with testing.server(App(), uds=str(tmp_path / "a socket"), ssl=context) as server:
            assert server.url.startswith(f"{scheme}+unix://%2F")
            limits = httpx.Limits(max_keepalive_connections=0)
            async with testing.client(server, limits=limits) as client:
                for _ in range(2):
                    response = await client.get("/")
                    assert response.text == "hello"
                assert response.url == f"{scheme}://localhost/"
                with anyio.fail_after(10):
                    while server.stats.connections:  # until they are closed, as the limits say
                        await asyncio.sleep(0)
            async with testing.client(server, transport=httpx.MockTransport(lambda _: httpx.Response(418))) as client:
                assert (await client.get("/")).status_code == 418

    async def test_httpx2_does_as_well(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where httpx is not installed."""
        monkeypatch.setitem(sys.modules, "httpx", None)
        async with testing.client(App()) as client:
            assert isinstance(client, httpx2.AsyncClient)
            assert (await client.get("/")).text == "hello"

    async def test_without_either_it_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The one that the extra brings."""
        monkeypatch.setitem(sys.modules, "httpx", None)
        monkeypatch.setitem(sys.modules, "httpx2", None)
        with pytest.raises(
            ModuleNotFoundError, match=r"httpx is not installed; pip install 'aioserve-asgi\[testing\]'"
        ):
            async with testing.client(App()):
                pass

    async def test_a_client_that_is_broken_is_no_missing_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What is missing to it is said."""
        monkeypatch.delitem(sys.modules, "httpx")
        monkeypatch.setitem(sys.modules, "httpx._api", None)
        with pytest.raises(ModuleNotFoundError, match=r"httpx\._api"):
            async with testing.client(App()):
                pass


class TestALiveServer:
    def test_it_serves_a_synchronous_block(self) -> None:
        """From a thread, which is gone afterwards."""
        app = App()
        with testing.live_server(app, shutdown_timeout=5) as server:
            assert httpx.get(server.url).text == "hello"
        assert app.events[-2:] == ["shutdown", "lifespan over"]

    def test_it_can_be_asked_to_close(self) -> None:
        """From any thread."""
        with testing.live_server(App()) as server:
            server.close()

    def test_its_errors_are_the_others(self) -> None:
        """At its start and at its end; the body's own wins."""
        with pytest.raises(StartupError) as caught, testing.live_server(App(startup="raises")):
            pass
        assert isinstance(caught.value.__cause__, AppError)
        with pytest.raises(ShutdownError), testing.live_server(App(shutdown="raises")):
            pass
        error = KeyError("the test's own")
        with pytest.raises(KeyError) as raised, testing.live_server(App(shutdown="raises")):
            raise error
        assert raised.value is error
        assert "ShutdownError" in error.__notes__[0]


class TestTheAuthority:
    def test_it_is_the_same_in_all_of_the_process(self) -> None:
        """Making keys takes time."""
        assert testing.tls() is testing.tls()

    @pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1"])
    async def test_it_certifies_this_machine(self, host: str) -> None:
        """By all of its names."""
        async with (
            testing.server(App(), ssl=testing.tls().server, host=host) as server,
            testing.client(server) as client,
        ):
            assert (await client.get("/")).text == "hello"

    async def test_it_issues_other_certificates(self) -> None:
        """Such as a client's."""
        tls = testing._make_tls.__wrapped__()
        tls.ca.configure_trust(tls.server)
        tls.server.verify_mode = ssl.CERT_REQUIRED
        tls.ca.issue_cert("somebody@example.org").configure_cert(tls.client)
        async with testing.server(App(), ssl=tls.server) as server, testing.client(server, verify=tls.client) as client:
            assert (await client.get("/")).text == "hello"

    def test_without_trustme_it_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The extra has it."""
        monkeypatch.setitem(sys.modules, "trustme", None)
        with pytest.raises(
            ModuleNotFoundError, match=r"trustme is not installed; pip install 'aioserve-asgi\[testing\]'"
        ):
            testing._make_tls.__wrapped__()


async def test_what_the_fixtures_hand_out_belongs_to_its_loop() -> None:
    """From another, it is refused before anything starts."""
    async with testing.Opened() as opened:

        def elsewhere() -> None:
            with pytest.raises(RuntimeError, match="lives in another event loop than the test"):
                asyncio.run(opened.server(App()))

        thread = threading.Thread(target=elsewhere)
        thread.start()
        while thread.is_alive():
            await asyncio.sleep(0)


# What can be left behind: in a project of its own, since there it stays. Each is named by what the check says of it.
LEFT_IN_THE_LOOP = {
    "a task: <Task pending name='forgotten'": "kept.append(loop.create_task(asyncio.Event().wait(), name='forgotten'))",
    "a timer: <TimerHandle": "loop.call_later(99, print)",
    "the loop's exception handler: <built-in function print>; it was ": "loop.set_exception_handler(print)",
    "a thread: <*(AnyIO worker thread,": "await anyio.to_thread.run_sync(print)",
    "a thread: <Thread(asyncio_0,": "await asyncio.to_thread(print)",
}
LEFT_IN_THE_PROCESS = {
    "a thread: <Thread(forgotten,": "threading.Thread(target=forever.wait, name='forgotten', daemon=True).start()",
    "a socket, of ('127.0.0.1', *)": "kept.append(socket.create_server(('127.0.0.1', 0)))",
    "a socket, of no name": "kept.append(socket.socketpair())",
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
from aioserve import _leaks
from aioserve.testing import LiveServers, assert_nothing_left

_leaks.ENDING_THREADS = 0
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
    def test_it_finds_all_that_can_be_left(self, pytester: pytest.Pytester, block: str, kinds: dict[str, str]) -> None:
        """And says what it is."""
        blocks = [block.format(number=number, statement=each) for number, each in enumerate(kinds.values())]
        pytester.makepyfile(test_left=PROJECT + "".join(blocks))
        options = ("-o", "anyio_mode=auto", "-p", "no:asyncio", "-p", "no:randomly", "-p", "no:cacheprovider")
        done = pytester.runpytest_subprocess(*options)
        done.assert_outcomes(failed=len(kinds))
        for said in kinds:
            done.stdout.fnmatch_lines(f"E * {said}*")
        done.stdout.fnmatch_lines("E * AssertionError: this was left behind:")

    def test_it_fails_a_test_from_a_fixture(self, pytester: pytest.Pytester) -> None:
        """At its end, on each plugin's loop; the next one is not concerned."""
        test = """
            import asyncio, pytest, pytest_asyncio
            from aioserve.testing import LiveServers, assert_nothing_left

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

    def test_a_server_leaves_nothing(self) -> None:
        """Nor do its clients; a thread of the loop's own pool is the loop's."""

        async def main() -> None:
            async with assert_nothing_left():
                async with testing.client(App()) as client:
                    await client.get("/")
                await asyncio.to_thread(gc.get_count)
                await anyio.to_thread.run_sync(gc.get_count)

        asyncio.run(main())

    async def test_what_is_closing_gets_its_turns(self) -> None:
        """A transport that was told to close, a task that was cancelled: both are gone some turns later."""
        async with assert_nothing_left():
            ours, theirs = socket.socketpair()
            _, writer = await asyncio.open_connection(sock=ours)
            task = asyncio.create_task(asyncio.Event().wait())
            await asyncio.sleep(0)
            theirs.close()
            writer.close()
            task.cancel()

    def test_a_program_leaves_nothing(self) -> None:
        """Here such threads have to end, and do when they are told to."""

        async def main() -> None:
            async with testing.server(App()):
                await anyio.to_thread.run_sync(gc.get_count)

        with assert_nothing_left():
            asyncio.run(main())

    @pytest.mark.parametrize("in_the_loop", [False, True])
    def test_an_exception_is_what_counts(self, in_the_loop: bool) -> None:
        """Nothing else is looked for then."""
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

    def test_what_is_gone_is_not_left(self) -> None:
        """A file that was open before, a thread that has ended."""
        file = open(__file__)  # noqa: SIM115
        going = threading.Event()
        thread = threading.Thread(target=going.wait)
        thread.start()
        with assert_nothing_left():
            file.close()
            going.set()
            thread.join()

    def test_what_was_forgotten_in_a_cycle_is_collected(self) -> None:
        """So that it is heard of in this block, and not in another."""
        heard: list[str] = []

        class Forgotten:
            def __init__(self) -> None:
                self.itself = self

            def __del__(self) -> None:
                heard.append("of it")

        with assert_nothing_left():
            Forgotten()
        assert heard == ["of it"]

    def test_elsewhere_than_in_asyncio_it_says_so(self) -> None:
        """Under trio, say."""

        async def main() -> None:
            async with assert_nothing_left():
                pass

        with pytest.raises(RuntimeError, match="needs a running asyncio event loop; elsewhere take a plain with"):
            trio.run(main)


async def test_a_timer_that_repeats_itself_is_no_leak() -> None:
    """Each is a new one, but it calls what the one before it did."""

    def tick() -> None:
        pass

    loop = asyncio.get_running_loop()
    timer = loop.call_later(60, tick)
    async with assert_nothing_left():
        timer.cancel()
        timer = loop.call_later(60, tick)
    timer.cancel()


@pytest.mark.parametrize("loop_name", ["asyncio"])
async def test_a_second_timer_that_does_the_same_is_a_leak() -> None:
    """There was one, and there are two. (uvloop does not show its timers.)"""
    loop = asyncio.get_running_loop()
    timers = [loop.call_later(60, print)]
    with pytest.raises(AssertionError, match="a timer: <TimerHandle"):
        async with assert_nothing_left():
            timers.append(loop.call_later(60, print))
    for timer in timers:
        timer.cancel()


@pytest.mark.usefixtures("short_grace")
async def test_a_handler_that_is_stuck_is_told_where_nobody_captures_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop waits for it when it closes, and so pytest may never come to tell what it has captured."""
    app = App()
    monkeypatch.setattr(sys, "__stderr__", said := io.StringIO())
    with pytest.raises(AssertionError, match="find out why the handler does not end"):
        async with testing.server(app, shutdown_timeout=0) as server, httpx.AsyncClient(base_url=server.url) as http:
            asking = asyncio.create_task(http.get("/cling"))
            await app.holding.wait()
            asking.cancel()
    assert "GET /cling" in said.getvalue()
    assert "which is stuck" in said.getvalue()
    app.release.set()


async def test_an_option_of_the_server_is_none_of_its_client() -> None:
    """Where to put it is said."""
    with pytest.raises(TypeError, match="lifespan is an option of a server, not of a client: start the server first"):
        async with testing.client(App(), lifespan="off"):
            raise AssertionError


def test_live_servers_can_be_started_by_many_threads() -> None:
    """They share one loop."""
    with LiveServers() as servers, ThreadPoolExecutor(8) as executor:
        started = list(executor.map(lambda _: servers.start(App()), range(8)))
        assert len({server.url for server in started}) == 8
        assert len({server._loop for server in started}) == 1
