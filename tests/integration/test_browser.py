"""
The demo's page in a browser: Debian's Chromium, driven by Playwright.

With `AIOSERVE_SCREENSHOT=1` in the environment, the picture of the page is taken anew.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import ssl

import pytest
import trustme
from playwright.async_api import async_playwright
from playwright.sync_api import Page, sync_playwright

from aioserve import Swappable, serving, start
from aioserve.demo import Worker, make_app
from tests.helpers.apps import App
from tests.helpers.programs import Program
from tests.helpers.turns import turns
from tests.integration.conftest import IMAGES, program, remark, remarked

pytestmark = pytest.mark.timeout(180)  # a browser takes seconds to start, and more on a busy machine

PICTURE = IMAGES / "demo.png"

# Nobody sees the window; as root there is no sandbox; and no other machine can be reached.
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]

# Records each value that the page shows. If the page was reloaded, the record would be empty.
RECORD = """
window.seen = {count: [], events: [], echo: []}
new MutationObserver(mutations => {
  for (const {target} of mutations) window.seen[target.id]?.push(target.textContent)
}).observe(document, {subtree: true, childList: true})
"""

# Whether each of the three has shown two more values since a number of values.
LIVE = """
since => Object.entries(window.seen).every(([id, texts]) =>
  new Set(texts.slice(since[id]).filter(text => /^(hello [(])?[0-9]+[)]?$/.test(text))).size >= 2)
"""

HOW_MANY = "() => Object.fromEntries(Object.entries(window.seen).map(([id, texts]) => [id, texts.length]))"

# Whether each of the three has shown that there is no server.
GONE = """
() => window.seen.count.includes("no server") && window.seen.events.includes("no server")
  && window.seen.echo.includes("closed: 1012")
"""


def run_demo(port: int) -> Program:
    return Program("-m", "aioserve.demo", "--port", str(port))


def url_of(demo: Program) -> str:
    return demo.wait_for("open http").split()[1]


def stop(demo: Program) -> None:
    demo.send(signal.SIGINT)
    assert demo.end() == (0, "")


def test_page_of_the_demo_reconnects_when_its_server_is_restarted() -> None:
    """Its three connections end in order with the server, and are made again with the next one, without a reload."""
    ended: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program("chromium", "chromium"), args=ARGUMENTS)
        page = browser.new_page(viewport={"width": 760, "height": 400})
        page.add_init_script(RECORD)
        for how in ("requestfinished", "requestfailed"):
            page.on(how, lambda request, how=how: ended.append(f"{how} {request.url.rpartition('/')[2]}"))
        with run_demo(0) as demo:
            url = url_of(demo)
            page.goto(url)
            page.wait_for_function(LIVE, arg={"count": 0, "events": 0, "echo": 0})
            shown = re.sub(r"\d+", "0", page.inner_text("body"))  # without the count
            if os.environ.get("AIOSERVE_SCREENSHOT"):
                take_picture(page, shown)
            assert remark(shown) in PICTURE.read_bytes(), "AIOSERVE_SCREENSHOT=1 makes a new picture of the demo's page"
            stop(demo)
        page.wait_for_function(GONE)
        assert "requestfinished events" in ended
        assert "requestfailed events" not in ended

        before = page.evaluate(HOW_MANY)
        with run_demo(int(url.rpartition(":")[2])) as demo:
            assert url_of(demo) == url
            page.wait_for_function(LIVE, arg=before)
            browser.close()
            stop(demo)


def take_picture(page: Page, shown: str) -> None:
    png = page.screenshot(clip={"x": 0, "y": 0, "width": 760, "height": 400})
    PICTURE.write_bytes(remarked(png, shown))


async def test_browser_and_server_can_share_a_loop() -> None:
    """With Playwright's own asyncio interface; and the page goes on when its app is swapped."""
    worker = Worker()
    working = asyncio.create_task(worker.run())
    swappable = Swappable(make_app(worker))
    async with serving(swappable) as server, async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=program("chromium", "chromium"), args=ARGUMENTS)
        page = await browser.new_page()
        await page.add_init_script(RECORD)
        await page.goto(server.url)
        await page.wait_for_function(LIVE, arg={"count": 0, "events": 0, "echo": 0})

        await swappable.swap(make_app(worker), shutdown_timeout=0)
        # The stream belongs to the old app, and does not end by itself; the browser then requests a new one.
        await page.wait_for_function(
            "() => window.seen.echo.includes('closed: 1012') && window.seen.events.includes('no server')"
        )
        before = await page.evaluate(HOW_MANY)
        await page.wait_for_function(LIVE, arg=before)
        assert "no server" not in await page.evaluate("() => window.seen.count")
        await browser.close()
    working.cancel()


async def test_http2_of_a_browser(authority: trustme.CA) -> None:
    """It asks for it over TLS; in a stop, it gets all answers on one connection; its event stream ends, too."""
    pytest.importorskip("zttp", reason="uvicorn's HTTP/2 needs zttp")
    app = App()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    async with async_playwright() as playwright:
        server = await start(app, http2=True, ssl=context, shutdown_timeout=60)
        browser = await playwright.chromium.launch(executable_path=program("chromium", "chromium"), args=ARGUMENTS)
        page = await browser.new_page(ignore_https_errors=True)
        await page.goto(server.url)
        navigation = "() => performance.getEntriesByType('navigation')[0].nextHopProtocol"
        assert await page.evaluate(navigation) == "h2"
        await page.evaluate(
            "() => { window.errors = 0; const events = new EventSource('/stream');"
            " events.onerror = () => { window.errors += 1; events.close() } }"
        )
        await page.evaluate(
            "() => { window.answers = Promise.all([...Array(20).keys()].map("
            " number => fetch('/hold?' + number).then(response => response.text(), String))) }"
        )
        while app.events.count("GET /hold") < 20 or "GET /stream" not in app.events:
            await asyncio.sleep(0.01)
        assert server.stats.connections == 1
        closing = asyncio.create_task(server.aclose())
        await turns(10)
        app.release.set()
        await closing
        assert await page.evaluate("() => window.answers") == ["hello"] * 20
        await page.wait_for_function("() => window.errors == 1")
        await browser.close()
    assert server.report is not None
    assert not server.report.was_forced
