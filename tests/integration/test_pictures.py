"""
The pictures of the documentation: each still shows what a program shows today.

With `AIOSERVE_SCREENSHOT=1` in the environment, they are made anew. (The demo's is made by `test_browser.py`.)
"""

from __future__ import annotations

import html
import io
import os
import re
import sysconfig
from pathlib import Path

import pytest
from nbclient import NotebookClient
from nbconvert import HTMLExporter
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook
from playwright.async_api import async_playwright
from rich.console import Console
from rich.text import Text

from tests.helpers.pages import Page, pages
from tests.helpers.projects import WITHOUT_ASYNCIO
from tests.integration.conftest import IMAGES, program, remark, remarked

pytestmark = pytest.mark.timeout(180)  # a kernel and a browser take seconds to start, and more on a busy machine

TAKE = bool(os.environ.get("AIOSERVE_SCREENSHOT"))

# Two tests that fail: the app raises, and a handler hangs.
FAILING = """
import asyncio
import http.client
import logging

logging.disable()


async def app(scope, receive, send):
    if scope["path"] == "/slow":
        await asyncio.Event().wait()
    raise LookupError("no tea today")


def test_price(aioserve_live_server):
    server = aioserve_live_server(app, lifespan="off")
    connection = http.client.HTTPConnection(server.host, server.port)
    connection.request("GET", "/price/tea")
    assert connection.getresponse().status == 200


def test_slow(aioserve_live_server):
    server = aioserve_live_server(app, lifespan="off")
    connection = http.client.HTTPConnection(server.host, server.port)
    connection.request("GET", "/slow")
    while not server.stats.in_flight:
        pass
    connection.close()
"""


def picture(name: str) -> Path:
    """Return the path of a picture, which some page shows."""
    assert any(f"images/{name})" in page.text for page in pages())
    return IMAGES / name


@pytest.mark.parametrize("path", sorted(IMAGES.iterdir()), ids=lambda path: path.name)
def test_picture_is_small_and_on_a_page(path: Path) -> None:
    assert picture(path.name).stat().st_size < 80_000
    beginning = {".png": b"\x89PNG", ".svg": b"<svg"}[path.suffix]
    assert path.read_bytes().lstrip().startswith(beginning)


def words(svg: str) -> list[str]:
    """Return the words that a picture of a terminal shows, without what differs from run to run."""
    shown = html.unescape(re.sub(r"<[^>]+>", " ", re.sub(r"<style>.*?</style>", "", svg, flags=re.DOTALL)))
    return re.findall(r"[a-z_]{4,}", re.sub(r"\S*[\d/]\S*", " ", shown))


def test_picture_of_failing_tests_shows_their_report(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It names the exception of the app, and where the handler hung."""
    monkeypatch.setenv("COLUMNS", "110")
    for name in ("PYTEST_ADDOPTS", "CI", "BUILD_NUMBER"):  # with the last two, pytest does not shorten its summary
        monkeypatch.delenv(name, raising=False)
    pytester.makepyfile(test_shop=FAILING)
    plain = ("-p", "no:cacheprovider", "-p", "no:randomly", "-p", "no:logging", "--color=yes", "--tb=short", "-q")
    done = pytester.runpytest_subprocess(*WITHOUT_ASYNCIO, *plain)
    done.assert_outcomes(failed=1, passed=1, errors=1)
    console = Console(record=True, width=110, file=io.StringIO(), force_terminal=True)
    report = re.sub(
        rf"{re.escape(str(pytester.path.parents[2]))}[^ :\"]*?(/test_shop|\.\.\.)", r"~/shop\1", done.stdout.str()
    )
    report = report.replace(sysconfig.get_path("purelib"), "...")
    console.print(Text.from_ansi(report))
    svg = console.export_svg(title="python -m pytest", unique_id="pytest")
    if TAKE:
        (IMAGES / "failing-test.svg").write_text(svg, encoding="utf-8")
    assert words(picture("failing-test.svg").read_text(encoding="utf-8")) == words(svg)
    assert "LookupError" in svg
    assert "what&#160;left&#160;the&#160;app" in svg
    assert "forced" in svg


def cells() -> list[str]:
    return [block for block in Page("docs/guides/notebooks.md").blocks("python") if "def test_" not in block]


async def executed() -> NotebookNode:
    """Run the cells of the page on notebooks in a kernel."""
    notebook: NotebookNode = new_notebook(cells=[new_code_cell(cell.strip()) for cell in cells()])  # type: ignore[no-untyped-call]
    client = NotebookClient(notebook, timeout=60, kernel_name="python3")
    async with client.async_setup_kernel():
        for index, cell in enumerate(notebook.cells):
            await client.async_execute_cell(cell, index)
    return notebook


async def test_picture_of_a_notebook_shows_the_cells_of_the_page(tmp_path: Path) -> None:
    """They run, and print what the page says."""
    notebook = await executed()
    printed = [output.text for cell in notebook.cells for output in cell.outputs if output.output_type == "stream"]
    assert printed == ['"hello from a cell"\n', '"hello from another cell"\n']
    shown = "\n".join([*(cell.source for cell in notebook.cells), *printed])
    if TAKE:
        body, _ = HTMLExporter(template_name="lab").from_notebook_node(notebook)  # type: ignore[no-untyped-call]
        (tmp_path / "notebook.html").write_text(body, encoding="utf-8")
        async with async_playwright() as playwright:
            rule = "--host-resolver-rules=MAP * ~NOTFOUND"  # it needs no other machine
            browser = await playwright.chromium.launch(
                executable_path=program("chromium", "chromium"), args=["--no-sandbox", rule]
            )
            page = await browser.new_page(viewport={"width": 760, "height": 400})
            await page.goto(f"file://{tmp_path}/notebook.html")
            (IMAGES / "notebook.png").write_bytes(remarked(await page.screenshot(full_page=True), shown))
            await browser.close()
    assert remark(shown) in picture("notebook.png").read_bytes()
