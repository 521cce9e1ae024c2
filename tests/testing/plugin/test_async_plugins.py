"""
The fixtures beside each plugin that runs async tests, and beside both.
"""

from __future__ import annotations

import pytest

from tests.helpers.projects import (
    ANYIO,
    ASYNCIO,
    IN_ORDER,
    NOT_MARKED,
    WITHOUT_ANYIO,
    WITHOUT_ASYNCIO,
    backend,
    run,
    run_with_anyio,
    sample,
)


class TestWithAnyiosPlugin:
    """The plugin comes with anyio, and so with aioserve."""

    @pytest.mark.parametrize(("mode", "mark"), [("strict", ANYIO), ("auto", NOT_MARKED)])
    def test_fixtures_work_in_both_modes_of_anyios_plugin(
        self, pytester: pytest.Pytester, mode: str, mark: str
    ) -> None:
        options = (*WITHOUT_ASYNCIO, "-o", f"anyio_mode={mode}")
        run(pytester, *options, conftest=backend(), test_it=sample(mark)).assert_outcomes(passed=5)

    @pytest.mark.parametrize("scope", ["module", "session"])
    @pytest.mark.parametrize("options", ['"asyncio"', '("asyncio", {"use_uvloop": True})'], ids=["asyncio", "uvloop"])
    def test_fixtures_of_a_wider_scope_work_with_anyios_plugin(
        self, pytester: pytest.Pytester, scope: str, options: str
    ) -> None:
        """A server of that scope serves all tests, which share one loop; other servers live as long as their test."""
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

    def test_fixture_of_a_wider_scope_requires_an_anyio_backend_of_that_scope(self, pytester: pytest.Pytester) -> None:
        """pytest says so itself."""
        done = run_with_anyio(pytester, "async def test_it(module_aioserve_server): pass")
        done.assert_outcomes(errors=1)
        done.stdout.fnmatch_lines("*ScopeMismatch: *function scoped fixture anyio_backend with a module scoped*")

    def test_on_trio_is_refused(self, pytester: pytest.Pytester) -> None:
        """One sentence says what to set; the run on asyncio passes."""
        test = "async def test_it(aioserve_client): pass"
        done = run(
            pytester, *WITHOUT_ASYNCIO, "-o", "anyio_mode=auto", test_it=test
        )  # the project has no fixture `anyio_backend`
        done.assert_outcomes(passed=1, errors=1)
        sentence = (
            'aioserve runs only on asyncio, and this test runs on trio; define a fixture anyio_backend that returns "a*'
        )
        done.stdout.fnmatch_lines(["*ERROR at setup of test_it?trio?*", sentence])


class TestWithPytestAsyncio:
    """pytest-asyncio, in both of its modes."""

    @pytest.mark.parametrize(("mode", "mark"), [("strict", ASYNCIO), ("auto", NOT_MARKED)])
    def test_fixtures_work_in_both_modes_of_pytest_asyncio(
        self, pytester: pytest.Pytester, mode: str, mark: str
    ) -> None:
        run(pytester, *WITHOUT_ANYIO, f"--asyncio-mode={mode}", test_it=sample(mark)).assert_outcomes(passed=5)

    @pytest.mark.parametrize("scope", ["class", "module", "package", "session"])
    def test_fixtures_work_in_a_pytest_asyncio_loop_of_a_wider_scope(
        self, pytester: pytest.Pytester, scope: str
    ) -> None:
        """The server still lives as long as the test, in the test's loop; wherever the scope is set."""
        marked = sample(f'pytest.mark.asyncio(loop_scope="{scope}")')
        run(pytester, test_it=marked).assert_outcomes(passed=5)
        option = ("-o", f"asyncio_default_test_loop_scope={scope}")
        run(pytester, *option, test_it=sample(ASYNCIO)).assert_outcomes(passed=5)

    @pytest.mark.parametrize("mode", ["strict", "auto"])
    @pytest.mark.parametrize("scope", ["module", "session"])
    def test_fixture_of_a_wider_scope_serves_many_tests_of_pytest_asyncio(
        self, pytester: pytest.Pytester, mode: str, scope: str
    ) -> None:
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

    def test_fixture_that_lives_in_another_loop_than_its_test_is_refused(self, pytester: pytest.Pytester) -> None:
        """One sentence says what to set."""
        test = """
            import pytest
            from app import App

            @pytest.mark.asyncio
            async def test_it(module_aioserve_server):
                with pytest.raises(RuntimeError, match="runs in another event loop .* pytestmark = "):
                    await module_aioserve_server(App())
        """
        run(pytester, test_it=test).assert_outcomes(passed=1)


class TestWithBothPlugins:
    """Each test and its fixtures are run by one of the plugins."""

    @pytest.mark.parametrize(
        ("anyio", "asyncio", "marks"),
        [
            ("strict", "strict", [ANYIO, ASYNCIO]),
            ("auto", "strict", [NOT_MARKED, ANYIO]),
            ("strict", "auto", [NOT_MARKED, ASYNCIO]),
        ],
    )
    @pytest.mark.parametrize("first", ["anyio", "asyncio"])
    def test_fixtures_work_beside_both_async_plugins(
        self, pytester: pytest.Pytester, first: str, anyio: str, asyncio: str, marks: list[str]
    ) -> None:
        """
        In all modes that the plugins allow: not in two auto modes, of which they warn. Their order does not matter.
        """
        files = {f"test_{number}": sample(mark) for number, mark in enumerate(marks)}
        done = run(
            pytester, "-p", first, "-o", f"anyio_mode={anyio}", "--asyncio-mode", asyncio, conftest=backend(), **files
        )
        done.assert_outcomes(passed=5 * len(marks))

    @pytest.mark.parametrize("first", ["anyio", "asyncio"])
    def test_that_both_async_plugins_run_is_served_or_refused(self, pytester: pytest.Pytester, first: str) -> None:
        """
        If one plugin runs the fixtures and the other one the test, an error says what to set; it depends on their
        order.
        """
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
    """Plugins that change where tests run, or when."""

    def test_fixtures_work_with_pytest_xdist(self, pytester: pytest.Pytester) -> None:
        """A session's server is one for each process."""
        test = """
            import pytest
            from app import App

            @pytest.mark.parametrize("number", range(4))
            def test_live(session_aioserve_live_server, number):
                assert session_aioserve_live_server(App()).is_serving()
        """
        files = {"test_it": sample(ANYIO), "test_live": test}
        run(pytester, *WITHOUT_ASYNCIO, "-n2", conftest=backend(), **files).assert_outcomes(passed=9)

    def test_fixtures_work_with_pytest_randomly(self, pytester: pytest.Pytester) -> None:
        """In random order."""
        files = {f"test_{number}": sample(mark) for number, mark in enumerate([ANYIO, ASYNCIO])}
        done = run(pytester, "--randomly-seed=7", conftest=backend(), **files)
        done.assert_outcomes(passed=10)
        done.stdout.fnmatch_lines("Using --randomly-seed=7")
