"""
systemd's side: the sockets that it hands down, and what it wants to hear.

Two small protocols, each a matter of environment variables: sd_listen_fds(3) and sd_notify(3).
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Sequence

logger = logging.getLogger("aioserve")

_FIRST = 3  # SD_LISTEN_FDS_START


def listen_fds(name: str | None = None) -> Sequence[int]:
    """
    Return the descriptors that systemd has handed down to this very process, all of them or those of one name.

    They and the environment stay as they are, so that a server can be started on them again.
    """
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []  # they are for another process, which has left us its environment
    count = os.environ.get("LISTEN_FDS", "")
    descriptors = range(_FIRST, _FIRST + (int(count) if count.isdecimal() and len(count) < 10 else 0))
    if name is None:
        return descriptors
    return [descriptor for descriptor, each in zip(descriptors, names(), strict=False) if each == name]


def names() -> list[str]:
    """Return the names of what systemd has handed down, if it has."""
    return os.environ.get("LISTEN_FDNAMES", "").split(":") if "LISTEN_FDNAMES" in os.environ else []


def notify(state: str) -> None:
    """Tell systemd something, like "READY=1", where it listens."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):  # the abstract namespace
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.sendto(state.encode(), address)
    except OSError as exc:
        told = os.environ["NOTIFY_SOCKET"]
        logger.warning("cannot tell systemd %s at %s: %s", state, told, exc.strerror or exc)
