"""
Clients in a process of their own, for as long as a block lasts.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tests.programs import ROOT


@contextmanager
def load(port: int, clients: int, kind: str) -> Iterator[dict[str, int]]:
    """Ask all the time, as tests/load.py says; what was counted is there when the block is over."""
    # Not in the way of servers that have to start.
    command = ["nice", sys.executable, str(ROOT / "tests/load.py"), str(port), str(clients), kind]
    counted: dict[str, int] = {}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603
        try:
            yield counted
            counted.update(json.loads(process.communicate()[0] or "{}"))
        finally:
            process.kill()
    assert process.returncode == 0, "somebody was refused, or got an answer that was none of the app's"
