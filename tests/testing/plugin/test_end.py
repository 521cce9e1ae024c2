"""
How the servers and clients of the fixtures end, and which test a failure belongs to.
"""

from __future__ import annotations

import pytest

from tests.helpers.projects import (
    ANYIO,
    ASYNCIO,
    IN_ORDER,
    backend,
    run,
    run_with_anyio,
)


class TestHowItEnds:
    """A failure of a server fails the test that it belongs to, and no other."""

    @pytest.mark.parametrize("plugin", ["anyio, a loop each", "anyio, one loop", "pytest-asyncio"])
    def test_crash_fails_its_own_test_only(self, pytester: pytest.Pytester, plugin: str) -> None:
        """Also where all tests share one task."""
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

    def test_forced_stop_fails_its_own_test_only(self, pytester: pytest.Pytester) -> None:
        """With the words of the report."""
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
        words = "*AssertionError: GET /hang from *, waiting at App.__call__ (*): forced shutdown of http://127.0.0.1:*"
        done.stdout.fnmatch_lines(["*ERROR at teardown of test_1*", words])

    def test_open_stream_at_the_end_of_a_test_is_no_failure(self, pytester: pytest.Pytester) -> None:
        """It gets a disconnect at once, so the budget is not used up: `disconnect_after` is 0."""
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

    def test_servers_of_the_fixtures_have_a_budget_of_one_second_by_default(self, pytester: pytest.Pytester) -> None:
        """An option wins over the defaults for tests, and so does a setting of a Config."""
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

    def test_fixtures_close_everything_in_reverse_order_and_raise_all_failures(self, pytester: pytest.Pytester) -> None:
        """Clients and servers alike, also if some of them fail."""
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
            "*ExceptionGroup: 2 servers or clients failed to close (2 sub-exceptions)",
            "*ShutdownError: *LookupError: second could not shut down",
            "*ServerCrashedError: *LookupError: fourth has crashed",
        ]
        done.stdout.fnmatch_lines(lines)

    def test_fixture_built_on_a_server_ends_before_the_server(self, pytester: pytest.Pytester) -> None:
        """A fixture of the project can still send requests in its clean-up."""
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

    def test_failure_that_a_test_has_awaited_is_not_raised_again(self, pytester: pytest.Pytester) -> None:
        """A test of a crash, or of a forced stop, passes."""
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

    def test_failed_start_is_raised_in_the_test(self, pytester: pytest.Pytester) -> None:
        """Where the server was to be started, and not again at the end."""
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

    def test_failures_show_no_frames_of_aioserve(self, pytester: pytest.Pytester) -> None:
        """But the line of the test or the fixture, and where in the app the cause was raised."""
        test = """
            import asyncio
            import socket
            import pytest
            from aioserve import testing
            from app import App

            @pytest.fixture
            def busy():
                with socket.create_server(("127.0.0.1", 0)) as taken:
                    yield taken.getsockname()[1]

            @pytest.fixture
            async def server(aioserve_server, busy):
                return await aioserve_server(App(), port=busy)

            async def fails(scope, receive, send):
                await receive()
                raise LookupError("startup")  # in the app

            async def test_fixture(server):
                pass

            async def test_busy(aioserve_client, aioserve_server, busy):
                await aioserve_server(App(), port=busy)

            async def test_start(aioserve_client):
                await aioserve_client(fails)

            async def test_block():
                async with testing.client(fails):
                    pass

            async def test_option(aioserve_client):
                await aioserve_client(App(), lifespan="off")

            async def test_crash(aioserve_client):
                client = await aioserve_client(App())
                await client.get("/crash")

            async def test_forced(aioserve_server, aioserve_client):
                server = await aioserve_server(App(), shutdown_timeout=0)
                client = await aioserve_client(server)
                asking = asyncio.create_task(client.get("/hang"))
                while not server.stats.in_flight:
                    await asyncio.sleep(0)
                asking.cancel()

            async def test_several(aioserve_server):
                for name in ("first", "second"):
                    await aioserve_server(App(name, shutdown="raises"))

            def test_live(aioserve_live_server):
                aioserve_live_server(App("live", shutdown="raises"))
        """
        done = run_with_anyio(pytester, test, "--show-capture=no")  # uvicorn's and our log lines have them
        done.assert_outcomes(passed=4, failed=4, errors=5)
        lines = [
            "> *return await aioserve_server(App(), port=busy)",
            "E       OSError: * port 0 takes a free port",
            "E *LookupError: app has crashed",
            "E *ServerCrashedError: *",
            "E *AssertionError: GET /hang from *: forced shutdown of *",
            "*| LookupError: first could not shut down",
            "E *LookupError: live could not shut down",
            "E *ShutdownError: *",
            ">       await aioserve_server(App(), port=busy)",
            "> *raise LookupError(*# in the app",
            ">       await aioserve_client(fails)",
            ">       async with testing.client(fails):",
            ">       await aioserve_client(App(), lifespan=*",
        ]
        for line in lines:
            done.stdout.fnmatch_lines(line)
        done.stdout.no_fnmatch_line("*/aioserve/*.py*")
