"""
What every test uses: the event loops, TLS, and a check that nothing is left behind.
"""

from __future__ import annotations

import asyncio
import gc
import signal
import ssl
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from uvicorn.config import HTTP_PROTOCOLS, WS_PROTOCOLS

from aioserve import _limits
from aioserve._net import transports
from aioserve._net.acceptor import acceptors
from aioserve.testing import assert_nothing_left
from tests.helpers import walk
from tests.helpers.proactor import PortableLoop

# For programs that run in a process of their own; pyproject.toml has the same for pytest.
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
    "uvloop": {"loop_factory": lambda: uvloop.new_event_loop()},
    "portable": {"loop_factory": PortableLoop},
}
DEFAULT_LOOPS = ["asyncio", "uvloop"]
if sys.platform != "win32":
    import uvloop
else:
    DEFAULT_LOOPS = ["asyncio"]
    del LOOPS["uvloop"]  # there is none
    LOOPS["portable"] = {"loop_factory": asyncio.ProactorEventLoop}  # the real one
    # They import what there is only on Unix; and the stand-in is for other systems.
    collect_ignore = [
        "exit/test_ended_loop.py",
        "start/test_loops.py",
        "stop/test_forking_programs.py",
        "stop/test_forks.py",
        "stop/test_no_descriptor_left.py",
        "thread/test_programs.py",
        "windows",
    ]
if sys.version_info < (3, 12):
    del LOOPS["eager"]  # eager tasks came with Python 3.12


def eager_loop() -> asyncio.AbstractEventLoop:
    """Make a loop whose tasks begin at once when they are created."""
    loop = asyncio.new_event_loop()
    loop.set_task_factory(getattr(asyncio, "eager_task_factory"))  # noqa: B009 (mypy looks with the oldest Python)
    return loop


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options that choose loops and protocols; a protocol that is chosen becomes uvicorn's "auto"."""
    parser.addoption("--loop", action="append", choices=list(LOOPS), help=f"default: {' and '.join(DEFAULT_LOOPS)}")
    parser.addoption("--integration", action="store_true", help="run the tests that need more than Python and pip")
    parser.addoption("--http", choices=list(HTTP_PROTOCOLS), default="auto", help='what uvicorn takes for http="auto"')
    parser.addoption("--ws", choices=list(WS_PROTOCOLS), default="auto", help='what uvicorn takes for ws="auto"')
    parser.addoption("--every", type=int, default=1, metavar="N", help="walk through each Nth turn only")


def pytest_configure(config: pytest.Config) -> None:
    """Apply the options to uvicorn's tables of protocols, and to the walks."""
    # Programs would inherit that they are ignored, where the suite is run by nohup, or in the background of a script.
    if sys.platform != "win32":
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    walk.every = config.getoption("--every")
    for option, protocols in (("--http", HTTP_PROTOCOLS), ("--ws", WS_PROTOCOLS)):
        chosen: dict[str, str | None] = dict(protocols)
        protocols["auto"] = chosen[config.getoption(option)]  # type: ignore[assignment]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run every async test on each chosen loop, or on the loops that it names."""
    named = any("loop_name" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if "loop_name" in metafunc.fixturenames and not named:
        metafunc.parametrize("loop_name", metafunc.config.getoption("--loop") or DEFAULT_LOOPS)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what loops without `add_reader()` do not promise, with the reason."""
    mark, callspec = item.get_closest_marker("not_portable"), getattr(item, "callspec", None)
    if mark is not None and callspec is not None and callspec.params.get("loop_name") == "portable":
        pytest.skip(*mark.args)


@pytest.fixture
def anyio_backend(loop_name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Choose the loop for anyio's plugin."""
    with pytest.MonkeyPatch.context() as patch:  # not the fixture: it has to end before what looks for leaks
        if loop_name == "portable":  # where nothing tells what is unread
            patch.setattr(transports, "_ask_kernel", lambda raw, request: 0)
            patch.setattr(transports, "_tcp_info_fields", lambda sock, layout: None)
        yield "asyncio", LOOPS[loop_name]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how many points the walks have tried."""
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, [])]
    points = sum(dict(report.user_properties).get("points", 0) for report in reports)
    if points:
        terminalreporter.write_line(f"cancellation walks: {points} points")


def pytest_collection_finish() -> None:
    """Exclude the imported modules, which are never garbage, from the collections after each test."""
    gc.collect()
    gc.freeze()


def pytest_runtest_logfinish() -> None:
    """Exclude also what a test has imported or cached; the whole run takes a third less time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    """Make a certificate authority."""
    return trustme.CA()


@pytest.fixture
def trusting(authority: trustme.CA) -> ssl.SSLContext:
    """Make a client's context that trusts the authority."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


@pytest.fixture
def tls_options(authority: trustme.CA, tmp_path: Path) -> dict[str, Any]:
    """Make uvicorn's options for a server with TLS."""
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "server.pem"))
    return {"ssl_certfile": str(tmp_path / "server.pem")}


@pytest.fixture
def tls(tls_options: dict[str, Any], trusting: ssl.SSLContext) -> tuple[dict[str, Any], ssl.SSLContext]:
    """Return the options of a server with TLS, and the context of its client."""
    return tls_options, trusting


@pytest.fixture
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the time that cancelled handlers and lifespans get, for tests in which it passes."""
    monkeypatch.setattr(_limits, "CANCELLED_HANDLERS", 0.05)
    monkeypatch.setattr(_limits, "LIFESPAN_GRACE", 0.05)


@pytest.fixture
def short_linger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the time that clients get which are still sending, for tests in which it passes."""
    monkeypatch.setattr(_limits, "LINGER", 0.05)
    monkeypatch.setattr(_limits, "LINGER_LONGEST", 0.05)


@pytest.fixture
def forget_loops() -> Iterator[Callable[[], None]]:
    """Let no loop have been tried, not even asyncio's, until the end of the test; call it to forget them again."""
    before = acceptors.copy()
    acceptors.clear()
    yield acceptors.clear
    acceptors.clear()
    acceptors.update(before)


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
    """Fail a test with a loop that leaves something behind, including tasks and timers."""
    async with assert_nothing_left(thread_pools=True):
        yield
