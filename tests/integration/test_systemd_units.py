"""
The examples' units for systemd: they are valid, and the service that they start loses no request when it is restarted.

systemd itself need not run for these tests.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.conftest import WARNINGS_ARE_ERRORS
from tests.integration import examples
from tests.integration.conftest import free_port, program
from tests.integration.loading import load
from tests.integration.stopping import longest_stop

RESTARTS = 5
CLIENTS = 5  # of each kind
HERE = Path(__file__).parent

# How long the interpreter may take to exit.
EXIT = 1.0


def said(key: str) -> str:
    """Return the value of a key in app.service."""
    (value,) = re.findall(rf"^{key}=(.*)$", examples.file("app.service"), flags=re.MULTILINE)
    return str(value)


def test_units_of_the_examples_are_valid_for_systemd(tmp_path: Path) -> None:
    """With the files in their places, and the program where the units expect it."""
    analyze = program("systemd-analyze", "systemd")
    units = tmp_path / "etc/systemd/system"
    units.mkdir(parents=True)
    for name in ("app.socket", "app.service"):
        (units / name).write_text(examples.file(name))
    python = tmp_path / shlex.split(said("ExecStart"))[0].lstrip("/")
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\n")
    python.chmod(0o755)
    # The units that they depend on, such as sysinit.target, do not exist below this root.
    command = [analyze, "verify", f"--root={tmp_path}", "--recursive-errors=no", "app.socket", "app.service"]
    verified = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    assert (verified.returncode, verified.stdout, verified.stderr) == (0, "", "")


def test_systemd_unit_waits_longer_than_a_stop_can_take() -> None:
    """As the examples' table says."""
    arguments = shlex.split(said("ExecStart"))[1:]
    assert arguments[:2] == ["-m", "aioserve"]
    longest, limit = longest_stop(arguments[2:]), float(said("TimeoutStopSec"))
    assert longest + EXIT <= limit
    *parts, total, stated = examples.sums("in `app.service`")
    assert sum(parts) == total == longest
    assert stated == limit


@contextmanager
def notified(path: Path) -> Iterator[socket.socket]:
    """Make the socket on which systemd would get the notifications of the service."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(path))
        listening.settimeout(30)
        yield listening


@pytest.mark.timeout(120)
def test_systemd_service_restarted_under_load_refuses_no_connection(tmp_path: Path) -> None:
    """Neither new nor kept-alive connections lose a request; and systemd is notified of each start and stop."""
    activate = program("systemd-socket-activate", "systemd")
    (tmp_path / "app.py").write_text(examples.file("app.py"))
    python, *arguments = shlex.split(said("ExecStart"))
    assert (python, said("WorkingDirectory")) == ("/srv/app/.venv/bin/python", "/srv/app")  # the test uses other paths
    served = [sys.executable, *WARNINGS_ARE_ERRORS, *arguments]
    port = free_port()
    command = [
        *(activate, f"--listen=127.0.0.1:{port}", f"--setenv=NOTIFY_SOCKET={tmp_path / 'notify'}"),
        *(sys.executable, str(HERE / "supervised.py"), said("TimeoutStopSec"), *served),
    ]
    with (
        notified(tmp_path / "notify") as notify,
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(  # noqa: S603
            command,
            cwd=tmp_path,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            process_group=0,
        ) as service,
    ):
        try:
            assert service.stdin is not None
            assert service.stdout is not None
            with load(port, CLIENTS, "fresh") as fresh, load(port, CLIENTS, "kept-alive") as kept_alive:
                for _ in range(RESTARTS):
                    assert notify.recv(100) == b"READY=1"
                    service.stdin.write("restart\n")
                    service.stdin.flush()
                    assert notify.recv(100) == b"STOPPING=1"
                assert notify.recv(100) == b"READY=1"
            lines = service.communicate()[0].splitlines()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(service.pid, signal.SIGKILL)
    assert service.returncode == 0
    assert lines == [f"http://127.0.0.1:{port}", "exit code 0"] * (RESTARTS + 1)
    for counted in (fresh, kept_alive):
        assert counted["answered"] > CLIENTS * RESTARTS
        assert (counted["unanswered"], counted["broken"]) == (0, 0)
