"""
What a server does not change in the program around it. A fixture of all tests checks what is left behind; these tests
check what is there while the server runs.
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
from aioserve.testing.leaks import take_snapshot
from tests.helpers.apps import App
from tests.helpers.clients import get


async def test_running_server_changes_no_thread_signal_handler_or_logger(loop_name: str) -> None:
    """Only its socket is new, and the loop's own duplicate where the loop accepts."""
    before = take_snapshot()
    async with serving(App()) as server:
        meanwhile = take_snapshot()
    assert len(meanwhile.descriptors) == len(before.descriptors) + (2 if loop_name == "portable" else 1)
    assert meanwhile._replace(descriptors=before.descriptors) == before
    assert server


async def test_server_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """Unless something is wrong."""
    async with serving(App()) as server:
        await get(server)
    assert capfd.readouterr() == ("", "")


async def test_log_config_turns_uvicorns_own_logs_on() -> None:
    """It is uvicorn's own configuration; the caller, who has passed it, has to undo it."""
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
    assert f"Uvicorn running on {server.url}" in out.getvalue()
    assert f"Closed {server.url}" in out.getvalue()


async def test_access_log_false_silences_only_its_own_server(caplog: pytest.LogCaptureFixture) -> None:
    """uvicorn itself would remove the handlers of the logger that all servers share."""
    with caplog.at_level(logging.INFO, "uvicorn.access"):
        async with serving(App(), access_log=False) as silent, serving(App()) as logged:
            await get(silent, "/silent")
            await get(logged, "/logged")
    messages = [record.getMessage() for record in caplog.records if record.name == "uvicorn.access"]
    assert len(messages) == 1
    assert "/logged" in messages[0]


def test_importing_aioserve_imports_neither_uvicorn_nor_anyio_nor_asyncio() -> None:
    """Its names are loaded on their first use."""
    program = "import sys, aioserve; print([name for name in ('uvicorn', 'anyio', 'asyncio') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)  # noqa: S603
    assert done.stdout == "[]\n"


def test_every_public_name_can_be_loaded_and_is_listed() -> None:
    """By `dir()`; any other name raises AttributeError, as in every module."""
    for name in aioserve.__all__:
        value = getattr(aioserve, name)
        if name != "App":  # a union, which has the name of its class from Python 3.14 on
            assert getattr(value, "__name__", name) == name
        assert name in dir(aioserve)
    with pytest.raises(AttributeError, match="has no attribute 'severing'"):
        aioserve.severing  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize("error", [SystemExit(7), KeyboardInterrupt()], ids=repr)
async def test_handler_that_raises_system_exit_does_not_end_the_program(
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
def test_body_that_raises_system_exit_ends_the_program_after_the_stop(error: BaseException) -> None:
    """The very exception comes out, as everything that a body raises."""
    app = App()

    async def main() -> None:
        async with serving(app) as server:
            await get(server)
            raise error

    with pytest.raises(type(error)) as caught:
        asyncio.run(main())
    assert caught.value is error
    assert app.events == ["startup", "GET /", "answered /", "shutdown", "lifespan over"]
