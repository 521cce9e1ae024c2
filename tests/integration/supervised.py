"""
Does what systemd does with a service that has a socket; the socket comes from systemd-socket-activate.

    systemd-socket-activate --listen=ADDRESS python supervised.py LIMIT COMMAND...

It starts the command. Each line of input restarts it: SIGTERM, at most LIMIT seconds, and the next one; the end of the
input stops it. It prints what the command prints, and after each run its exit code.
"""

from __future__ import annotations

import os
import subprocess
import sys

FIRST = 3  # the first descriptor of systemd


def run(command: list[str], limit: float) -> bool:
    """Run the command once; return whether to run it again."""
    process = subprocess.Popen(  # noqa: S603
        command,
        pass_fds=[FIRST],
        preexec_fn=lambda: os.environ.update(LISTEN_PID=str(os.getpid())),
    )
    try:
        again = bool(sys.stdin.readline())
        process.terminate()
        print("exit code", process.wait(limit), flush=True)
    finally:
        process.kill()
    return again


if __name__ == "__main__":
    while run(sys.argv[2:], float(sys.argv[1])):
        pass
