"""
Docker: what the Dockerfile and the compose file say is tried without Docker, as the first process of a PID namespace.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
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
    assert "STOPSIGNAL" not in examples.file("Dockerfile")  # so it is SIGTERM
    assert service()["init"] is True


def server(port: int) -> list[str]:
    """Return the container's command, with the Python of the test and this port."""
    command = [each.replace("8000", str(port)).replace("0.0.0.0", "127.0.0.1") for each in instruction("CMD")]  # noqa: S104
    assert command[0] == "python"
    return [sys.executable, *WARNINGS_ARE_ERRORS, *command[1:]]


@contextmanager
def first_process(directory: Path, command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """Run a command as the first process of a namespace; yield what has started it."""
    (directory / "app.py").write_text(examples.file("app.py"))
    path = os.pathsep.join([str(directory), *filter(None, [os.environ.get("PYTHONPATH")])])
    with (
        (directory / "log").open("w") as log,
        subprocess.Popen(  # noqa: S603
            [program("unshare", "util-linux"), "--pid", "--fork", "--kill-child", "--mount-proc", *command],
            cwd=directory,
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as process,
    ):
        try:
            yield process
        finally:
            process.kill()  # and with it the namespace


def until_it_serves(process: subprocess.Popen[str], port: int) -> int:
    """Wait; return the id of the namespace's first process."""
    assert process.stdout is not None
    assert process.stdout.readline() == f"http://127.0.0.1:{port}\n"
    return child(process.pid)


def child(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text())


def status(path: str, port: int) -> int:
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    finally:
        connection.close()


def is_healthy(port: int) -> bool:
    command = [each.replace("8000", str(port)) for each in instruction("HEALTHCHECK .* CMD")]
    done = subprocess.run([sys.executable, *command[1:]], capture_output=True, check=False)  # noqa: S603
    return done.returncode == 0


@pytest.mark.timeout(120)
def test_first_process_of_a_container_stops_gracefully_at_sigterm(tmp_path: Path) -> None:
    """It is healthy while it serves, and not when it has stopped; the exit code is 0."""
    port = free_port()
    with first_process(tmp_path, server(port)) as process:
        inner = until_it_serves(process, port)
        assert is_healthy(port)
        os.kill(inner, signal.SIGTERM)
        assert process.wait(30) == 0
        assert not is_healthy(port)


@pytest.mark.timeout(120)
def test_health_check_fails_in_a_drain_in_which_requests_are_answered(tmp_path: Path) -> None:
    """A balancer that asks it sends no more requests before the server refuses them."""
    port = free_port()
    with first_process(tmp_path, [*server(port), "--drain-delay", "60"]) as process:
        os.kill(until_it_serves(process, port), signal.SIGTERM)
        while status("/ready", port) == 200:  # the signal is on its way
            pass
        assert not is_healthy(port)
        assert status("/", port) == 200


@pytest.mark.timeout(120)
def test_command_as_a_string_never_learns_of_the_stop(tmp_path: Path) -> None:
    """The shell is the first process then. Debian's does not pass the signal on, and ignores it."""
    port = free_port()
    with first_process(tmp_path, [program("dash", "dash"), "-c", shlex.join(server(port))]) as process:
        os.kill(until_it_serves(process, port), signal.SIGTERM)
        assert is_healthy(port)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("first", [True, False], ids=["first", "not first"])
def test_signal_before_python_handles_it_is_lost_on_the_first_process_only(first: bool, tmp_path: Path) -> None:
    """Below an init, which is the first process then, it ends Python."""
    port = free_port()
    os.mkfifo(tmp_path / "continue")
    # Python imports this module while it starts.
    (tmp_path / "sitecustomize.py").write_text("print('starting', flush=True)\nopen('continue').read(1)\n")
    command = server(port) if first else [program("dash", "dash"), "-c", f"{shlex.join(server(port))} & wait $!"]
    # Open for reading as well, it blocks neither here nor there.
    with (tmp_path / "continue").open("r+b", buffering=0) as go_on, first_process(tmp_path, command) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "starting\n"
        python = child(process.pid) if first else child(child(process.pid))
        os.kill(python, signal.SIGTERM)
        if first:
            go_on.write(b"1")
            assert until_it_serves(process, port) == python
            assert is_healthy(port)
        else:
            assert process.wait(30) == 128 + signal.SIGTERM
