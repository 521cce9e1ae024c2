"""
IPython in a terminal: its loop stands still at the prompt, unless it was told otherwise.
"""

from __future__ import annotations

import os
import re
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pexpect

ANSI = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
WARNING = "{url} answers only while a cell runs, since IPython's loop stands still at the prompt; enter %gui asyncio"


class Terminal:
    """A terminal with IPython in it; every cell prints a word at its end, which tells that it is done."""

    def __init__(self, folder: Path) -> None:
        environment = {**os.environ, "IPYTHONDIR": str(folder), "TERM": "dumb"}
        arguments = ["-m", "IPython", "--no-banner", "--no-confirm-exit", "--colors=NoColor"]
        self._child = pexpect.spawn(
            sys.executable, arguments, env=environment, encoding="utf-8", timeout=30, dimensions=(50, 250)
        )
        self._child.expect("In ")
        self._cells = 0

    def enter(self, cell: str) -> str:
        """Enter a line, wait until it is done, and return what it has printed."""
        self._cells += 1
        self._child.send(f"{cell}\r")
        self._child.send(f"print('cell', {self._cells})\r")
        self._child.expect(rf"\ncell {self._cells}\r")
        return ANSI.sub("", self._child.before or "")

    def close(self) -> None:
        self._child.close(force=True)


@contextmanager
def terminal(folder: Path) -> Iterator[Terminal]:
    opened = Terminal(folder)
    try:
        yield opened
    finally:
        opened.close()


def answers(url: str, timeout: float) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:  # noqa: S310
            return bool(response.status == 200)
    except OSError:
        return False


def started(ipython: Terminal) -> tuple[str, str]:
    """Start a server there, and return its URL, and what was printed meanwhile."""
    ipython.enter("from tests.helpers.apps import App; from aioserve import start")
    printed = ipython.enter("server = await start(App()); print('url', server.url, '.')")
    found = re.findall(r"url (http://127\.0\.0\.1:\d+) \.", printed)
    return found[-1], printed


def test_server_at_the_prompt_stands_still_and_its_start_has_warned(tmp_path: Path) -> None:
    """With `%gui asyncio` it answers."""
    with terminal(tmp_path) as ipython:
        url, printed = started(ipython)
        assert WARNING.format(url=url) in printed.replace("\r\n", "")
        assert not answers(url, 0.5)

        ipython.enter("%gui asyncio")
        until = time.monotonic() + 20
        while not answers(url, 0.5):
            assert time.monotonic() < until
        ipython.enter("await server.aclose()")


def test_server_whose_loop_runs_at_the_prompt_answers_and_its_start_is_quiet(tmp_path: Path) -> None:
    """As in a notebook."""
    with terminal(tmp_path) as ipython:
        ipython.enter("%gui asyncio")
        url, printed = started(ipython)
        assert "answers only" not in printed
        assert answers(url, 10)
        ipython.enter("await server.aclose()")


def test_server_in_a_thread_is_started_quietly_and_answers_at_the_prompt(tmp_path: Path) -> None:
    """Its loop is not IPython's."""
    with terminal(tmp_path) as ipython:
        ipython.enter("from tests.helpers.apps import App; from aioserve import start_in_thread")
        printed = ipython.enter("server = start_in_thread(App()); print('url', server.url, '.')")
        url = re.findall(r"url (http://127\.0\.0\.1:\d+) \.", printed)[-1]
        assert "answers only" not in printed
        assert answers(url, 10)
        ipython.enter("server.stop()")
