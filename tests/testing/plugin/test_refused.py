"""
Tests that cannot use a fixture are refused with one sentence.
"""

from __future__ import annotations

import pytest

from tests.helpers.projects import (
    WITHOUT_ANYIO,
    WITHOUT_ASYNCIO,
    backend,
    run,
)


class TestWhatIsRefused:
    """One sentence says what to do."""

    @pytest.mark.parametrize("options", [(), WITHOUT_ASYNCIO], ids=["both plugins", "anyio's plugin"])
    @pytest.mark.parametrize("name", ["aioserve_server", "aioserve_client"])
    def test_synchronous_test_cannot_use_the_async_fixtures(
        self, pytester: pytest.Pytester, options: tuple[str, ...], name: str
    ) -> None:
        """The error names the fixture for synchronous tests."""
        done = run(pytester, *options, conftest=backend(), test_it=f"def test_it({name}): pass")
        done.assert_outcomes(errors=1)
        done.stdout.fnmatch_lines(f"{name} is for async tests: *; in a synchronous test, use aioserve_live_server")
        done.stdout.no_fnmatch_line("*Traceback*")

    @pytest.mark.parametrize("scope", ["", "module_", "session_"])
    def test_async_test_that_no_plugin_runs_is_refused(self, pytester: pytest.Pytester, scope: str) -> None:
        """No plugin is loaded for it, or it is not marked."""
        options = [(*WITHOUT_ASYNCIO, *WITHOUT_ANYIO), WITHOUT_ASYNCIO, () if not scope else WITHOUT_ASYNCIO]
        for each in options:
            test = f"async def test_it({scope}aioserve_client): pass"
            done = run(pytester, *each, conftest=backend(), test_it=test)
            done.assert_outcomes(errors=1)
            words = f"{scope}aioserve_client is for async tests: mark this test with pytest.mark.anyio, or *"
            done.stdout.fnmatch_lines(words)
