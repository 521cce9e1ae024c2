"""
What every test has: the event loops, and a check that nothing is left behind.
"""

from __future__ import annotations

import asyncio
import gc
import ssl
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
import uvloop
from uvicorn.config import HTTP_PROTOCOLS, WS_PROTOCOLS

from aioserve import _lifespan, _shutdown
from aioserve.testing import assert_nothing_left
from tests import walk

# For programs that are run as such; pyproject.toml says the same to pytest.
WARNINGS_ARE_ERRORS = [
    "-Werror",
    "-Wignore:The `websockets` implementation is deprecated",
    "-Wignore:websockets.legacy is deprecated:DeprecationWarning",
    "-Wignore:websockets.server.WebSocketServerProtocol is deprecated:DeprecationWarning",
    "-Wignore:remove second argument of ws_handler:DeprecationWarning",
]

LOOPS: dict[str, dict[str, Any]] = {
    "asyncio": {},
    "debug": {"debug": True},
    "eager": {"loop_factory": lambda: eager_loop()},
    "uvloop": {"loop_factory": uvloop.new_event_loop},
}
DEFAULT_LOOPS = ["asyncio", "uvloop"]
if sys.version_info < (3, 12):
    del LOOPS["eager"]  # eager tasks came with Python 3.12


def eager_loop() -> asyncio.AbstractEventLoop:
    """Make a loop whose tasks begin at once, where they are created."""
    loop = asyncio.new_event_loop()
    loop.set_task_factory(getattr(asyncio, "eager_task_factory"))  # noqa: B009 (mypy looks with the oldest Python)
    return loop


def pytest_addoption(parser: pytest.Parser) -> None:
    """Choose what the whole suite runs on: uvicorn has several protocols, and which is "auto" is decided here."""
    parser.addoption("--loop", action="append", choices=list(LOOPS), help=f"default: {' and '.join(DEFAULT_LOOPS)}")
    parser.addoption("--integration", action="store_true", help="run the tests that need more than Python and pip")
    parser.addoption("--http", choices=list(HTTP_PROTOCOLS), default="auto", help='what uvicorn takes for http="auto"')
    parser.addoption("--ws", choices=list(WS_PROTOCOLS), default="auto", help='what uvicorn takes for ws="auto"')
    parser.addoption("--every", type=int, default=1, metavar="N", help="walk through each Nth turn only")


def pytest_configure(config: pytest.Config) -> None:
    """Make uvicorn choose what was chosen here, and the walks take as long steps."""
    walk.every = config.getoption("--every")
    for option, protocols in (("--http", HTTP_PROTOCOLS), ("--ws", WS_PROTOCOLS)):
        chosen: dict[str, str | None] = dict(protocols)
        protocols["auto"] = chosen[config.getoption(option)]  # type: ignore[assignment]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run every async test on every loop, or on those that it names."""
    named = any("loop_name" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if "loop_name" in metafunc.fixturenames and not named:
        metafunc.parametrize("loop_name", metafunc.config.getoption("--loop") or DEFAULT_LOOPS)


@pytest.fixture
def anyio_backend(loop_name: str) -> tuple[str, dict[str, Any]]:
    """Tell anyio's plugin."""
    return "asyncio", LOOPS[loop_name]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many points the walks have tried."""
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, [])]
    points = sum(dict(report.user_properties).get("points", 0) for report in reports)
    if points:
        terminalreporter.write_line(f"cancellation walks: {points} points")


def pytest_collection_finish() -> None:
    """
    Spare the collections after each test what will never be garbage: the imported modules.

    And let uvloop have the two pipes that it keeps from its first loop on.
    """
    uvloop.new_event_loop().close()
    gc.collect()
    gc.freeze()


def pytest_runtest_logfinish() -> None:
    """Spare them also what a test has imported, or put into a cache; this takes a third from the whole run."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    """Issue certificates."""
    return trustme.CA()


@pytest.fixture
def trusting(authority: trustme.CA) -> ssl.SSLContext:
    """Make a client's context, which trusts them."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


@pytest.fixture
def tls_options(authority: trustme.CA, tmp_path: Path) -> dict[str, Any]:
    """Make the options of a server with TLS: uvicorn's own."""
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "server.pem"))
    return {"ssl_certfile": str(tmp_path / "server.pem")}


@pytest.fixture
def tls(tls_options: dict[str, Any], trusting: ssl.SSLContext) -> tuple[dict[str, Any], ssl.SSLContext]:
    """Both of these."""
    return tls_options, trusting


@pytest.fixture
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the bounds for what has been cancelled, for tests that run into them."""
    monkeypatch.setattr(_shutdown, "CANCELLED_HANDLERS", 0.05)
    monkeypatch.setattr(_lifespan.Lifespan, "grace", 0.05)


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves something behind."""
    if "anyio_backend" in request.fixturenames:
        request.getfixturevalue("nothing_is_left_in_the_loop")
        yield
        return
    with assert_nothing_left():
        yield


@pytest.fixture
async def nothing_is_left_in_the_loop() -> AsyncIterator[None]:
    """The same for a test with a loop, its tasks and timers included."""
    async with assert_nothing_left(thread_pools=True):
        yield
