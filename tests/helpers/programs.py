"""
Whole programs in processes of their own; tests wait for the lines that they print.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.conftest import WARNINGS_ARE_ERRORS

ROOT = Path(__file__).parents[2]


class Program:
    """
    A Python program that runs in a process group of its own; what is left of the group is killed at the end.

    Args:
        arguments: The arguments of "python".
        pass_fds: Descriptors that it inherits.
        stdin: Its standard input.
        preexec: Called in the new process before anything else.
    """

    def __init__(
        self,
        *arguments: str,
        pass_fds: tuple[int, ...] = (),
        warnings_are_errors: bool = True,
        cwd: Path = ROOT,
        stdin: int | None = None,
        preexec: Callable[[], object] = lambda: None,
    ) -> None:
        warnings = WARNINGS_ARE_ERRORS if warnings_are_errors else []
        self.process = subprocess.Popen(  # noqa: S603
            [sys.executable, *warnings, "-u", *arguments],
            cwd=cwd,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            bufsize=1,
            pass_fds=pass_fds,
            # The test run may ignore Ctrl+C, as the background jobs of a shell do, and children inherit that.
            preexec_fn=lambda: (signal.signal(signal.SIGINT, signal.SIG_DFL), preexec()),
            process_group=0,
        )
        self.said: list[str] = []
        """The lines that it has printed, with ports and process ids as they are."""

    def wait_for(self, beginning: str) -> str:
        """Wait until it has printed a line with this beginning, and return the line."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line.rstrip())
            if line.startswith(beginning):
                return line.rstrip()
        raise AssertionError(f"it ended without {beginning!r}: {self.said}, {self.process.communicate()[1]}")

    def send(self, signum: int) -> None:
        """Send a signal to it."""
        self.process.send_signal(signum)

    def wait_until_asleep(self) -> None:
        """
        Wait until its main thread sleeps, so that a signal interrupts that, and does not come just before; on Linux.

        While that thread waits for CPython's own lock, it sleeps as well, but wakes up each 5 ms.
        """
        before = None
        while sys.platform == "linux" and ((now := self._sleep()) is None or now != before):
            before = now
            time.sleep(0.02)

    def _sleep(self) -> int | None:
        """Return the number of the main thread's present sleep; `None` where it is awake."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"^State:\tS.*^voluntary_ctxt_switches:\t(\d+)$", status, re.DOTALL | re.MULTILINE)
        return int(found[1]) if found else None

    def end(self) -> tuple[int, str]:
        """Wait for its end; return the exit code and its standard error."""
        assert self.process.stdout is not None
        # Not by `communicate()`, which does not look at what `wait_for()` has read ahead.
        self.said += self.process.stdout.read().splitlines()
        _, err = self.process.communicate()
        return self.process.returncode, err

    @property
    def masked(self) -> list[str]:
        """The lines that it has printed, with 8000 in the place of each port."""
        return [re.sub(r":\d{4,}", ":8000", line) for line in self.said]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.communicate()
