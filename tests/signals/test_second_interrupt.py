"""
Ctrl+C without `stop_on_signals`: the second one ends the program at once, whatever the handlers do.
"""

from __future__ import annotations

import signal
from importlib.util import find_spec

import pytest

from tests.helpers.programs import Program


@pytest.mark.parametrize("http", [name for name in ("h11", "httptools") if find_spec(name)])
@pytest.mark.parametrize("loop_name", ["asyncio", "uvloop", "plain"])
def test_second_interrupt_ends_a_program_whose_handlers_compute(loop_name: str, http: str) -> None:
    """uvicorn would catch it and log it; and here nothing else would end the stop."""
    with Program("-m", "tests.helpers.computing", loop_name, http) as program:
        program.wait_for("serving")
        program.wait_until_asleep()
        program.send(signal.SIGINT)
        program.wait_for("computing")
        program.send(signal.SIGINT)
        program.wait_for("interrupted")
