"""
Socket activation by systemd's own tool.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.conftest import WARNINGS_ARE_ERRORS
from tests.integration.conftest import free_port, program
from tests.integration.loading import load

RESTARTS = 20
CLIENTS = 20
HERE = Path(__file__).parent


def test_socket_activated_program_restarted_under_load_refuses_no_connection() -> None:
    """The socket is systemd's; connections between two runs of the program wait in its queue."""
    activate = program("systemd-socket-activate", "systemd")
    port = free_port()
    served = [sys.executable, *WARNINGS_ARE_ERRORS, "-u", str(HERE / "activated.py")]
    command = [activate, "--listen", f"127.0.0.1:{port}", *served]
    with subprocess.Popen(  # noqa: S603
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    ) as service:
        assert service.stdout is not None
        assert service.stderr is not None
        assert "Listening on" in service.stderr.readline()

        with load(port, CLIENTS, "fresh") as counted:
            answered = 0
            for _ in range(RESTARTS):
                assert service.stdout.readline() == "started\n"
                service.send_signal(signal.SIGHUP)
                answered += int(service.stdout.readline())
            assert service.stdout.readline() == "started\n"
        service.send_signal(signal.SIGTERM)
        answered += int(service.stdout.readline())
        assert service.wait() == 0
    assert (counted["unanswered"], counted["broken"]) == (0, 0)
    assert counted["answered"] == answered > 0
