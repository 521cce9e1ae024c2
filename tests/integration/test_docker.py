"""
Docker: what the Dockerfile and the compose file say is tried without Docker, as the first process of a PID namespace.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import WARNINGS_ARE_ERRORS
from tests.integration import examples
from tests.integration.conftest import free_port, program
from tests.integration.stopping import longest_stop

# How long the interpreter may take to exit.
EXIT = 1.0


def instruction(beginning: str) -> list[str]:
    """Return the command of an instruction, which has to be a list: a string would be run by a shell."""
    lines = examples.file("Dockerfile").replace("\\\n", " ")
    (found,) = re.findall(rf"^{beginning} +(\[.*\])$", lines, flags=re.MULTILINE)
    command: list[str] = json.loads(found)
    return command


def service() -> dict[str, Any]:
    described: dict[str, Any] = yaml.safe_load(examples.file("compose.yaml"))["services"]["app"]
    return described


def test_grace_period_is_longer_than_a_stop_can_take() -> None:
    """As the table of the page says; and the port that is published is the one that the app listens on."""
    command = instruction("CMD")
    assert command[:3] == ["python", "-m", "aioserve"]
    longest, limit = longest_stop(command[3:]), float(service()["stop_grace_period"].removesuffix("s"))
    assert longest + EXIT <= limit
    *parts, total, stated = examples.sums("in `compose.yaml`")
    assert sum(parts) == total == longest
    assert stated == limit
    port = command[command.index("--port") + 1]
    assert service()["ports"] == [f"{port}:{port}"]
    assert f"EXPOSE {port}\n" in examples.file("Dockerfile")
    assert command[command.index("--host") + 1] == "0.0.0.0"  # noqa: S104 (from outside of the container)


@contextmanager
def first_process(directory: Path, port: int) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Run the container's command as the first process of a namespace; yield what has started it, and its id here."""
    (directory / "app.py").write_text(examples.file("app.py"))
    command = [each.replace("8000", str(port)).replace("0.0.0.0", "127.0.0.1") for each in instruction("CMD")]  # noqa: S104
    unshare = [program("unshare", "util-linux"), "--pid", "--fork", "--mount-proc"]
    with (
        (directory / "log").open("w") as log,
        subprocess.Popen(  # noqa: S603
            [*unshare, sys.executable, *WARNINGS_ARE_ERRORS, *command[1:]],
            cwd=directory,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        assert process.stdout.readline() == f"http://127.0.0.1:{port}\n", (directory / "log").read_text()
        inner = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())
        try:
            yield process, inner
        finally:
            if process.poll() is None:
                os.kill(inner, signal.SIGKILL)


def is_healthy(port: int) -> bool:
    command = [each.replace("8000", str(port)) for each in instruction("HEALTHCHECK .* CMD")]
    done = subprocess.run([sys.executable, *command[1:]], capture_output=True, check=False)  # noqa: S603
    return done.returncode == 0


@pytest.mark.timeout(120)
def test_first_process_of_a_container_stops_gracefully_at_sigterm(tmp_path: Path) -> None:
    """It is healthy while it serves, and not when it has stopped; the exit code is 0."""
    port = free_port()
    with first_process(tmp_path, port) as (process, inner):
        assert is_healthy(port)
        os.kill(inner, signal.SIGTERM)
        assert process.wait(30) == 0
        assert not is_healthy(port)
