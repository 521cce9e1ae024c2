"""
Where an option asks for lines in the log that nobody would see, one warning says so, and what to write.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import WARNINGS_ARE_ERRORS
from tests.helpers.programs import ROOT

PROGRAM = """
import asyncio, logging, uvicorn
from aioserve import serving
from tests.helpers.apps import App

{setup}

async def main():
    async with serving(App(), {options}):
        pass

asyncio.run(main())
"""
NO_HANDLER = (
    'shows nothing, since the logger {logger} has no handler; call logging.basicConfig(level="INFO") before, '
    "or pass log_config=uvicorn.config.LOGGING_CONFIG"
)


def said(options: str, setup: str = "") -> list[str]:
    """Run a program, and return what it has logged, without uvicorn's own lines."""
    program = PROGRAM.format(options=options, setup=setup)
    command = [sys.executable, *WARNINGS_ARE_ERRORS, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)  # noqa: S603
    return [line for line in done.stderr.splitlines() if "http://" not in line]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("access_log=True", "access_log=True " + NO_HANDLER.format(logger="uvicorn.access")),
        ("log_level='info'", "log_level='info' " + NO_HANDLER.format(logger="uvicorn.error")),
        ("log_level=10", "log_level=10 " + NO_HANDLER.format(logger="uvicorn.error")),
        ("log_level='info', access_log=True", "access_log=True " + NO_HANDLER.format(logger="uvicorn.access")),
    ],
)
def test_option_that_asks_for_logs_without_a_handler_is_answered_by_one_warning(options: str, line: str) -> None:
    """It is seen, since Python prints warnings where no logging is set up."""
    assert said(options) == [line]


def test_access_log_below_the_level_of_its_logger_is_answered_by_a_warning() -> None:
    """There is a handler, but the level of the root logger is WARNING."""
    (line,) = said("access_log=True", "logging.basicConfig(format='%(message)s')")
    assert line == (
        "access_log=True shows nothing, since the logger uvicorn.access is not enabled for INFO; "
        'pass log_level="info", or set the level of that logger'
    )


@pytest.mark.parametrize(
    ("options", "setup"),
    [
        ("access_log=True", "logging.basicConfig(level='INFO')"),
        ("log_level='info', access_log=True", "logging.basicConfig()"),
        ("log_level='info', access_log=True, log_config=uvicorn.config.LOGGING_CONFIG", ""),
        ("log_level='warning'", ""),
        ("log_level=None, access_log=False", ""),
        ("", ""),
    ],
)
def test_option_whose_logs_are_seen_or_not_asked_for_is_no_reason_to_warn(options: str, setup: str) -> None:
    """Nothing is said."""
    assert said(options, setup) == []
