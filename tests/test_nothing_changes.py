"""
What a server does not do to the program around it. The fixture of all tests looks at what is left behind; these look at
what is there meanwhile.
"""

from __future__ import annotations

import asyncio
import io
import logging
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest
import uvicorn

import aioserve
from aioserve import serving
from aioserve._leaks import look
from tests.apps import App
from tests.clients import get


async def test_while_it_serves_no_thread_signal_handler_or_logger_is_different() -> None:
    """Only its socket is there."""
    before = look()
    async with serving(App()) as server:
        meanwhile = look()
    assert len(meanwhile.descriptors) == len(before.descriptors) + 1
    assert meanwhile._replace(descriptors=before.descriptors) == before
    assert server


async def test_it_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """Unless something is wrong."""
    async with serving(App()) as server:
        await get(server)
    assert capfd.readouterr() == ("", "")


async def test_uvicorns_own_logs_come_back_on_request() -> None:
    """With uvicorn's own configuration, which the caller asks for and so has to undo."""
    loggers = [logging.getLogger(name) for name in ("uvicorn", "uvicorn.error", "uvicorn.access")]
    before = [(logger, logger.level, logger.propagate) for logger in loggers]
    out = io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(out):
            async with serving(App(), log_config=uvicorn.config.LOGGING_CONFIG) as server:
                await get(server, "/seen")
    finally:
        for logger, level, propagate in before:
            logger.setLevel(level)
            logger.propagate = propagate
            logger.handlers.clear()
    assert '"GET /seen HTTP/1.1" 200' in out.getvalue()
    assert f"Serving on {server.url}" in out.getvalue()
    assert f"Closed {server.url}" in out.getvalue()


async def test_without_access_log_only_this_server_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    """uvicorn takes the handlers away from the logger of all."""
    with caplog.at_level(logging.INFO, "uvicorn.access"):
        async with serving(App(), access_log=False) as silent, serving(App()) as heard:
            await get(silent, "/silent")
            await get(heard, "/heard")
    messages = [record.getMessage() for record in caplog.records if record.name == "uvicorn.access"]
    assert len(messages) == 1
    assert "/heard" in messages[0]


def test_importing_the_package_imports_nothing_else() -> None:
    """Its names are loaded on their first use."""
    program = "import sys, aioserve; print([name for name in ('uvicorn', 'anyio', 'asyncio') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)  # noqa: S603
    assert done.stdout == "[]\n"


def test_the_public_names_are_there_and_no_others() -> None:
    """Each is loaded, and listed by dir(); a misspelt one is an AttributeError as in any module."""
    for name in aioserve.__all__:
        assert getattr(getattr(aioserve, name), "__name__", name) == name
        assert name in dir(aioserve)
    with pytest.raises(AttributeError, match="has no attribute 'severing'"):
        aioserve.severing  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize("error", [SystemExit(7), KeyboardInterrupt()], ids=repr)
async def test_a_handler_that_exits_does_not_take_the_program_down(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    """uvicorn answers with 500 and logs it."""

    class Exiting(App):
        async def request(self, *args: object) -> None:
            raise error

    async with serving(Exiting()) as server:
        assert (await get(server)).status_code == 500
        assert server.is_serving()
    assert "Exception in ASGI application" in caplog.text


@pytest.mark.parametrize("error", [SystemExit(7), KeyboardInterrupt()], ids=repr)
def test_a_body_that_exits_ends_the_program_after_an_orderly_stop(error: BaseException) -> None:
    """With the same exception, as everything that a body raises."""
    app = App()

    async def main() -> None:
        async with serving(app) as server:
            await get(server)
            raise error

    with pytest.raises(type(error)) as caught:
        asyncio.run(main())
    assert caught.value is error
    assert app.events == ["startup", "GET /", "answered /", "shutdown", "lifespan over"]
