"""
Servers behind HAProxy, with the examples' files: restarted one after the other under load, they lose no request.
"""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from tests.conftest import WARNINGS_ARE_ERRORS
from tests.integration import examples
from tests.integration.conftest import program
from tests.integration.loading import load

ROUNDS = 8
CLIENTS = 2  # of each kind
COMMAND = "python -m aioserve app:app --host"

# On Linux, all of 127.0.0.0/8 is this machine; so each server can have port 8000.
NETWORK = f"127.{1 + os.getpid() // 250 % 250}.{1 + os.getpid() % 250}"
SERVERS = {name: f"{NETWORK}.{number}" for number, name in enumerate(("one", "two", "three"), 2)}


@pytest.fixture
def public(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Make the socket that HAProxy listens on."""
    for name, host in SERVERS.items():
        monkeypatch.setenv(name.upper(), host)
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listening:
        monkeypatch.setenv("PUBLIC", f"fd@{listening.fileno()}")
        yield listening


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "haproxy.cfg"
    path.write_text(examples.file("haproxy.cfg"))
    return path


class Served:
    """
    One of the machines on which the examples' command runs, again and again.

    Its log is a file: a pipe would soon be full, and block the command.
    """

    def __init__(self, host: str, directory: Path) -> None:
        self.host = host
        self.directory = directory
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Wait until it serves."""
        command = [each.replace("$HOST", self.host) for each in shlex.split(examples.command("haproxy", COMMAND))]
        with (self.directory / f"{self.host}.log").open("a") as log:
            self.process = subprocess.Popen(  # noqa: S603
                [sys.executable, *WARNINGS_ARE_ERRORS, *command[1:]],
                cwd=self.directory,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == f"http://{self.host}:8000\n"

    def stop(self) -> None:
        assert self.process is not None
        self.process.terminate()

    def end(self) -> int:
        """Wait for its end; return the exit code."""
        assert self.process is not None
        self.process.communicate()
        return self.process.returncode

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self.process is not None:
            self.process.kill()
            self.end()


class Balancer:
    """A running HAProxy."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def wait_for(self, server: str, state: str) -> str:
        """Wait until it logs that the server is in this state; return the reason."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if said := re.search(rf"Server app/{server} is {state}, reason: (.*?), (?:code|info|check)", line):
                return said[1]
        raise AssertionError("it has ended")


@contextmanager
def balancing(config: Path, public: socket.socket) -> Iterator[Balancer]:
    command = [program("haproxy", "haproxy"), "-db", "-f", str(config)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, pass_fds=[public.fileno()]) as process:  # noqa: S603
        try:
            yield Balancer(process)
        finally:
            process.terminate()
            process.communicate()


def test_haproxy_configuration_of_the_examples_is_valid(config: Path, public: socket.socket) -> None:
    """HAProxy prints not even a warning."""
    command = [program("haproxy", "haproxy"), "-c", "-dW", "-f", str(config)]
    checked = subprocess.run(  # noqa: S603
        command, capture_output=True, text=True, check=False, pass_fds=[public.fileno()]
    )
    assert checked.returncode == 0, checked.stderr


def test_drain_delay_is_longer_than_haproxy_needs_to_notice_the_stop(config: Path) -> None:
    """As the page computes it."""
    found = re.search(r"inter (\d+)ms fall (\d+) ", config.read_text())
    assert found is not None
    inter, fall = int(found[1]) / 1000, int(found[2])
    drain = float(shlex.split(examples.command("haproxy", COMMAND))[-1])
    assert inter * fall + inter == pytest.approx(0.6)
    assert inter * fall + inter < drain


@pytest.mark.timeout(400)
def test_servers_behind_haproxy_that_are_restarted_in_turn_lose_nothing(
    config: Path, public: socket.socket, tmp_path: Path
) -> None:
    """HAProxy notices each stop by the readiness route, not by lost requests."""
    (tmp_path / "app.py").write_text(examples.file("app.py"))
    port = public.getsockname()[1]
    with ExitStack() as stack:
        servers = {name: stack.enter_context(Served(host, tmp_path)) for name, host in SERVERS.items()}
        balancer = stack.enter_context(balancing(config, public))
        with load(port, CLIENTS, "fresh") as fresh, load(port, CLIENTS, "kept-alive") as kept_alive:
            for _ in range(ROUNDS):
                for name, server in servers.items():
                    server.stop()
                    assert balancer.wait_for(name, "DOWN") == "Layer7 wrong status"
                    assert server.end() == 0
                    server.start()
                    balancer.wait_for(name, "UP")
    for counted in (fresh, kept_alive):
        assert counted["answered"] > CLIENTS * ROUNDS * len(SERVERS)
        assert (counted["unanswered"], counted["broken"]) == (0, 0)
