"""
Makes a program believe that it runs on Windows: to be imported first, in a process of its own.

    python -c "import tests.helpers.windows; ..."

What is Unix-only is hidden from all that is imported later: an import of such a module fails, and names are deleted.
Standard library and dependencies are imported before. Loops are asyncio's for Windows (see `proactor.py`).
"""

from __future__ import annotations

import asyncio
import functools
import os
import select
import signal
import socket
import ssl
import sys
import sysconfig
from typing import Any

# Before they are told that they are on Windows, where they would look for what only Windows has.
import _pytest.config  # noqa: F401
import anyio._backends._asyncio
import anyio.pytest_plugin  # noqa: F401
import click
import fastapi
import httptools  # noqa: F401
import httpx
import pytest  # noqa: F401
import trio  # noqa: F401
import trustme  # noqa: F401
import uvicorn.logging
import uvicorn.main
import uvicorn.protocols.http.auto
import uvicorn.protocols.websockets.auto
import websockets.asyncio.client  # noqa: F401

from tests.helpers.proactor import PortableLoop

HIDDEN_MODULES = {"fcntl", "grp", "pty", "pwd", "resource", "termios", "tty", "uvloop"}
HIDDEN_NAMES: dict[Any, list[str]] = {
    os: [
        "fchmod",
        "fork",
        "forkpty",
        "get_blocking",
        "geteuid",
        "getpgid",
        "getpgrp",
        "getuid",
        "killpg",
        "mkfifo",
        "openpty",
        "pidfd_open",
        "posix_spawn",
        "register_at_fork",
        "set_blocking",
        "setpgid",
        "setsid",
        "waitid",
        "O_ACCMODE",
        "O_DIRECTORY",
        "O_NOFOLLOW",
        "O_PATH",
    ],
    select: ["epoll", "poll", "POLLIN"],
    signal: [
        "SIGALRM",
        "SIGCHLD",
        "SIGHUP",
        "SIGKILL",
        "SIGPIPE",
        "SIGQUIT",
        "SIGSTOP",
        "SIGUSR1",
        "SIGUSR2",
        "alarm",
        "pause",
        "pthread_kill",
        "pthread_sigmask",
        "setitimer",
        "siginterrupt",
        "sigwait",
    ],
    socket: ["AF_UNIX", "SO_REUSEPORT", "TCP_INFO", "recv_fds", "send_fds"],
}


def become_windows() -> None:
    """Hide what Windows has not, and add what only Windows has."""
    for name in HIDDEN_MODULES:
        sys.modules[name] = None  # type: ignore[assignment]  # which makes an import fail
    sysconfig.get_config_vars()  # which it reads once
    asyncio.set_event_loop(None)  # which makes a policy, once
    ssl.enum_certificates = lambda _: []  # type: ignore[attr-defined]
    signal.SIGBREAK = signal.SIGQUIT  # type: ignore[attr-defined]
    socket.SO_EXCLUSIVEADDRUSE = socket.SO_REUSEADDR  # type: ignore[attr-defined]
    socket.socketpair = functools.partial(socket.socketpair, socket.AF_UNIX)
    for module, names in HIDDEN_NAMES.items():
        for name in names:
            if hasattr(module, name):
                delattr(module, name)
    sys.platform = "win32"
    asyncio.new_event_loop = asyncio.events.new_event_loop = PortableLoop


assert "aioserve" not in sys.modules, "to be imported first"
del click, fastapi, httpx, uvicorn
become_windows()
