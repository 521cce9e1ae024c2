"""
Socket activation by systemd's own tool.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from tests.conftest import WARNINGS_ARE_ERRORS
from tests.integration.conftest import program

RESTARTS = 20
CLIENTS = 20
HERE = Path(__file__).parent


def test_restarted_under_load_it_refuses_nobody() -> None:
    """The socket is systemd's, and what comes between two runs of the program waits in its queue."""
    activate = program("systemd-socket-activate", "systemd")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    served = [sys.executable, *WARNINGS_ARE_ERRORS, "-u", str(HERE / "activated.py")]
    command = [activate, "--listen", f"127.0.0.1:{port}", *served]
    with subprocess.Popen(  # noqa: S603
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    ) as service:
        assert service.stdout is not None
        assert service.stderr is not None
        assert "Listening on" in service.stderr.readline()

        load = [sys.executable, str(HERE.parent / "load.py"), str(port), str(CLIENTS), "fresh"]
        with subprocess.Popen(load, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as clients:  # noqa: S603
            answered = 0
            for _ in range(RESTARTS):
                assert service.stdout.readline() == "started\n"
                service.send_signal(signal.SIGHUP)
                answered += int(service.stdout.readline())
            assert service.stdout.readline() == "started\n"
            counted = json.loads(clients.communicate()[0])
        service.send_signal(signal.SIGTERM)
        answered += int(service.stdout.readline())
        assert service.wait() == 0
    assert clients.returncode == 0  # nobody was refused
    assert (counted["unanswered"], counted["broken"]) == (0, 0)
    assert counted["answered"] == answered > 0
