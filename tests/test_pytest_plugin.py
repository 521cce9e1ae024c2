"""
The fixtures, in whole projects of their own: with each plugin that runs async tests, and where things go wrong.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import WARNINGS_ARE_ERRORS

# What every project has: an app that says on which loop it runs, and can misbehave in the usual ways.
APP = """
import asyncio

EVENTS = []


def this_loop():
    return str(id(asyncio.get_running_loop()))


class App:
    def __init__(self, name="app", shutdown="completes"):
        self.name = name
        self.shutdown = shutdown
        self.crash = asyncio.Event()
        self.forever = asyncio.Event()

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            await self.lifespan(receive, send)
            return
        if scope["path"] == "/hang":
            await self.forever.wait()
        if scope["path"] == "/crash":
            self.crash.set()
        more = scope["path"] == "/stream"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": this_loop().encode(), "more_body": more})
        while more and (await receive())["type"] != "http.disconnect":
            pass

    async def lifespan(self, receive, send):
        await receive()
        await send({"type": "lifespan.startup.complete"})
        stop, crash = asyncio.ensure_future(receive()), asyncio.ensure_future(self.crash.wait())
        try:
            await asyncio.wait({stop, crash}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stop.cancel()
            crash.cancel()
        if self.crash.is_set():
            raise LookupError(f"{self.name} has crashed")
        EVENTS.append(f"{self.name} is closed")
        if self.shutdown == "raises":
            raise LookupError(f"{self.name} could not shut down")
        await send({"type": "lifespan.shutdown.complete"})
"""

# The same tests for all who run them; each says that its server runs on the test's own loop.
TESTS = """
import pytest
from app import App, this_loop

marked = {mark}


@marked
async def test_a_server_and_clients(aioserve_server, aioserve_client):
    server = await aioserve_server(App(), root_path="/api")
    client, other = await aioserve_client(server), await aioserve_client(server, headers={{"x": "y"}})
    assert (await client.get("/")).text == (await other.get("/")).text == this_loop()
    assert client.base_url == server.url


@marked
async def test_the_next_one_has_its_own(aioserve_client):
    client = await aioserve_client(App())
    assert (await client.get("/")).text == this_loop()


class TestInAClass:
    @marked
    @pytest.mark.parametrize("number", range(2))
    async def test_a_method(self, aioserve_client, number):
        client = await aioserve_client(App())
        assert (await client.get("/")).text == this_loop()


def test_in_between(aioserve_live_server):
    assert aioserve_live_server(App()).is_serving()
"""

NOT_MARKED = "lambda test: test"
ANYIO = "pytest.mark.anyio"
ASYNCIO = "pytest.mark.asyncio"

BACKEND = """
import pytest


@pytest.fixture(scope="{scope}")
def anyio_backend():
    return {backend}
"""

WITHOUT_ASYNCIO = ("-p", "no:asyncio")
WITHOUT_ANYIO = ("-p", "no:anyio")
IN_ORDER = ("-p", "no:randomly")


def run(pytester: pytest.Pytester, *options: str, **files: str) -> pytest.RunResult:
    """Run a project with these files in a process of its own, with warnings as errors."""
    pytester.makeini("[pytest]\naddopts = --strict-markers -p no:cacheprovider -rA")
    pytester.makepyfile(app=APP, **files)
    # It warns if it is not told; where it is not loaded, nobody knows the option.
    told = () if "no:asyncio" in options else ("-o", "asyncio_default_fixture_loop_scope=function")
    return pytester.runpytest_subprocess(*WARNINGS_ARE_ERRORS, *options, *told)


def run_with_anyio(pytester: pytest.Pytester, module: str, *options: str) -> pytest.RunResult:
    """Run one module, all of whose async tests are anyio's, in its order."""
    options = (*WITHOUT_ASYNCIO, *IN_ORDER, "-o", "anyio_mode=auto", *options)
    return run(pytester, *options, conftest=backend(), test_it=module)


def sample(mark: str) -> str:
    return TESTS.format(mark=mark)


def backend(scope: str = "function", backend: str = '"asyncio"') -> str:
    return BACKEND.format(scope=scope, backend=backend)


class TestWithAnyiosPlugin:
    """It comes with anyio, and so with aioserve."""

    @pytest.mark.parametrize(("mode", "mark"), [("strict", ANYIO), ("auto", NOT_MARKED)])
    def test_in_both_of_its_modes(self, pytester: pytest.Pytester, mode: str, mark: str) -> None:
        options = (*WITHOUT_ASYNCIO, "-o", f"anyio_mode={mode}")
        run(pytester, *options, conftest=backend(), test_it=sample(mark)).assert_outcomes(passed=5)

    @pytest.mark.parametrize("scope", ["module", "session"])
    @pytest.mark.parametrize("options", ['"asyncio"', '("asyncio", {"use_uvloop": True})'], ids=["asyncio", "uvloop"])
    def test_with_a_backend_of_a_wider_scope(self, pytester: pytest.Pytester, scope: str, options: str) -> None:
        """A server of that scope serves all tests, which have one loop; another lives as long as its test."""
        wide = f"""
            import asyncio

            import pytest
            from app import EVENTS, App, this_loop

            @pytest.fixture(scope="{scope}")
            async def server({scope}_aioserve_server):
                return await {scope}_aioserve_server(App("wide"))

            @pytest.mark.parametrize("number", range(2))
            async def test_wide(server, aioserve_client, {scope}_aioserve_client, number):
                assert type(asyncio.get_running_loop()).__module__.split(".")[0] in {options!r}
                client = await aioserve_client(server)
                assert (await client.get("/")).text == this_loop()
                client = await {scope}_aioserve_client(server)
                assert (await client.get("/")).text == this_loop()
                assert server.stats.served == 2 * (number + 1)

            async def test_narrow(aioserve_client):
                await aioserve_client(App("narrow"))

            async def test_only_the_narrow_is_closed():
                assert "narrow is closed" in EVENTS
                assert "wide is closed" not in EVENTS
        """
        arguments = (*WITHOUT_ASYNCIO, *IN_ORDER, "-o", "anyio_mode=auto")
        files = {"conftest": backend(scope, options), "test_it": sample(NOT_MARKED), "test_wide": wide}
        run(pytester, *arguments, **files).assert_outcomes(passed=9)

    def test_a_wider_fixture_needs_a_wider_backend(self, pytester: pytest.Pytester) -> None:
        """pytest says so itself."""
        done = run_with_anyio(pytester, "async def test_it(module_aioserve_server): pass")
        done.assert_outcomes(errors=1)
        done.stdout.fnmatch_lines("*ScopeMismatch: *function scoped fixture anyio_backend with a module scoped*")

    def test_trio_cannot_be_served(self, pytester: pytest.Pytester) -> None:
        """One sentence says what to set; the run on asyncio passes."""
        test = "async def test_it(aioserve_client): pass"
        done = run(
            pytester, *WITHOUT_ASYNCIO, "-o", "anyio_mode=auto", test_it=test
        )  # without a fixture of the project's
        done.assert_outcomes(passed=1, errors=1)
        sentence = (
            'aioserve runs on asyncio only, and this test on trio: give it a fixture anyio_backend that returns "a*'
        )
        done.stdout.fnmatch_lines(["*ERROR at setup of test_it?trio?*", sentence])


class TestWithPytestAsyncio:
    """Natively, in both of its modes."""

    @pytest.mark.parametrize(("mode", "mark"), [("strict", ASYNCIO), ("auto", NOT_MARKED)])
    def test_in_both_of_its_modes(self, pytester: pytest.Pytester, mode: str, mark: str) -> None:
        run(pytester, *WITHOUT_ANYIO, f"--asyncio-mode={mode}", test_it=sample(mark)).assert_outcomes(passed=5)

    @pytest.mark.parametrize("scope", ["class", "module", "package", "session"])
    def test_a_test_may_run_in_a_wider_loop(self, pytester: pytest.Pytester, scope: str) -> None:
        """The server still lives as long as the test, in the test's loop; wherever it is said."""
        marked = sample(f'pytest.mark.asyncio(loop_scope="{scope}")')
        run(pytester, test_it=marked).assert_outcomes(passed=5)
        told = ("-o", f"asyncio_default_test_loop_scope={scope}")
        run(pytester, *told, test_it=sample(ASYNCIO)).assert_outcomes(passed=5)

    @pytest.mark.parametrize("mode", ["strict", "auto"])
    @pytest.mark.parametrize("scope", ["module", "session"])
    def test_a_server_for_many_tests(self, pytester: pytest.Pytester, mode: str, scope: str) -> None:
        """All of them, and their own fixtures, have the loop of that scope."""
        test = f"""
            import pytest
            import pytest_asyncio
            from app import App, this_loop

            pytestmark = pytest.mark.asyncio(loop_scope="{scope}")

            @pytest_asyncio.fixture(scope="{scope}", loop_scope="{scope}")
            async def server({scope}_aioserve_server):
                return await {scope}_aioserve_server(App())

            @pytest.mark.parametrize("number", range(2))
            async def test_it(server, aioserve_client, {scope}_aioserve_client, number):
                for open in aioserve_client, {scope}_aioserve_client:
                    client = await open(server)
                    assert (await client.get("/")).text == this_loop()
        """
        run(pytester, f"--asyncio-mode={mode}", test_it=test).assert_outcomes(passed=2)

    def test_a_loop_that_differs_is_refused(self, pytester: pytest.Pytester) -> None:
        """Where a fixture lives in another loop than the test, one sentence says what to set."""
        test = """
            import pytest
            from app import App

            @pytest.mark.asyncio
            async def test_it(module_aioserve_server):
                with pytest.raises(RuntimeError, match="lives in another event loop .* pytestmark = "):
                    await module_aioserve_server(App())
        """
        run(pytester, test_it=test).assert_outcomes(passed=1)


class TestWithBothPlugins:
    """Each test is served by the one that runs it."""

    @pytest.mark.parametrize(
        ("anyio", "asyncio", "marks"),
        [
            ("strict", "strict", [ANYIO, ASYNCIO]),
            ("auto", "strict", [NOT_MARKED, ANYIO]),
            ("strict", "auto", [NOT_MARKED, ASYNCIO]),
        ],
    )
    @pytest.mark.parametrize("first", ["anyio", "asyncio"])
    def test_in_their_modes(
        self, pytester: pytest.Pytester, first: str, anyio: str, asyncio: str, marks: list[str]
    ) -> None:
        """As far as they get along themselves: not in two auto modes, of which they warn. Their order is no matter."""
        files = {f"test_{number}": sample(mark) for number, mark in enumerate(marks)}
        done = run(
            pytester, "-p", first, "-o", f"anyio_mode={anyio}", "--asyncio-mode", asyncio, conftest=backend(), **files
        )
        done.assert_outcomes(passed=5 * len(marks))

    @pytest.mark.parametrize("first", ["anyio", "asyncio"])
    def test_a_test_that_both_take_is_served_or_refused(self, pytester: pytest.Pytester, first: str) -> None:
        """If one runs the fixtures and the other the test, what to set is said; it depends on their order."""
        test = """
            import pytest
            from app import App, this_loop

            @pytest.mark.anyio
            async def test_it(aioserve_client):
                try:
                    client = await aioserve_client(App())
                except RuntimeError as refusal:
                    assert "set both anyio_mode and asyncio_mode to strict" in str(refusal)
                else:
                    assert (await client.get("/")).text == this_loop()
        """
        done = run(pytester, "-p", first, "--asyncio-mode=auto", conftest=backend(), test_it=test)
        done.assert_outcomes(passed=1)


class TestWithOtherPlugins:
    """Those that change where tests run, or when."""

    def test_in_several_processes(self, pytester: pytest.Pytester) -> None:
        """pytest-xdist; a session's server is one for each process."""
        test = """
            import pytest
            from app import App

            @pytest.mark.parametrize("number", range(4))
            def test_live(session_aioserve_live_server, number):
                assert session_aioserve_live_server(App()).is_serving()
        """
        files = {"test_it": sample(ANYIO), "test_live": test}
        run(pytester, *WITHOUT_ASYNCIO, "-n2", conftest=backend(), **files).assert_outcomes(passed=9)

    def test_in_random_order(self, pytester: pytest.Pytester) -> None:
        """pytest-randomly."""
        files = {f"test_{number}": sample(mark) for number, mark in enumerate([ANYIO, ASYNCIO])}
        done = run(pytester, "--randomly-seed=7", conftest=backend(), **files)
        done.assert_outcomes(passed=10)
        done.stdout.fnmatch_lines("Using --randomly-seed=7")


class TestHowItEnds:
    """What goes wrong with a server fails the test that it belongs to, and no other."""

    @pytest.mark.parametrize("plugin", ["anyio, a loop each", "anyio, one loop", "pytest-asyncio"])
    def test_a_crash_does_not_touch_the_next_test(self, pytester: pytest.Pytester, plugin: str) -> None:
        """Not even where all tests share one task."""
        mark = ASYNCIO if plugin == "pytest-asyncio" else ANYIO
        test = f"""
            import pytest
            from app import App

            pytestmark = {mark}

            async def test_1(aioserve_client, aioserve_server):
                other = await aioserve_client(App("other"))
                client = await aioserve_client(App("this app"))
                await client.get("/crash")
                assert (await other.get("/")).status_code == 200

            async def test_2(aioserve_client):
                client = await aioserve_client(App())
                assert (await client.get("/")).status_code == 200
        """
        fixture = backend("module" if plugin == "anyio, one loop" else "function")
        done = run(pytester, *IN_ORDER, conftest=fixture, test_it=test)
        done.assert_outcomes(passed=2, errors=1)
        words = "*ServerCrashedError: the app's lifespan died while it was serving: LookupError: this app has crashed"
        done.stdout.fnmatch_lines(["*ERROR at teardown of test_1*", "*LookupError: this app has crashed", words])
        done.stdout.fnmatch_lines("*aioserve: this happened to http://127.0.0.1:*")

    def test_what_had_to_be_forced_fails_the_test(self, pytester: pytest.Pytester) -> None:
        """With the report's words; the next test is not concerned."""
        test = """
            import asyncio
            from app import App

            async def test_1(aioserve_client, aioserve_server):
                server = await aioserve_server(App(), shutdown_timeout=0)
                client = await aioserve_client(server)
                asking = asyncio.create_task(client.get("/hang"))
                while not server.stats.in_flight:
                    await asyncio.sleep(0)
                asking.cancel()

            async def test_2(aioserve_client):
                client = await aioserve_client(App())
                assert (await client.get("/")).status_code == 200
        """
        done = run_with_anyio(pytester, test)
        done.assert_outcomes(passed=2, errors=1)
        words = (
            "*AssertionError: http://127.0.0.1:* was stopped by force; *cancelled: 1; * (GET /hang of * in *__call__ (*"
        )
        done.stdout.fnmatch_lines(["*ERROR at teardown of test_1*", words])

    def test_a_stream_that_is_still_open_is_no_fault(self, pytester: pytest.Pytester) -> None:
        """It is told to end at once, so that the budget is not waited for: `disconnect_after` is 0."""
        test = """
            import asyncio
            import pytest
            from app import App

            @pytest.fixture
            async def kept():
                kept = {}
                yield kept
                assert kept["server"].report.cancelled == ()
                kept["writer"].close()
                await kept["writer"].wait_closed()

            async def test_it(kept, aioserve_server):
                kept["server"] = server = await aioserve_server(App(), shutdown_timeout=None)
                reader, kept["writer"] = await asyncio.open_connection(server.host, server.port)
                kept["writer"].write(b"GET /stream HTTP/1.1\\r\\nhost: test\\r\\n\\r\\n")
                await reader.readline()
        """
        run_with_anyio(pytester, test, "--timeout=20").assert_outcomes(passed=1)

    def test_the_budget_is_a_second_unless_told_otherwise(self, pytester: pytest.Pytester) -> None:
        """An option given wins over the defaults for tests; so does what a Config says."""
        test = """
            import uvicorn
            from app import App

            def settings(server):
                settings = server._engine.settings
                return settings.disconnect_after, settings.shutdown_timeout

            async def test_it(aioserve_server):
                assert settings(await aioserve_server(App())) == (0, 1)
                assert settings(await aioserve_server(App(), disconnect_after=2, shutdown_timeout=3)) == (2, 3)
                assert settings(await aioserve_server(uvicorn.Config(App(), port=0, log_config=None))) == (0, 1)
                config = uvicorn.Config(App(), port=0, log_config=None, timeout_graceful_shutdown=4)
                assert settings(await aioserve_server(config)) == (0, 4)
        """
        run_with_anyio(pytester, test).assert_outcomes(passed=1)

    def test_all_are_closed_in_reverse_order_and_all_failures_named(self, pytester: pytest.Pytester) -> None:
        """Clients and servers alike, whatever happens to some of them."""
        test = """
            import contextlib
            import httpx
            from app import EVENTS, App

            async def test_1(aioserve_server, aioserve_client):
                await aioserve_server(App("first"))
                await aioserve_server(App("second", shutdown="raises"))
                await aioserve_client(App("third"))
                client = await aioserve_client(App("fourth"))
                await client.get("/crash")
                await aioserve_server(App("fifth"))

            def test_2():
                names = [event.split()[0] for event in EVENTS]
                assert names == ["fifth", "third", "second", "first"]
        """
        done = run_with_anyio(pytester, test)
        done.assert_outcomes(passed=2, errors=1)
        lines = [
            "*ERROR at teardown of test_1*",
            "*ExceptionGroup: not all has ended well (2 sub-exceptions)",
            "*ShutdownError: *LookupError: second could not shut down",
            "*ServerCrashedError: *LookupError: fourth has crashed",
        ]
        done.stdout.fnmatch_lines(lines)

    def test_the_fixtures_of_a_project_come_first(self, pytester: pytest.Pytester) -> None:
        """What is built on a server ends before it does."""
        test = """
            import pytest
            from app import App

            @pytest.fixture
            async def client(aioserve_client):
                client = await aioserve_client(App())
                yield client
                assert (await client.get("/")).status_code == 200

            async def test_it(client):
                assert (await client.get("/")).status_code == 200
        """
        run_with_anyio(pytester, test).assert_outcomes(passed=1)

    def test_whoever_awaits_the_end_has_heard_of_it(self, pytester: pytest.Pytester) -> None:
        """A test of a crash, or of a forced stop, is no failure."""
        test = """
            import asyncio
            import pytest
            from aioserve import ServerCrashedError
            from app import App

            async def test_crash(aioserve_client, aioserve_server):
                server = await aioserve_server(App())
                client = await aioserve_client(server)
                await client.get("/crash")
                with pytest.raises(ServerCrashedError):
                    await server.wait_closed()

            async def test_force(aioserve_client, aioserve_server):
                server = await aioserve_server(App())
                client = await aioserve_client(server)
                asking = asyncio.create_task(client.get("/hang"))
                while not server.stats.in_flight:
                    await asyncio.sleep(0)
                server.close(timeout=0)
                await server.aclose()
                assert len(server.report.cancelled) == 1
                await asyncio.wait([asking])
        """
        run_with_anyio(pytester, test).assert_outcomes(passed=2)

    def test_a_failed_start_is_the_tests_own_error(self, pytester: pytest.Pytester) -> None:
        """It comes out where the server was to start, and nothing at the end."""
        test = """
            import pytest
            from aioserve import StartupError
            from app import App

            async def fails(scope, receive, send):
                await receive()
                raise LookupError

            async def test_it(aioserve_server, aioserve_client):
                with pytest.raises(StartupError):
                    await aioserve_server(fails)
                with pytest.raises(TypeError, match="no option 'prot'; did you mean 'port'"):
                    await aioserve_server(App(), prot=8000)
                with pytest.raises(TypeError, match="unexpected keyword argument 'heders'"):
                    await aioserve_client(App(), heders={})
        """
        run_with_anyio(pytester, test).assert_outcomes(passed=1)


class TestWhatIsRefused:
    """One sentence says what to do."""

    @pytest.mark.parametrize("options", [(), WITHOUT_ASYNCIO], ids=["both plugins", "anyio's plugin"])
    @pytest.mark.parametrize("name", ["aioserve_server", "aioserve_client"])
    def test_a_synchronous_test(self, pytester: pytest.Pytester, options: tuple[str, ...], name: str) -> None:
        """It cannot await; there is a fixture for it."""
        done = run(pytester, *options, conftest=backend(), test_it=f"def test_it({name}): pass")
        done.assert_outcomes(errors=1)
        done.stdout.fnmatch_lines(f"{name} is for async tests: *; a synchronous test takes aioserve_live_server")
        done.stdout.no_fnmatch_line("*Traceback*")

    @pytest.mark.parametrize("scope", ["", "module_", "session_"])
    def test_an_async_test_that_nobody_runs(self, pytester: pytest.Pytester, scope: str) -> None:
        """There is no plugin for it, or it is not marked."""
        options = [(*WITHOUT_ASYNCIO, *WITHOUT_ANYIO), WITHOUT_ASYNCIO, () if not scope else WITHOUT_ASYNCIO]
        for each in options:
            test = f"async def test_it({scope}aioserve_client): pass"
            done = run(pytester, *each, conftest=backend(), test_it=test)
            done.assert_outcomes(errors=1)
            words = f"{scope}aioserve_client is for async tests: mark this one with pytest.mark.anyio, or *"
            done.stdout.fnmatch_lines(words)


class TestLiveServers:
    """For synchronous tests, in a thread."""

    def test_they_live_as_long_as_their_scope(self, pytester: pytest.Pytester) -> None:
        """A function's, a module's, a session's; and leave no thread behind."""
        test = """
            import threading
            import httpx
            import pytest
            from app import EVENTS, App

            @pytest.mark.parametrize("number", range(2))
            def test_all(aioserve_live_server, module_aioserve_live_server, session_aioserve_live_server, number):
                factories = aioserve_live_server, module_aioserve_live_server, session_aioserve_live_server
                for name, factory in zip(["function", "module", "session"], factories):
                    assert httpx.get(factory(App(name)).url).status_code == 200
                assert EVENTS == ["function is closed"] * number

            def test_threads(request):
                assert threading.active_count() == 1 + 2
        """
        after = """
            from app import EVENTS

            def test_next_module():
                assert EVENTS == ["function is closed"] * 2 + ["module is closed"] * 2
        """
        conftest = """
            import threading
            from app import EVENTS

            def pytest_unconfigure():
                assert threading.active_count() == 1
                assert EVENTS[4:] == ["session is closed"] * 2
        """
        options = (*IN_ORDER, *WITHOUT_ASYNCIO, "-p", "no:timeout")
        run(pytester, *options, conftest=conftest, test_it=test, test_next=after).assert_outcomes(passed=4)

    def test_they_end_like_the_others(self, pytester: pytest.Pytester) -> None:
        """In reverse order, all of them, and with the same errors."""
        test = """
            import httpx
            from app import EVENTS, App

            def test_1(aioserve_live_server):
                aioserve_live_server(App("first"))
                aioserve_live_server(App("second", shutdown="raises"))
                httpx.get(aioserve_live_server(App("third")).url + "/crash")
                aioserve_live_server(App("fourth"))

            def test_2(aioserve_live_server):
                assert [event.split()[0] for event in EVENTS] == ["fourth", "second", "first"]
                assert httpx.get(aioserve_live_server(App()).url).status_code == 200
        """
        done = run_with_anyio(pytester, test)
        done.assert_outcomes(passed=2, errors=1)
        lines = [
            "*ERROR at teardown of test_1*",
            "*ExceptionGroup: not all has ended well (2 sub-exceptions)",
            "*ShutdownError: *LookupError: second could not shut down",
            "*ServerCrashedError: *LookupError: third has crashed",
        ]
        done.stdout.fnmatch_lines(lines)

    def test_they_serve_an_async_test_that_blocks(self, pytester: pytest.Pytester) -> None:
        """Their loop is another one."""
        test = """
            import httpx
            from app import App, this_loop

            async def test_it(aioserve_live_server, aioserve_client):
                live = aioserve_live_server(App())
                assert httpx.get(live.url).text != this_loop()
                client = await aioserve_client(live)
                assert (await client.get("/")).text != this_loop()
        """
        run_with_anyio(pytester, test).assert_outcomes(passed=1)


def test_the_authority_for_tests_is_trusted(pytester: pytest.Pytester) -> None:
    """By the clients of the fixture, and by whoever is given its context or file."""
    test = """
        import ssl
        import httpx
        import pytest
        from app import App

        async def test_async(aioserve_server, aioserve_client, aioserve_tls):
            server = await aioserve_server(App(), ssl=aioserve_tls.server, host="localhost")
            assert server.url.startswith("https://")
            client = await aioserve_client(server)
            assert (await client.get("/")).status_code == 200
            client = await aioserve_client(server, verify=ssl.create_default_context())
            with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                await client.get("/")

        def test_sync(aioserve_live_server, aioserve_tls):
            live = aioserve_live_server(App(), ssl=aioserve_tls.server)
            with httpx.Client(verify=aioserve_tls.client) as client:
                assert client.get(live.url).status_code == 200
            with aioserve_tls.ca.cert_pem.tempfile() as path:
                with httpx.Client(verify=ssl.create_default_context(cafile=path)) as client:
                    assert client.get(live.url).status_code == 200
    """
    run_with_anyio(pytester, test).assert_outcomes(passed=2)


def test_the_plugin_imports_nothing_but_pytest() -> None:
    """Whoever has us installed loads it in every run."""
    program = (
        "import pytest, sys; before = set(sys.modules); import aioserve.pytest_plugin; "
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)  # noqa: S603
    assert done.stdout.split() == ["aioserve", "aioserve.pytest_plugin"]


def test_a_run_that_does_not_use_it_pays_nothing(pytester: pytest.Pytester) -> None:
    """Nothing of ours is imported but the plugin, nor anything that it would bring."""
    test = """
        import sys

        def test_it():
            ours = {name for name in sys.modules if name.split(".")[0] in ("aioserve", "uvicorn", "httpx", "trustme")}
            assert ours == {"aioserve", "aioserve.pytest_plugin"}
            assert "anyio" not in sys.modules
    """
    # With the others loaded, it would be they who import something.
    pytester.makepyfile(test)
    monkeypatch = pytest.MonkeyPatch()
    with monkeypatch.context() as context:
        context.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
        done = pytester.runpytest_subprocess("-p", "aioserve.pytest_plugin", "-p", "no:cacheprovider")
    done.assert_outcomes(passed=1)


def test_the_plugin_is_found_by_itself(pytester: pytest.Pytester) -> None:
    """By its entry point; and what it says of its fixtures is their first sentence."""
    done = pytester.runpytest_subprocess("--fixtures", "-o", "asyncio_default_fixture_loop_scope=function")
    for scope in ("", "module_", "session_"):
        for kind in ("server", "client", "live_server"):
            done.stdout.fnmatch_lines(f"{scope}aioserve_{kind}*-- *")
    done.stdout.fnmatch_lines("aioserve_tls*")
