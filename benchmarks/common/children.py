"""
Other interpreters: servers that do not share the clients' loop, and what has to be measured in a process of its own.
"""

from __future__ import annotations

import asyncio
import json
import os
import select
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from common import peers

HERE = Path(__file__).parent

COMPILED = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
"""An environment for new interpreters in which the second one finds everything compiled."""


class Interpreter(NamedTuple):
    """A Python, and the environment variables of its processes: which aioserve these import depends on both."""

    python: str
    environment: Mapping[str, str]


THIS = Interpreter(sys.executable, COMPILED)
"""What runs this process."""


class TooLongError(Exception):
    """It has not answered in time, and was ended."""


class Child:
    """A script that runs in an interpreter of its own, and answers lines of JSON with lines of JSON."""

    def __init__(self, script: str | Path, *arguments: str, interpreter: Interpreter = THIS) -> None:
        self.process = subprocess.Popen(
            [interpreter.python, str(script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env=interpreter.environment,
        )

    def tell(self, question: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(question) + "\n")

    def answer(self, timeout: float = 60) -> Any:
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], timeout)[0]:
            self.process.kill()
            raise TooLongError
        return json.loads(self.process.stdout.readline())

    def ask(self, question: Any, timeout: float = 60) -> Any:
        self.tell(question)
        return self.answer(timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.process.terminate()
        self.process.communicate()


def serve(peer: str, *, loop: str, interpreter: Interpreter = THIS, **options: Any) -> Child:
    """Return a child that starts and stops servers of that peer; see `server.py`."""
    assert peer in peers.PEERS
    return Child(HERE / "server.py", peer, loop, json.dumps(options), interpreter=interpreter)


async def questions() -> Any:
    """Yield, in a child, what it is asked."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        yield json.loads(line)


def reply(answer: Any) -> None:
    """Answer, in a child."""
    print(json.dumps(answer), flush=True)
