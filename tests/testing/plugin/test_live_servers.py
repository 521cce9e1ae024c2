"""
The fixture `aioserve_live_server`: servers in a thread, for synchronous tests.
"""

from __future__ import annotations

import pytest

from tests.helpers.projects import (
    IN_ORDER,
    WITHOUT_ASYNCIO,
    run,
    run_with_anyio,
)


class TestLiveServers:
    """For synchronous tests, in a thread."""

    def test_live_servers_live_as_long_as_their_scope(self, pytester: pytest.Pytester) -> None:
        """A function's, a module's, a session's; and they leave no thread behind."""
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
                assert threading.active_count() == 1 + 2 * 2  # those of the module and of the session, of two tests
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

    def test_live_servers_are_closed_in_reverse_order_and_raise_all_failures(self, pytester: pytest.Pytester) -> None:
        """With the same errors as the other fixtures."""
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
            "*ExceptionGroup: 2 servers or clients failed to close (2 sub-exceptions)",
            "*ShutdownError: *LookupError: second could not shut down",
            "*ServerCrashedError: *LookupError: third has crashed",
        ]
        done.stdout.fnmatch_lines(lines)

    def test_live_server_answers_an_async_test_that_blocks_its_loop(self, pytester: pytest.Pytester) -> None:
        """It has another loop."""
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
