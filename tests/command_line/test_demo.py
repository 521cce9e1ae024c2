"""
The demo, run as its users run it.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys

import httpx
import pytest

from tests.conftest import WARNINGS_ARE_ERRORS

COMMAND = [sys.executable, *WARNINGS_ARE_ERRORS, "-u", "-m", "aioserve.demo"]


def test_demo_with_once_makes_every_kind_of_request_and_ends() -> None:
    """It prints the URL, the answers, and how long start and stop took."""
    done = subprocess.run([*COMMAND, "--once"], capture_output=True, text=True, check=False)  # noqa: S603
    assert done.stderr == ""
    assert done.returncode == 0
    printed = re.sub(r"\d+\.\d ms", "0.0 ms", re.sub(r":\d{4,}", ":8000", done.stdout))
    assert re.fullmatch(
        r"""  app: started
started in 0\.0 ms, with the import of uvicorn: http://127\.0\.0\.1:8000
  GET /count:      {"count":\d+,"since":[\d.]+,"served":\d+}
  GET /events:     data: \d+, data: \d+, data: \d+ \.\.\.
  WebSocket /echo: hello \(\d+\)
  app: shut down, after the last request
stopped in 0\.0 ms
""",
        printed,
    )


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_demo_serves_its_page_until_a_signal(name: str) -> None:
    """
    An endless stream is open all the time, and does not delay the stop. What it prints can be read at once, also where
    that is no terminal; the URL is there once.
    """

    def not_in_the_background() -> None:
        # The test run may ignore Ctrl+C, as the background jobs of a shell do, and children inherit that.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    buffered = [each for each in COMMAND if each != "-u"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(  # noqa: S603
        buffered, env=environment, stdout=subprocess.PIPE, text=True, preexec_fn=not_in_the_background
    ) as program:
        assert program.stdout is not None
        lines = []
        for line in program.stdout:
            lines.append(line)
            if line.startswith("open http"):
                break
        url = lines[-1].split()[1]
        with httpx.Client(base_url=url, trust_env=False) as client, client.stream("GET", "/events") as events:
            assert next(events.iter_lines()).startswith("data: ")
            assert "EventSource" in client.get("/").text
            program.send_signal(signal.Signals[name])
            rest = program.stdout.read()
        assert rest.startswith("  app: shut down, after the last request\nstopped in ")
        assert "".join([*lines, rest]).count(url) == 1
        assert program.wait() == 0


def test_demo_on_a_busy_port_says_so_in_one_line() -> None:
    """Without a traceback, and with the exit code of the command line."""
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = str(busy.getsockname()[1])
        done = subprocess.run([*COMMAND, "--port", port], capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 3
    assert re.fullmatch(rf"The demo cannot start: .*127\.0\.0\.1:{port}.*in use.*\n", done.stderr)
