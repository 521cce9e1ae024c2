"""
A server inside a Qt program and inside a Textual program, as the page on user interfaces shows them.
"""

from __future__ import annotations

import importlib.util
import re
import signal
import sys
from pathlib import Path
from types import ModuleType

import httpx
import pexpect
import pytest
from textual.widgets import Label

from tests.helpers.pages import Page
from tests.helpers.programs import Program

pytestmark = pytest.mark.timeout(120)  # Qt and Textual take a second to start, and more on a busy machine

FILES = Page("docs/guides/gui.md").files()


@pytest.fixture
def qt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    monkeypatch.setenv("QT_QPA_PLATFORM", "offscreen")
    path = tmp_path / "qt_window.py"
    path.write_text(FILES["qt_window.py"])
    return Program(str(path))


def test_handler_changes_a_widget_of_qt_and_closing_the_window_closes_the_server(qt: Program) -> None:
    """The request that closes the window is answered."""
    with qt:
        url = qt.wait_for("http")
        assert httpx.post(f"{url}/text", params={"text": "hello"}).status_code == 200
        assert httpx.post(f"{url}/close").status_code == 200
        assert qt.end() == (0, "")
    assert qt.said[-1] == "the label says: hello"


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_the_block_in_a_qt_program(qt: Program, signum: int) -> None:
    """Where Qt itself would not notice Ctrl+C."""
    with qt:
        qt.wait_for("http")
        qt.send(signum)
        assert qt.end() == (0, "")
    assert qt.said[-1] == "the label says: nothing yet"


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="asyncio refuses steps of tasks without a running loop")
def test_server_stops_where_qt_ends_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Its task takes steps in which asyncio knows no running loop. Then `asyncio.run()` runs the loop once more, so that
    nothing is lost: only qasync complains.
    """
    monkeypatch.setenv("QT_QPA_PLATFORM", "offscreen")
    page = FILES["qt_window.py"]
    lines = [line for line in page.splitlines(keepends=True) if "setQuitOnLastWindowClosed" not in line]
    path = tmp_path / "qt_window.py"
    path.write_text("".join(lines).replace("FastAPI()", "FastAPI(on_shutdown=[lambda: print('lifespan over')])"))
    with Program(str(path)) as program:
        url = program.wait_for("http")
        assert httpx.post(f"{url}/close").status_code == 200
        code, err = program.end()
    assert code == 1
    assert err.splitlines()[-1] == "RuntimeError: Event loop stopped before Future completed."
    assert err.count("Traceback") == 1, err
    assert "the server" not in err
    assert program.said[-1] == "lifespan over"


def textual_app(directory: Path) -> ModuleType:
    path = directory / "textual_app.py"
    path.write_text(FILES["textual_app.py"])
    spec = importlib.util.spec_from_file_location("textual_app", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("anyio_backend", [pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio")])
async def test_handler_changes_a_widget_of_textual(tmp_path: Path) -> None:
    """In Textual's own test mode; the server closes with the app, and has forced nothing."""
    screen = textual_app(tmp_path).Screen()
    async with screen.run_test() as pilot:
        async with httpx.AsyncClient(base_url=screen.server.url) as client:
            assert (await client.post("/text", params={"text": "hello"})).status_code == 200
        await pilot.pause()
        assert str(screen.query_one(Label).content) == "hello"
    assert not screen.server.report.was_forced


def test_handler_ends_a_textual_program_in_a_terminal(tmp_path: Path) -> None:
    """It shows its address, and its exit code is 0."""
    path = tmp_path / "textual_app.py"
    path.write_text(FILES["textual_app.py"])
    terminal = pexpect.spawn(sys.executable, [str(path)], encoding="utf-8", dimensions=(30, 100), timeout=60)
    try:
        terminal.expect(r"http://127\.0\.0\.1:(\d+)")
        assert isinstance(terminal.match, re.Match)
        assert httpx.post(f"http://127.0.0.1:{terminal.match[1]}/close").status_code == 200
        terminal.expect(pexpect.EOF)
    finally:
        terminal.close()
    assert terminal.exitstatus == 0
