"""
Reads the sockets that systemd passes to a service, notifies systemd, and answers its watchdog.

See sd_listen_fds(3), sd_notify(3) and sd_watchdog_enabled(3).
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Sequence
from functools import partial

from aioserve._log import logger

_FIRST_DESCRIPTOR = 3  # SD_LISTEN_FDS_START


def listen_fds(name: str | None = None) -> Sequence[int]:
    """Return the descriptors that systemd has passed to this process, or those with this name; change nothing."""
    if not _is_for_us("LISTEN_PID"):
        return []  # they are for another process, whose environment this one has inherited
    descriptors = range(_FIRST_DESCRIPTOR, _FIRST_DESCRIPTOR + _number("LISTEN_FDS"))
    if name is None:
        return descriptors
    return [descriptor for descriptor, each in zip(descriptors, names(), strict=False) if each == name]


def warn_if_for_another_process() -> None:
    """Log it if systemd has passed sockets, but to another process: most likely a wrapper that has started this one."""
    if _number("LISTEN_FDS") and "LISTEN_PID" in os.environ and not _is_for_us("LISTEN_PID"):
        _warn("sockets are", "LISTEN_PID")


def names() -> list[str]:
    return os.environ["LISTEN_FDNAMES"].split(":") if "LISTEN_FDNAMES" in os.environ else []


def watchdog() -> tuple[float, Callable[[], None]] | None:
    """
    Return how to answer systemd's watchdog: how often, in seconds, and by what; `None` if it does not watch us.

    It ends a process whose answer takes longer than WATCHDOG_USEC, so each comes at half that time.
    """
    if not {"WATCHDOG_USEC", "NOTIFY_SOCKET"} <= os.environ.keys():
        return None
    if "WATCHDOG_PID" in os.environ and not _is_for_us("WATCHDOG_PID"):
        _warn("watchdog is", "WATCHDOG_PID")
        return None
    microseconds = _number("WATCHDOG_USEC")
    if not microseconds:
        logger.warning("ignored WATCHDOG_USEC=%s: not a number of microseconds", os.environ["WATCHDOG_USEC"])
        return None
    return microseconds / 2e6, partial(notify, "WATCHDOG=1")


def warn_of_watchdog() -> None:
    """Log it if systemd watches this process, and this server does not answer."""
    if watchdog() is not None:
        logger.warning(
            "systemd's watchdog is on (WATCHDOG_USEC), and a server of one named socket does not answer it; "
            "let the program send WATCHDOG=1, or serve all sockets with systemd=True"
        )


def notify(state: str) -> None:
    """Send a state like "READY=1" to systemd, if NOTIFY_SOCKET is set."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address or sys.platform == "win32":
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            # A name that begins with @ is in the abstract namespace.
            sock.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)
    except OSError as exc:
        logger.warning("cannot send %s to systemd at %s: %s", state, address, exc.strerror or exc)


def _is_for_us(variable: str) -> bool:
    return os.environ.get(variable) == str(os.getpid())


def _warn(what: str, variable: str) -> None:
    logger.warning(
        "systemd's %s for process %s (%s), not for this one, %d; let the unit start this program directly, and a "
        "wrapper start it with exec",
        what,
        os.environ[variable],
        variable,
        os.getpid(),
    )


def _number(variable: str) -> int:
    """Return the number in a variable of the environment; 0 where it is no number, or too long to be one."""
    value = os.environ.get(variable, "")
    return int(value) if value.isdecimal() and len(value) < 20 else 0
