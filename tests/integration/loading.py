"""
Clients in a process of their own, for as long as a block lasts.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tests.helpers.programs import ROOT


@contextmanager
def load(port: int, clients: int, kind: str) -> Iterator[dict[str, int]]:
    """Run the clients of tests/helpers/load.py during the block; fill what is yielded with their counts after it."""
    # With low priority, so that servers can start.
    command = ["nice", sys.executable, str(ROOT / "tests/helpers/load.py"), str(port), str(clients), kind]
    counted: dict[str, int] = {}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603
        try:
            yield counted
            counted.update(json.loads(process.communicate()[0] or "{}"))
        finally:
            process.kill()
    assert process.returncode == 0, "a client was refused, or got an answer that is not the app's"
