"""Reads the sockets that systemd passes to a service, and notifies systemd: sd_listen_fds(3) and sd_notify(3)."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Sequence

logger = logging.getLogger("aioserve")

_FIRST_DESCRIPTOR = 3  # SD_LISTEN_FDS_START


def listen_fds(name: str | None = None) -> Sequence[int]:
    """Return the descriptors that systemd has passed to this process, or those with this name; change nothing."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []  # they are for another process, whose environment this one has inherited
    count = os.environ.get("LISTEN_FDS", "")
    size = int(count) if count.isdecimal() and len(count) < 10 else 0
    descriptors = range(_FIRST_DESCRIPTOR, _FIRST_DESCRIPTOR + size)
    if name is None:
        return descriptors
    return [descriptor for descriptor, each in zip(descriptors, names(), strict=False) if each == name]


def names() -> list[str]:
    return os.environ["LISTEN_FDNAMES"].split(":") if "LISTEN_FDNAMES" in os.environ else []


def notify(state: str) -> None:
    """Send a state like "READY=1" to systemd, if NOTIFY_SOCKET is set."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            # A name that begins with @ is in the abstract namespace.
            sock.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)
    except OSError as exc:
        logger.warning("cannot send %s to systemd at %s: %s", state, address, exc.strerror or exc)
