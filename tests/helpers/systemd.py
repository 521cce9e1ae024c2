"""
What systemd gets from a service, and what the service logs about it.
"""

from __future__ import annotations

import contextlib
import socket

import pytest

# Of what, whose process id, from which variable, and our process id.
FOR_ANOTHER = (
    "systemd's {} for process {} ({}), not for this one, {}; let the unit start this program directly, "
    "and a wrapper start it with exec"
)


def notifications(manager: socket.socket) -> list[bytes]:
    """Return the notifications that have come since the last call."""
    messages = []
    with contextlib.suppress(BlockingIOError):
        while True:
            messages.append(manager.recv(1000))
    return messages


def messages_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what aioserve itself has logged."""
    return [record.getMessage() for record in caplog.records if record.name == "aioserve"]
