"""
How pytest finds the plugin, and what it imports.
"""

from __future__ import annotations

import subprocess
import sys

import pytest


def test_plugin_imports_nothing_but_pytest() -> None:
    """It is loaded in every pytest run of everybody who has installed aioserve."""
    program = (
        "import pytest, sys; before = set(sys.modules); import aioserve.pytest_plugin; "
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)  # noqa: S603
    assert done.stdout.split() == ["aioserve", "aioserve.pytest_plugin"]


def test_plugin_imports_nothing_in_a_run_without_its_fixtures(pytester: pytest.Pytester) -> None:
    """Neither another module of aioserve, nor anything that it would import."""
    test = """
        import sys

        def test_it():
            ours = {name for name in sys.modules if name.split(".")[0] in ("aioserve", "uvicorn", "httpx", "trustme")}
            assert ours == {"aioserve", "aioserve.pytest_plugin"}
            assert "anyio" not in sys.modules
    """
    # Other plugins would import something.
    pytester.makepyfile(test)
    monkeypatch = pytest.MonkeyPatch()
    with monkeypatch.context() as context:
        context.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
        done = pytester.runpytest_subprocess("-p", "aioserve.pytest_plugin", "-p", "no:cacheprovider")
    done.assert_outcomes(passed=1)


def test_pytest_finds_the_plugin_by_its_entry_point(pytester: pytest.Pytester) -> None:
    """The first sentence of each fixture's docstring is its description."""
    done = pytester.runpytest_subprocess("--fixtures", "-o", "asyncio_default_fixture_loop_scope=function")
    for scope in ("", "module_", "session_"):
        for kind in ("server", "client", "live_server"):
            done.stdout.fnmatch_lines(f"{scope}aioserve_{kind}*-- *")
    done.stdout.fnmatch_lines("aioserve_tls*")
