"""
A client cannot write a line into the log, or control the terminal that shows it.
"""

from __future__ import annotations

import asyncio
import logging
import unicodedata
from typing import Any

import pytest

from aioserve import Swappable, UnfinishedHandler, serving, testing
from tests.helpers.apps import App, Receive, Scope, Send, without_lifespan
from tests.helpers.clients import PIPELINING, connect

pytestmark = pytest.mark.usefixtures("short_grace")

FORGED = (
    "/x%0a2026-01-01%20CRITICAL%20root:%20forged%0d%1b[2J%00%7f%c2%85%c2%9b2J%e2%80%a8%e2%80%a9%e2%80%ae%f0%9f%98%80%ff"
)


class Holding(App):
    """Holds every request, whatever its path is."""

    async def request(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert "\n" in scope["path"], "the server has decoded the path"
        await super().request({**scope, "path": "/hold"}, receive, send)


def assert_harmless(text: str) -> None:
    """Check that a text is one line, and has nothing in it that is no visible character."""
    assert "/x%0A2026-01-01" in text
    assert len(text.splitlines()) == 1
    assert [each for each in text if unicodedata.category(each)[0] in "CZ" and each != " "] == []


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("http", PIPELINING)
async def test_path_with_control_characters_cannot_forge_a_log_line(
    http: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The warning of a forced stop names the request in one line; so do the report and its handler."""
    app = Holding()
    async with serving(app, http=http, shutdown_timeout=0.01) as server, connect(server) as client:
        client.ask(FORGED)
        await app.holding.wait()
    (line,) = warnings(caplog)
    assert_harmless(line)
    assert server.report is not None
    assert_harmless(server.report.summary())
    (handler,) = server.report.cancelled
    assert_harmless(str(handler))
    assert "\n" in handler.path, "the report's own path is as the app has it"


async def test_error_of_a_test_server_cannot_be_forged() -> None:
    """It has the same line."""
    app = Holding()
    with pytest.raises(AssertionError) as raised:
        async with testing.server(app, shutdown_timeout=0.01, disconnect_after=None) as server:
            async with connect(server) as client:
                client.ask(FORGED)
                await app.holding.wait()
                await asyncio.sleep(0)
                server.close()
                await server._engine.closed.wait()
    assert_harmless(str(raised.value))


async def test_note_of_a_test_server_cannot_be_forged() -> None:
    """It is added to the exception of the test."""
    app = Holding()
    with pytest.raises(ZeroDivisionError) as raised:
        async with testing.server(app, shutdown_timeout=0.01, disconnect_after=None) as server:
            async with connect(server) as client:
                client.ask(FORGED)
                await app.holding.wait()
                raise ZeroDivisionError
    (note,) = raised.value.__notes__
    assert_harmless(note)


async def test_log_line_of_a_replaced_app_cannot_be_forged(caplog: pytest.LogCaptureFixture) -> None:
    """`Swappable.swap()` cancels the handler."""
    app = Holding()
    swappable = Swappable(app)
    async with serving(swappable) as server, connect(server) as client:
        client.ask(FORGED)
        await app.holding.wait()
        await swappable.swap(without_lifespan, shutdown_timeout=0.01)
        await client.reader.readuntil(b"try again.\n")
    (line,) = warnings(caplog)
    assert line.startswith("the replaced app: ")
    assert_harmless(line)


@pytest.mark.parametrize(
    "forged", [{"method": "GET\nforged"}, {"client": ("::1%\x1b[2J\n", 1)}, {"path": "/\udc80\n\u2028"}], ids=str
)
def test_every_part_of_a_request_is_quoted_in_its_description(forged: dict[str, Any]) -> None:
    """Other servers and middlewares may let through what uvicorn refuses; a surrogate is no error."""
    described = {"method": "GET", "path": "/", "client": ("127.0.0.1", 1), "where": (), "stuck": False, **forged}
    text = str(UnfinishedHandler(**described))
    assert text.isprintable()
    text.encode()
