"""Starts the child process of `serving_process()`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack, suppress
from typing import IO

from aioserve._process import messages


def check_interpreter() -> None:
    """Refuse an executable that is not a Python interpreter: a frozen program would start itself without an end."""
    if sys.platform == "win32":
        why = "that is not supported on Windows"
    elif getattr(sys, "frozen", False):
        why = "this program is frozen, and contains no Python interpreter that could be started"
    elif not sys.executable:
        why = "sys.executable is empty"
    elif not _is_interpreter(sys.executable):
        why = f"sys.executable is {sys.executable!r}, which is not a Python interpreter"
    else:
        return
    raise RuntimeError(f"serving_process() cannot start a child process: {why}; serve the app in this process")


def has_exit_code(pid: int) -> bool:
    """Whether the system has the exit code of a child that has ended: it throws it away where SIGCHLD is ignored."""
    if sys.platform == "win32" or (sys.platform == "darwin" and sys.version_info < (3, 13)):
        return True  # it cannot be asked
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def open_pidfd(pid: int) -> int | None:
    """Open a descriptor that tells when the child ends; without one, it has ended when its pipe has."""
    if sys.platform == "linux":
        with suppress(AttributeError, OSError):  # not with this kernel, or this build of Python
            return os.pidfd_open(pid)
    return None


def _is_interpreter(executable: str) -> bool:
    if not os.access(executable, os.X_OK):
        return False
    names = [os.path.basename(each).lower() for each in (executable, os.path.realpath(executable))]
    if any("python" in name or "pypy" in name for name in names):
        return True
    # One of another name (a copy, mayapy) was started with a command line of Python's, behind whose own part sys.argv
    # begins. In a program that embeds Python, both are the program's command line, or there is none.
    return bool(sys.orig_argv) and sys.orig_argv[:1] != sys.argv[:1]


def spawn(app: str, handover: messages.Handover) -> tuple[subprocess.Popen[bytes], int, IO[bytes]]:
    """Start the child; return it, the reading end of its events, and the writing end of its lifeline."""
    with tempfile.TemporaryFile("w+") as file, ExitStack() as undo, ExitStack() as passed_on:
        json.dump(handover._asdict(), file)
        file.seek(0)
        events, childs_events = os.pipe()
        undo.callback(os.close, events)
        passed_on.callback(os.close, childs_events)
        childs_lifeline, lifeline = os.pipe()
        undo.callback(os.close, lifeline)
        passed_on.callback(os.close, childs_lifeline)
        if sys.platform != "win32":  # where none is started
            os.set_blocking(events, False)

        fds = (file.fileno(), childs_events, childs_lifeline)
        flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # as multiprocessing does
        # With -P, modules in the current directory do not hide those that we import.
        command = [sys.executable, *flags, "-P", "-m", "aioserve", "--for-parent", ",".join(map(str, fds)), "--", app]
        process = subprocess.Popen(  # noqa: S603 (ourselves)
            command,
            stdin=subprocess.DEVNULL,
            pass_fds=(*fds, *(fd for fd, *_ in handover.listeners)),
            process_group=0,  # so that the terminal's Ctrl+C is only for the parent
        )
        undo.pop_all()
    return process, events, open(lifeline, "wb", buffering=0)
